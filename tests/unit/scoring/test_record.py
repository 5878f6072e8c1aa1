from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.sample import Evaluate
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir
from ddpm.scoring import record as records
from ddpm.scoring.record import Score, all_scores, best_founded_first, publish_score, read_score, scores_of, told

OLD: dict[str, Any] = {
    "fid": 4.2134,
    "num_samples": 50_000,
    "reference": {"name": "cifar10", "split": "train", "num_images": 50_000, "digest": "ab" * 32},
    "extractor": {"name": "inception", "weights_sha256": "6726825d" + "0" * 56, "resize": "bilinear"},
    "checkpoint": {"step": 800_000, "sha256": "cd" * 32, "weights": "ema"},
    "sampler": {"name": "ddim", "steps": 100, "eta": 0.0, "guidance": None},
    "nfe": 100,
    "seed": 0,
    "precision": "fp32",
    "created": "2026-11-26T17:17:32.624Z",
    "command": ["python"],
}
"""A score as they were before they were signed."""
NEW = {**OLD, "fid_interval": [4.15, 4.27], "dimensions": 2048}


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


# ---------------------------------------------------------------- whether one holds


def test_a_score_is_read_as_it_was_published(tmp_path: Path) -> None:
    path = publish_score(RunDir(tmp_path), "a", NEW)
    assert path == tmp_path / "eval" / "a.json" and read_score(path) == files.sign(NEW)


def test_a_score_with_any_bit_changed_is_damaged(tmp_path: Path) -> None:
    path = publish_score(RunDir(tmp_path), "a", NEW)
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 600):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert read_score(path) == files.sign(NEW)  # a blank that became another one
        except DamagedFile:
            pass


def test_a_score_from_before_they_were_signed_is_read_as_it_is(tmp_path: Path) -> None:
    assert read_score(write(tmp_path / "a.json", OLD)) == OLD


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({**files.sign(NEW), "fid": 2.0}, "self_sha256 does not match"),
        (NEW, "has no self_sha256"),
        ({**OLD, "fid": "4.2"}, "its fid is '4.2', no number"),
        ({**OLD, "fid": True}, "its fid is True"),
        ({**OLD, "fid": float("nan")}, "its fid is nan"),
        (files.sign({**NEW, "fid_interval": [4.1]}), "its fid_interval is [4.1]"),
        (files.sign({**NEW, "fid_interval": [4.1, "4.3"]}), "its fid_interval is [4.1, '4.3']"),
        (files.sign({**NEW, "fid_interval": 4.1}), "its fid_interval is 4.1"),
        ({k: v for k, v in OLD.items() if k != "fid"}, "it has no score"),
        ({k: v for k, v in OLD.items() if k != "num_samples"}, "its num_samples is None"),
        ({**OLD, "sampler": "ddim"}, "its sampler is 'ddim'"),
        ({**OLD, "reference": {}}, "its reference has no name"),
        ([OLD], "not a JSON object"),
        ("4.2", "not a JSON object"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"fid": 4.2', "not JSON"),
    ],
)
def test_what_does_not_hold_is_named_and_is_no_score(tmp_path: Path, value: Any, why: str) -> None:
    (tmp_path / "eval").mkdir()
    write(tmp_path / "eval" / "a.json", value)
    with pytest.raises(DamagedFile, match=rf"a.json: .*{re.escape(why)}"):
        read_score(tmp_path / "eval" / "a.json")
    (score,) = all_scores(RunDir(tmp_path))
    assert (score.name, score.record) == ("a", {}) and why in score.damage


