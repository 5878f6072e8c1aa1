"""Runs of an earlier commit, killed or finished there, go on under this one and end as they would have there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.compat.harness import (
    ABSOLUTE,
    FIXTURE,
    IMAGES,
    LEVELS,
    RELATIVE,
    Machine,
    metrics,
    read,
    results,
    score,
    shards,
)
from tests.compat.text import with_runs
from tests.conftest import requires


def assert_near(found: Any, expected: Any, where: str) -> None:
    """The same but for floats, which may differ a little, and the digests of tensors."""
    if isinstance(expected, list) and len(expected) == 2 and isinstance(expected[0], str):
        found, expected = found[1], expected[1]  # a tensor's digest and norm
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_near(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_near(mine, theirs, f"{where}/{i}")
    else:
        assert found == expected, where


def check_training(run: Path, step: int, expected: dict[str, Any], exact: bool) -> None:
    """The end of a training: every tensor and number of its state, every line of metrics, and the files there are."""
    found = json.loads(json.dumps(results(run, step)))
    assert found["files"] == expected["files"]
    assert found["state"]["tensors"].keys() == expected["state"]["tensors"].keys()
    assert found["state"]["values"].keys() == expected["state"]["values"].keys()
    if exact:
        tensors = expected["state"]["tensors"]
        assert [k for k, described in found["state"]["tensors"].items() if described != tensors[k]] == []
        assert found == expected
        return
    for part in ("tensors", "values"):
        for key, value in expected["state"][part].items():
            assert_near(found["state"][part][key], value, key)
    assert_near(found["metrics"], expected["metrics"], "metrics")


# ---------------------------------------------------------------- training


MASKS = "import torch; torch.manual_seed(5); print(*torch.empty(24).bernoulli_(0.5).int().tolist(), sep='')"
"""The killed run drops out by torch's own generator, as the code of its time did: other torch, other masks."""


def test_a_run_that_the_old_code_was_killed_in_ends_as_if_it_had_gone_on(
    request: pytest.FixtureRequest, untouched: Machine, expected: dict[str, Any], exact: bool
) -> None:
    same = untouched("-c", MASKS).stdout.strip() == "011110000111011111000111"
    requires(same, "its dropout masks are those of another torch", "run it with the fixture's")
    trained = request.getfixturevalue("trained")
    check_training(trained, 50, expected["killed"], exact)


def test_it_goes_on_from_the_old_checkpoint_and_keeps_the_lines_before_it(trained: Path) -> None:
    lines = (line for path in (trained / "events").glob("*") for line in path.read_text().splitlines())
    lives = sorted((e["time"], e["event"], e["step"]) for e in map(json.loads, lines) if "step" in e)
    began = [(event, step) for _, event, step in lives if event in ("started", "resumed", "finished")]
    assert began == [("started", 0), ("resumed", 26), ("finished", 50)]
    old = metrics(FIXTURE / "killed")
    assert old[-1]["step"] == 28 and metrics(trained)[:6] == old[:6]


def test_a_run_that_the_old_code_finished_is_extended_to_where_the_old_code_would_have_come(
    extended: Path, expected: dict[str, Any], exact: bool
) -> None:
    check_training(extended, 30, expected["sampled"], exact)


# ---------------------------------------------------------------- sampling and scoring


def test_a_half_made_sample_set_is_finished_with_the_images_it_would_have_had(completed: Path, exact: bool) -> None:
    made = shards(completed, "half")
    with np.load(FIXTURE / "half.npz") as theirs:
        assert list(made) == list(theirs)
        for first, (name, shard) in zip(range(0, 20, 5), made.items(), strict=True):
            images = shard["images"]
            assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 3)
            assert shard["first"] == first and shard["labels"].tolist() == [-1] * 5
            if exact:
                assert images.tobytes() == theirs[name].tobytes(), name
            assert np.abs(images.astype(int) - theirs[name]).max() <= LEVELS, name


@pytest.mark.parametrize("name", ["shard-00000-of-00004", "shard-00001-of-00004"])
def test_shards_that_were_there_are_left_alone(completed: Path, name: str) -> None:
    for suffix in (".npz", ".json"):
        old = FIXTURE / "sampled" / "samples" / "half" / f"{name}{suffix}"
        assert (completed / "samples" / "half" / old.name).read_bytes() == old.read_bytes()


