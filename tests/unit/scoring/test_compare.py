from __future__ import annotations

from typing import Any

import pytest

from ddpm.errors import RequestError
from ddpm.scoring.compare import check_comparable, difference
from launch.terminal.comparison import print_comparison
from tests.unit.scoring.test_record import NEW, OLD


def test_the_difference_of_two_scores_has_the_interval_of_both() -> None:
    a, b = {**NEW, "fid_interval": [4.1834, 4.2434]}, {**NEW, "fid": 4.1134, "fid_interval": [4.0734, 4.1534]}
    apart = difference(a, b)
    assert apart.value == pytest.approx(-0.1) and apart.half_width == pytest.approx(0.05)
    assert apart.means_something and not difference(a, {**b, "fid": 4.2}).means_something


def test_where_one_has_no_interval_their_difference_has_none() -> None:
    apart = difference(NEW, {**OLD, "fid": 9.0})
    assert apart.value == pytest.approx(9.0 - NEW["fid"]) and apart.half_width is None and not apart.means_something


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"reference": {**NEW["reference"], "split": "test", "digest": "ef" * 32}},
            "reference differs.*train.*test ef",
        ),
        ({"extractor": {**NEW["extractor"], "weights_sha256": "00" * 32}}, "extractor differs.*6726825d.*000000"),
        ({"extractor": {**NEW["extractor"], "resize": "none"}}, "extractor differs"),
        ({"extractor": {"name": "pixels", "weights_sha256": None}}, r"extractor differs \(inception .*, and pixels\);"),
    ],
)
def test_scores_of_other_features_or_references_are_not_compared(changes: dict[str, Any], why: str) -> None:
    check_comparable({"a": NEW, "b": {**NEW, "seed": 1, "num_samples": 5_000}})
    with pytest.raises(RequestError, match=f"a and b cannot be compared: their {why}"):
        check_comparable({"a": NEW, "b": {**NEW, **changes}})


def test_a_fid_is_not_compared_with_what_is_none() -> None:
    other = {"frechet_distance": 4.0, **{k: v for k, v in NEW.items() if not k.startswith("fid")}}
    with pytest.raises(RequestError, match="their score differs"):
        check_comparable({"a": NEW, "b": other})


def test_sets_of_different_sizes_are_told_to_be_compared_by_their_limits_only_if_they_have_some(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = {**NEW, "num_samples": 30}
    print_comparison({"a": NEW, "b": few}, as_json=False)
    assert "biased differently: to compare them, make as many of each" in capsys.readouterr().out
    print_comparison({"a": {**NEW, "fid_infinity": 4.1}, "b": {**few, "fid_infinity": 4.0}}, as_json=False)
    assert "biased differently: compare their limits" in capsys.readouterr().out
