"""launch/terminal/side_by_side.py: what differs, the best first, and no two scores ranked that mean other things."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ddpm.config import reading
from ddpm.errors import RequestError
from ddpm.run.events import EventLog
from ddpm.run.paths import RunDir
from launch.terminal import console, side_by_side
from tests.cli.harness import TINY


def made(
    root: Path, name: str, *words: str, losses: tuple[float, ...] = (), scores: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None, validation: float | None = None,
    made_otherwise: dict[str, dict[str, Any]] | None = None,
) -> RunDir:  # fmt: skip
    """A run of these words with a line of metrics for each loss, and scores: set -> (value, number of samples);
    made_otherwise: set -> what its record says instead."""
    run = RunDir(root / name)
    run.eval.mkdir(parents=True)
    run.config.write_text(reading.of_text(TINY, Path("tiny.yaml"), [f"name={name!r}", *words]).to_yaml())
    run.run_json.write_text(json.dumps(record or {}))
    lines = [{"step": 20 * k, "time": "2026-11-27T00:00:00.000Z", **dict.fromkeys(("epoch", "grad_norm", "lr",
              "images_per_s"), 1.0), "loss": loss} for k, loss in enumerate(losses, 1)]  # fmt: skip
    if validation is not None:
        lines[-1]["validation_loss"] = validation
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for set_name, (value, num) in (scores or {}).items():
        of = {"reference": {"name": "digits", "split": "train", "digest": "d"}, "extractor": {"name": "inception"},
              "sampler": {"name": "ddim"}, "num_samples": num, "nfe": 4}  # fmt: skip
        run.score(set_name).write_text(json.dumps({"fid": value, **of, **(made_otherwise or {}).get(set_name, {})}))
    return run


def test_runs_that_do_not_have_the_same_code_are_told_apart(tmp_path: Path) -> None:
    runs = [made(tmp_path, name) for name in ("a", "b", "c")]
    for run, digest in zip(runs, ("1" * 16, "1" * 16, "2" * 16), strict=True):
        assert not any("same code" in line for line in side_by_side.page(side_by_side.rows(runs), 200))
        EventLog(run, "17", 0, "n1", prefix="submit-").append("submitted", stage="train", code=digest)
    told = f"not all have the same code: {'1' * 16} (a, b); {'2' * 16} (c)"
    assert told in side_by_side.page(side_by_side.rows(runs), 200)


def test_runs_are_sorted_by_score_then_loss_with_the_keys_alone_that_differ(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "bad", "train.lr=1e-3", losses=(0.5,), scores={"a": (9.0, 50_000)}),
        made(tmp_path, "unscored", "train.lr=4e-3", losses=(9.0, *[0.3] * 10)),
        made(
            tmp_path,
            "good",
            "train.lr=2e-3",
            losses=(0.9,),
            scores={"a": (3.0, 50_000), "b": (4.0, 50_000)},
            validation=0.0456,
        ),
        made(tmp_path, "few", "train.lr=2e-3", losses=(0.4,), scores={"c": (1.0, 100)}),
        made(tmp_path, "none", "model.channel_mults=[1,2]"),
    ]
    rows = side_by_side.rows(runs)
    assert [row["name"] for row in rows] == ["good", "bad", "unscored", "few", "none"]
    assert json.loads(json.dumps(rows)) == rows
    assert [row["differs"] for row in rows[::4]] == [
        {"model.channel_mults": [1], "train.lr": 2e-3}, {"model.channel_mults": [1, 2], "train.lr": 1e-3}
    ]  # fmt: skip
    good, _, unscored, few, none = rows
    assert (good["score"]["set"], good["score"]["value"], sorted(good["scores"])) == ("a", 3.0, ["a", "b"])
    assert good["score"]["ranked"] and not few["score"]["ranked"] and unscored["score"] is None
    assert (unscored["loss"], unscored["step"], none["loss"]) == (pytest.approx(0.3), 220, None)
    page = side_by_side.page(rows, 200)
    assert page[0].split() == ["run", "channel_mults", "lr", "step", "mean", "loss", "validation", "loss", "score"]
    assert good["validation_loss"] == 0.0456 and "  0.0456  " in page[1]
    assert "FID 3.00, a" in page[1] and any(x.startswith("few: FID 1.00, (fewer") for x in page)
    page = side_by_side.page([good], 200)
    assert page[1].endswith("FID 3.00, a") and "score: ddim 4, 50,000 vs train" in page


@pytest.mark.parametrize("otherwise", [
    {"sampler": {"name": "ancestral"}, "nfe": 1000}, {"nfe": 1000}, {"sampler": {"name": "ddim", "eta": 1.0}},
    {"sampler": {"name": "ddim", "guidance": 2.0}}, {"sampler": {"name": "ddim", "class_plan": [10, 90]}},
    {"num_samples": 10_000}, {"extractor": {"name": "pixels"}},
    {"reference": {"name": "digits", "split": "test", "digest": "e"}},
    {"checkpoint": {"step": 60, "weights": "model"}},
])  # fmt: skip
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_only_scores_made_alike_share_the_column(tmp_path: Path, width: int, otherwise: dict[str, Any]) -> None:
    runs = [
        made(tmp_path, "a", "seed=1", scores={"fast": (166.0, 50_000)}),
        made(tmp_path, "b", "seed=2", scores={"fast": (192.0, 50_000)}),
        made(tmp_path, "mine", scores={"paper": (14.0, 50_000)}, made_otherwise={"paper": otherwise}),
        made(
            tmp_path,
            "both",
            scores={"paper": (13.0, 50_000), "fast": (170.0, 50_000)},
            made_otherwise={"paper": otherwise},
        ),
    ]
    rows = side_by_side.rows(runs)
    assert [(row["name"], row["score"]["value"], row["score"]["ranked"]) for row in rows] == [
        ("a", 166.0, True), ("both", 170.0, True), ("b", 192.0, True), ("mine", 14.0, False)
    ]  # fmt: skip
    page = side_by_side.page(rows, width)
    of_mine = next(i for i, line in enumerate(page) if line.startswith("mine: "))
    assert "14.0" not in " ".join(page[:of_mine]) and "score: ddim 4, 50,000 vs train" in page
    assert "mine: FID 14.0" in page[of_mine] and "made otherwise" in re.sub(r"\s+", " ", " ".join(page[of_mine:]))


def test_losses_of_different_kinds_are_not_ranked_and_the_page_says_why(tmp_path: Path) -> None:
    runs = [made(tmp_path, loss, f"diffusion.loss={loss}", losses=(of,)) for loss, of in (("l1", 0.2), ("l2", 0.1))]
    rows = side_by_side.rows(runs)
    assert [row["name"] for row in rows] == ["l1", "l2"]
    assert side_by_side.page(rows, 120)[-1].endswith("not ranked: what is summed depends on diffusion.loss")
    same = [
        made(tmp_path, v, f"diffusion.variance={v}", losses=(of,)) for v, of in (("fixed_large", 2), ("fixed_small", 1))
    ]
    assert [row["name"] for row in side_by_side.rows(same)] == ["fixed_small", "fixed_large"]
    assert "not ranked" not in side_by_side.which_loss(side_by_side.rows(same))


def test_scores_losses_and_what_a_model_follows_from_have_room_before_the_rest(tmp_path: Path) -> None:
    words = ["train.lr=4e-3", "sample.steps=5", "sample.batch=4", "checkpoint.keep_last=2", "evaluate.reference=test"]
    came = {"from": {"source": "/runs/mine", "step": 300, **dict.fromkeys(("weights", "sha256", "start_sha256"), "x")}}
    runs = [
        made(tmp_path, "a-run-with-a-name", losses=(0.5,), scores={"s": (3.0, 50_000)}),
        made(tmp_path, "b", *words, losses=(0.5,), scores={"s": (4.0, 50_000)}, record=came),
    ]
    page = side_by_side.page(side_by_side.rows(runs), 75)
    assert page[0].split() == ["run", "lr", "from", "step", "mean", "loss", "score"] and "mine@300" in page[2]
    wide = side_by_side.page(side_by_side.rows(runs), 200)[0]
    assert "sample.steps" in wide and " steps" not in wide.replace("sample.steps", "")
    assert "no room for" in " ".join(page) and "sample.batch" in " ".join(page)


def test_a_score_of_another_step_than_the_runs_says_so(tmp_path: Path) -> None:
    of = {"early": {"checkpoint": {"step": 20, "weights": "ema"}}}
    runs = [made(tmp_path, "a", losses=(0.5,) * 3, scores={"early": (3.0, 100)}, made_otherwise=of)]
    assert side_by_side.page(side_by_side.rows(runs), 80)[1].endswith("FID 3.00 at step 20, early")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_what_has_no_room_is_told(tmp_path: Path, width: int) -> None:
    path = ["data.name=images", f"data.path=/{'x' * 300}"]
    runs = [
        made(tmp_path, "a", "diffusion.loss=l1", scores={"a-set-of-some-length": (3.0, 100)}),
        made(tmp_path, "b", *path),
    ]
    page = side_by_side.page(side_by_side.rows(runs), width)
    assert max(map(len, page)) <= width and "diffusion.loss" in " ".join(page) and "data.path"[5:] in " ".join(page)


def test_a_run_that_cannot_be_read_is_in_the_table_and_told(tmp_path: Path) -> None:
    runs = [made(tmp_path, "a", losses=(0.5,)), made(tmp_path, "b", "seed=1")]
    runs[1].config.write_text("{")
    rows = side_by_side.rows(runs)
    assert [row["name"] for row in rows] == ["a", "b"] and rows[1]["differs"] == {} and "YAML" in rows[1]["problem"]
    assert any(line.startswith("b: ") for line in side_by_side.page(rows, 80))


def test_a_word_names_a_run_or_those_of_a_pattern_or_of_a_sweep(tmp_path: Path) -> None:
    of = {"sweep": {"name": "s-lr", "values": {}}}
    for name, record in (("s", None), ("s-lr_1", of), ("s-lr_2", of), ("other", None)):
        made(tmp_path, name, record=record)

    def found(*words: str) -> list[str]:
        return [run.name for run in console.find_runs(words, str(tmp_path))]

    assert found("s-lr") == ["s-lr_1", "s-lr_2"] and found("s*", "other", "s") == ["s", "s-lr_1", "s-lr_2", "other"]
    with pytest.raises(RequestError, match="no run 'x"):
        found("s", "x*")
    with pytest.raises(RequestError, match=r"and the sweeps s-lr .*did you mean s-lr"):
        found("s-l")