def test_a_directory_in_a_scores_place_is_damage_and_makes_room(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (run.score("a") / "kept").mkdir(parents=True)
    assert "cannot be read" in scores_of(run, "a")[0].damage
    assert read_score(publish_score(run, "a", NEW)) == files.sign(NEW)
    assert [s.damage for s in all_scores(run)] == [""] and list(run.eval.glob("a.json.damaged-*/kept"))


def test_sets_of_which_one_is_called_like_the_others_file_lose_no_score(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    other = {**NEW, "reference": {"name": "b", "split": None}}
    kept = [publish_score(run, "q.json", NEW), publish_score(run, "q.json", other)]
    before = {path: path.read_bytes() for path in kept}
    mine = publish_score(run, "q", NEW)
    assert {path: path.read_bytes() for path in kept} == before
    assert [(s.name, s.damage) for s in all_scores(run)] == [
        ("q/train-inception", ""), ("q.json", ""), ("q.json/b-inception", "")
    ]  # fmt: skip
    assert publish_score(run, "q", NEW) == mine and [s.path for s in scores_of(run, "q")] == [mine]


def test_a_set_whose_further_scores_have_no_place_is_told_so(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    publish_score(run, "q", NEW)
    publish_score(run, "q.json", NEW)
    with pytest.raises(
        RequestError, match=r"q\.json is a score of set q, where further scores of set q\.json would lie"
    ):
        publish_score(run, "q.json", {**NEW, "seed": 1})
    assert [s.name for s in all_scores(run)] == ["q", "q.json"]
    assert [s.name for s in scores_of(run, "q.json")] == ["q.json"]


# ---------------------------------------------------------------- many of them


def test_every_score_of_a_set_has_a_file_and_none_is_overwritten(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    test = {"name": "cifar10", "split": "test", "num_images": 10_000, "digest": "ef" * 32}
    mine = {"name": "my statistics?/..", "split": None, "num_images": None, "digest": "01" * 32}
    several = [NEW, {**NEW, "reference": test}, {**NEW, "reference": mine}, {**NEW, "reference": test, "seed": 1}]
    paths = [publish_score(run, "ddim100-eta0.5", record) for record in several]
    relative = [str(p.relative_to(run.eval)) for p in paths]
    further = "ddim100-eta0.5/"
    assert relative[:3] == [
        "ddim100-eta0.5.json",
        f"{further}test-inception.json",
        f"{further}my-statistics-..-inception.json",
    ]
    assert relative[3].startswith(f"{further}test-inception-")
    assert [read_score(p) for p in paths] == [files.sign(r) for r in several]
    assert [publish_score(run, "ddim100-eta0.5", {**r, "created": "later"}) for r in several] == paths
    publish_score(run, "b", NEW)
    assert [s.path for s in all_scores(run)] == [run.score("b"), paths[0], paths[2], paths[1], paths[3]]


def test_a_run_without_scores_has_none(tmp_path: Path) -> None:
    assert all_scores(RunDir(tmp_path)) == [] and scores_of(RunDir(tmp_path), "a") == []


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "FID 4.21, ddim 100, 50,000 vs train"),
        ({"fid_interval": [3.8, 4.6]}, "FID 4.2, ddim 100, 50,000 vs train"),
        ({"fid": 4.2134, "fid_interval": [-46.0, 54.0]}, "FID 0, ddim 100, 50,000 vs train"),
        ({"num_samples": 5_000}, "FID 4.21 (under 10,000 samples), ddim 100, 5,000 vs train"),
        ({"num_samples": 600}, "FID 4.21 (fewer samples than the 2,048 dimensions), ddim 100, 600 vs train"),
        ({"reference": {"name": "b\x1b[2J", "split": None}}, r"FID 4.21, ddim 100, 50,000 vs b\x1b[2J"),
        (
            {"sampler": {"name": "ddim", "guidance": 1.5}, "nfe": 200},
            "FID 4.21, ddim 200 (guided 1.5), 50,000 vs train",
        ),
    ],
)
def test_a_score_says_what_it_is_of_and_no_more_than_it_means(changes: dict[str, Any], line: str) -> None:
    assert told({**NEW, **changes}) == line


def test_the_best_founded_score_comes_first_and_not_the_newest() -> None:
    """Each differs from the one before it in one thing that counts for less than those of the later ones."""
    step, test = {"checkpoint": {**OLD["checkpoint"], "step": 400_000}}, {**OLD["reference"], "split": "test"}
    fewer: list[dict[str, Any]] = [
        {},
        {"created": "2026-11-25T00:00:00.000Z"},
        {"nfe": 20, "created": "2026-11-28T00:00:00.000Z"},
        step,
        {"reference": test, "nfe": 1000},
        {"fid": None, "frechet_distance": 1.0},
        {"num_samples": 5000},
        {"fid": None, "bits_per_dim": 3.0, "num_samples": 60_000},
    ]
    scores = []
    for i, changes in enumerate(fewer):
        record = {key: value for key, value in {**OLD, **changes}.items() if value is not None}
        scores.append(Score(str(i), Path(f"{i}.json"), record))
    for seed in range(5):
        mixed = random.Random(seed).sample(scores, len(scores))
        assert best_founded_first(mixed, Evaluate()) == scores
    only = [score for score in scores if score.name in "04"]
    assert best_founded_first(only, Evaluate(reference="test"))[0].name == "4"
    assert best_founded_first(only, None) == only[::-1]  # of equal steps the one of more evaluations


def test_what_is_no_fid_is_not_called_so() -> None:
    other = {k: v for k, v in OLD.items() if k != "fid"}
    other |= {"frechet_distance": 165.287, "extractor": {"name": "pixels"}, "num_samples": 600}
    assert told(other) == (
        "Fréchet distance 165 (fewer samples than the 768 dimensions), ddim 100, 600 vs train, pixels features"
    )


def test_a_score_of_images_that_no_run_made_names_no_sampler() -> None:
    images = {k: v for k, v in NEW.items() if k not in ("sampler", "nfe", "checkpoint", "seed", "precision")}
    assert told({**images, "num_samples": 600}) == ("FID 4.21 (fewer samples than the 2,048 dimensions), 600 vs train")


@pytest.mark.parametrize(
    ("value", "uncertain_by", "shown"),
    [(3.1712, 0.043, "3.17"), (3.1712, 0.43, "3.2"), (317.12, 4.3, "317"), (317.12, 43.0, "320"), (0.0, None, "0.00")],
)
def test_numbers_are_shown_to_the_first_digit_that_is_uncertain(value: float, uncertain_by: float, shown: str) -> None:
    assert records.rounded(value, uncertain_by) == shown


def test_a_set_that_is_named_as_anothers_score_hides_no_score(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.eval.mkdir(parents=True)
    (run.eval / "q").mkdir()
    for path in ("q.json", "q/ref-pixels.json", "q.json.json"):  # the first is where further ones of q.json would lie
        write(run.eval / path, OLD)
    assert [score.name for score in all_scores(run)] == ["q", "q/ref-pixels", "q.json"]
    assert [score.name for score in scores_of(run, "q.json")] == ["q.json"]