def test_a_finished_batch_of_an_unfinished_shard_is_good_enough_to_be_used(completed: Path) -> None:
    assert list((FIXTURE / "sampled" / "samples" / "half" / "part").glob("*.npz"))
    told = "".join(path.read_text() for path in (completed / "logs").iterdir())
    assert "shard done shard=2/4" in told and "damaged" not in told
    assert not (completed / "samples" / "half" / "part").exists()


def check_score(found: dict[str, Any], expected: dict[str, Any], exact: bool) -> None:
    """All that a score of the old code said stands in one of this code's, in its words; but of singular covariances, as
    with fewer samples than dimensions, it knew the distance to 1e-8 only."""
    found = {key: found[key] for key in expected}
    if exact:
        assert found["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-7)
        assert json.dumps({**found, "frechet_distance": expected["frechet_distance"]}) == json.dumps(expected)
    assert_near(found, expected, "score")


def test_the_score_of_the_finished_set_is_the_old_one(completed: Path, expected: dict[str, Any], exact: bool) -> None:
    check_score(score(completed, "half"), expected["score"], exact)


def test_a_set_that_was_scored_is_given_the_same_score_again(completed: Path, exact: bool) -> None:
    old = {k: v for k, v in read(FIXTURE / "sampled" / "eval" / "small.json").items() if k != "created"}
    check_score(score(completed, "small"), old, exact)


def test_a_finished_run_whose_images_have_moved_is_scored_once_it_is_told_where_to(tmp_path: Path) -> None:
    machine = with_runs(tmp_path / "machine")
    run, there = machine.root / "sampled", tmp_path / "there.zip"
    (machine.home / IMAGES.name).rename(there)
    lost = machine("launch/evaluate.py", "sampled", "--set", "small", "--reference", "test", check=False)
    assert lost.returncode == 2 and f"python launch/submit.py {run} data.path=THERE" in lost.stderr, lost.stderr
    told = machine("launch/submit.py", str(run), f"data.path={there}", "--cluster", "local").stdout
    assert f"its config changes: data.path={there} (it was " in told and "is complete" in told, told
    assert str(there) in (run / "config.yaml").read_text()
    assert "its config changes" not in machine("launch/submit.py", str(run), "--cluster", "local").stdout
    machine("launch/evaluate.py", "sampled", "--set", "small", "--reference", "test", "--cluster", "local", "--dry-run")


# ---------------------------------------------------------------- what scripts of users read


@pytest.mark.parametrize("name", ["killed", "sampled"])
def test_status_tells_of_an_old_run_as_before(untouched: Machine, name: str) -> None:
    (status,) = json.loads(untouched("launch/status.py", name, "--json").stdout)
    last, whole = metrics(FIXTURE / name)[-1], name == "sampled"
    assert status["name"] == name and status["path"] == str(untouched.root / name)
    assert status["state"] == ("complete" if whole else "ended")
    assert status["problem"] is None if whole else "has given no sign of life since 2026" in status["problem"]
    assert (status["step"], status["saved_step"], status["total_steps"]) == ((20, 20, 20) if whole else (26, 26, 50))
    assert (status["loss"], status["epoch"], status["host"]) == (last["loss"], last["epoch"], "n1")
    assert status["samples"] == ({"half": "2/4", "small": "2/2"} if whole else {})
    small = read(FIXTURE / "sampled" / "eval" / "small.json")
    scored = {"small": {key: small[key] for key in ("frechet_distance", "num_samples")}}
    assert status["scores"] == (scored if whole else {})


def test_the_library_loads_an_old_run_and_samples_its_old_images(untouched: Machine, exact: bool) -> None:
    out = untouched.home / "images.npy"
    code = (
        "import sys, numpy, torch, ddpm; torch.set_num_threads(1); model = ddpm.load(sys.argv[1]); "
        "numpy.save(sys.argv[2], model.sample(6, sampler='ancestral', batch=3, seed=0))"
    )
    untouched("-c", code, str(untouched.root / "sampled"), str(out))
    old = np.concatenate([shard["images"] for shard in shards(FIXTURE / "sampled", "small").values()])
    assert np.abs(np.load(out).astype(int) - old).max() <= (0 if exact else LEVELS)
