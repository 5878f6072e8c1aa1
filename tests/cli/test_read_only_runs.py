"""A run that a user may read and not write: shown, sampled and scored into a root of their own, never trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.run.files import sign
from tests.cli.harness import TINY_SET, Shell, as_a_user, read, snapshot


@pytest.fixture
def theirs(again: Shell) -> Iterator[Path]:
    """The finished run, which nobody may write any more, nor its cache, where no reference was kept."""
    run, cache = again.root / "tiny", again.root / ".cache"
    record = read(run / "run.json")
    record["data"]["cache"] = str(cache / "data")
    del record["self_sha256"]
    (run / "run.json").write_text(json.dumps(sign(record)))
    shutil.rmtree(cache / "data" / "reference")
    (run / "samples" / TINY_SET / "request.json").unlink()
    everything = [run, cache, *run.rglob("*"), *cache.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield run
    for path in everything:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_it_is_sampled_and_scored_into_ones_own_root(again: Shell, theirs: Path, tmp_path: Path) -> None:
    before, own = snapshot(again.root), tmp_path / "own"
    local = ["--root", str(own), "--cluster", "local"]
    done = as_a_user(again, "sample", str(theirs), "--set", "mine", *local, "--dry-run")
    assert done.returncode == 0 and not own.exists(), done.stderr
    done = as_a_user(again, "sample", str(theirs), "--set", "mine", *local)
    assert done.returncode == 0 and f"goes to {own / 'tiny'}" in done.stdout, done.stdout + done.stderr
    first = read(theirs / "checkpoints" / "step-000000400.json")["sha256"]
    assert read(own / "tiny" / "samples" / "mine" / "request.json")["checkpoint"] == {"step": 400, "sha256": first}
    for run in (str(theirs), "tiny"):  # by its own name too, once it is there
        done = as_a_user(again, "evaluate", run, "--set", "mine", *local)
        assert done.returncode == 0 and '"frechet_distance"' in done.stdout, done.stdout + done.stderr
    shown = as_a_user(again, "status", "--root", str(own))
    assert "400/400" in shown.stdout and "2/2" in shown.stdout and len(shown.stdout.splitlines()) == 2, shown.stdout
    assert snapshot(again.root) == before


def test_a_place_for_its_results_that_cannot_be_written_is_named_with_what_to_give(
    again: Shell, theirs: Path, tmp_path: Path
) -> None:
    (closed := tmp_path / "closed").mkdir()
    closed.chmod(0o555)
    for root in (closed, closed / "runs"):
        done = as_a_user(again, "sample", str(theirs), "--set", "mine", "--cluster", "local", "--root", str(root))
        assert done.returncode == 2 and f"{root} cannot be written either: choose another" in done.stderr, done.stderr


def test_it_is_shown_and_not_sampled_where_it_lies(again: Shell, theirs: Path) -> None:
    done = as_a_user(again, "status")
    assert done.returncode == 0 and "complete" in done.stdout and len(done.stdout.splitlines()) == 2
    assert as_a_user(again, "board", "tiny", "--dry-run").returncode == 0
    done = as_a_user(again, "sample", "tiny", "--set", "mine", "--cluster", "local")
    assert done.returncode == 2 and "with --root a place of your own" in done.stderr


def test_it_is_neither_ended_nor_removed_by_another_and_a_sentence_says_why(again: Shell, theirs: Path) -> None:
    before = snapshot(again.root)
    for words in (["cancel", "tiny"], ["remove", "tiny"], ["remove", "tiny", "--yes"]):
        done = as_a_user(again, *words)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stdout + done.stderr
        assert "from here: " in done.stderr and f"{theirs} cannot be written" in done.stderr
    assert snapshot(again.root) == before


def test_it_is_not_trained_and_a_sentence_says_why(again: Shell, theirs: Path, tmp_path: Path) -> None:
    longer = ["train.total_steps=500", "--cluster", "local"]
    before, own = snapshot(again.root), tmp_path / "own"
    done = as_a_user(again, "submit", "tiny.yaml", *longer)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not trained" in done.stderr, done.stderr
    assert "cp -r " in done.stderr and "--from " in done.stderr
    as_a_user(again, "sample", str(theirs), "--set", "mine", "--root", str(own), "--prepare")
    done = as_a_user(again, "submit", "tiny.yaml", *longer, "--root", str(own))
    assert done.returncode == 2 and f"has the checkpoints of {theirs}" in done.stderr, done.stderr
    assert snapshot(again.root) == before


def test_a_job_that_finds_it_so_ends_with_a_sentence(again: Shell, theirs: Path) -> None:
    theirs.joinpath("config.yaml").chmod(0o644)
    text = theirs.joinpath("config.yaml").read_text()
    theirs.joinpath("config.yaml").write_text(text.replace("total_steps: 400", "total_steps: 500"))
    theirs.joinpath("config.yaml").chmod(0o444)
    before = snapshot(again.root)
    done = as_a_user(again, "jobs", "train", str(theirs))
    assert done.returncode == 78 and "not trained" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and snapshot(again.root) == before


def test_its_results_lack_nothing_that_is_made_where_it_is_trained(again: Shell, theirs: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    as_a_user(again, "sample", str(theirs), "--set", "mine", "--root", str(own), "--prepare")
    done = again("recover", str(own / "tiny"))
    assert done.returncode == 0 and f"it reads the checkpoints of {theirs}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("what", ["--rebuild", "--start-over"])
@pytest.mark.parametrize("told", [True, False], ids=["told by run.json", "told by its links alone"])
def test_it_is_recovered_where_it_lies_and_not_through_the_links_to_it(
    again: Shell, theirs: Path, tmp_path: Path, what: str, told: bool
) -> None:
    own = tmp_path / "own"
    as_a_user(again, "sample", str(theirs), "--set", "mine", "--root", str(own), "--prepare")
    manifest = theirs / "checkpoints" / "step-000000200.json"
    manifest.chmod(0o644)
    manifest.write_bytes(b"")
    if not told:
        (own / "tiny" / "run.json").unlink()
    before, here = snapshot(again.root), snapshot(own)
    done = again("recover", str(own / "tiny"), what)
    assert done.returncode == 2 and f"has the checkpoints of {theirs}" in done.stderr, done.stdout + done.stderr
    assert snapshot(again.root) == before and snapshot(own) == here


def test_one_that_was_trained_anew_with_other_mathematics_is_not_sampled_as_what_it_was(
    again: Shell, theirs: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    ask = ["--set", "mine", "--root", str(own), "--prepare"]
    assert as_a_user(again, "sample", str(theirs), *ask).returncode == 0
    record = {**read(theirs / "run.json"), "config_digest": "c" * 64}
    theirs.joinpath("run.json").chmod(0o644)
    theirs.joinpath("run.json").write_text(json.dumps(sign(record)))
    theirs.joinpath("run.json").chmod(0o444)
    for run in (str(theirs), "tiny"):
        done = as_a_user(again, "sample", run, *ask)
        assert done.returncode == 2 and str(own / "tiny") in done.stderr, done.stdout + done.stderr
        assert f"now {theirs} has cccccccccccc" in done.stderr, done.stderr


def test_a_copied_checkpoint_of_other_mathematics_is_refused_before_anything_is_asked_of_it(again: Shell) -> None:
    for path in (again.root / "tiny" / "checkpoints").glob("*.json"):
        path.write_text(json.dumps(sign({**read(path), "config_digest": "c" * 64})))
    assert "belongs to other mathematics" in again.refused("sample", "tiny", "--set", "new", "--cluster", "local")


def test_statistics_that_cannot_be_written_there_are_refused_before_any_work(again: Shell, theirs: Path) -> None:
    before = snapshot(again.root)
    for what in (["--images", str(theirs / "samples" / TINY_SET / "shard-00000-of-00002.npz")], [str(theirs)]):
        done = as_a_user(again, "evaluate", *what, "--extractor", "pixels", "--root", str(again.root),
                         "--save-stats", str(theirs / "stats.npz"))  # fmt: skip
        assert done.returncode in (2, 3) and "features of" not in done.stderr, done.stdout + done.stderr
        if what[0] == "--images":
            assert f"{theirs / 'stats.npz'}: lies in run tiny; name a place outside of runs" in done.stderr, done.stderr
    assert snapshot(again.root) == before
