"""ddpm/run/generations.py: a checkpoint is whole, or is named and passed over; one function chooses."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import DoNotRetry, RequestError
from ddpm.run import generations
from ddpm.run.evidence import Incomplete
from ddpm.run.fence import Fence
from ddpm.run.files import DamagedFile, read_json, sign
from ddpm.run.paths import RunDir
from ddpm.run.state import finished_step
from tests.saves import Unreadable, flip_bit, save_all
from tests.training import Life, assert_same_end, live, make_config, make_run

# ---------------------------------------------------------------- damage


def truncate(run: RunDir) -> None:
    path = run.checkpoint(9)
    path.write_bytes(path.read_bytes()[:-1])


def manifest_of_another(run: RunDir) -> None:
    run.manifest(9).write_bytes(run.manifest(6).read_bytes())


def forged(run: RunDir) -> None:
    record = read_json(run.manifest(9))
    assert record is not None
    run.manifest(9).write_text(json.dumps({**record, "bytes": record["bytes"] + 1}))


def signed_without_digest(run: RunDir) -> None:
    run.manifest(9).write_text(json.dumps(sign({"step": 9, "file": run.checkpoint(9).name})))


DAMAGE = {
    "a flipped bit in the middle": (lambda run: flip_bit(run.checkpoint(9), 3000), "sha256 does not match"),
    "a flipped last bit": (lambda run: flip_bit(run.checkpoint(9), -1), "sha256 does not match"),
    "truncated": (truncate, "bytes instead of"),
    "empty": (lambda run: run.checkpoint(9).write_bytes(b""), "0 bytes instead of"),
    "no .pt": (lambda run: run.checkpoint(9).unlink(), "missing beside its manifest"),
    "a flipped bit in the manifest": (lambda run: flip_bit(run.manifest(9), 20), r"step-000000009\.json"),
    "an empty manifest": (lambda run: run.manifest(9).write_bytes(b""), "not JSON"),
    "a forged manifest": (forged, "self_sha256 does not match"),
    "the manifest of another step": (manifest_of_another, r"is the manifest of step-000000006\.pt"),
    "a manifest without its digest": (signed_without_digest, "bytes"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_generation_is_named_and_the_one_before_is_taken(run: RunDir, fence: Fence, kind: str) -> None:
    save_all(run, fence, 3, 6, 9)
    damage, reason = DAMAGE[kind]
    damage(run)
    said: list[str] = []
    good = generations.newest_good(run, said.append)
    assert good is not None and good.step == 6
    (line,) = said
    assert line.startswith("checkpoint rejected: step=9 reason=")
    assert re.search(reason, line), line


OWN = {"run_id": "a" * 32, "data": {"cache": "/none", "digest": "b" * 64}}
OTHERS = {
    "run_id": ({"run_id": "c" * 32}, rf"is of another run \(run_id {'a' * 12}, and run.json says {'c' * 12}\)"),
    "data_digest": ({"data": {"cache": "/none", "digest": "d"}}, r"is of a run on other images \(data_digest bb"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_of_another_run_is_refused_and_what_tells_of_none_taken(run: RunDir, fence: Fence, what: str) -> None:
    save_all(run, fence, 3)  # from before runs had an id
    run.run_json.write_text(json.dumps(OWN))
    save_all(run, fence, 6)
    manifest = read_json(run.manifest(6)) or {}
    assert (manifest["run_id"], manifest["data_digest"]) == ("a" * 32, "b" * 64)
    run.run_json.write_text(json.dumps({}))  # of an old run
    assert generations.verify(run, 6).step == 6
    other, why = OTHERS[what]
    run.run_json.write_text(json.dumps({**OWN, **other}))
    said: list[str] = []
    good = generations.newest_good(run, said.append)
    assert good is not None and good.step == 3 and re.search(why, said[0]), said
    with pytest.raises(RequestError, match=why):
        generations.choose(run, 6)
    assert finished_step(run, make_config(train__total_steps=6)) is None
    run.run_json.rename(aside := run.path / "aside")
    run.run_json.mkdir()  # which says nothing of the checkpoints
    assert generations.verify(run, 6).step == 6
    run.run_json.rmdir()
    aside.rename(run.run_json)
    run.manifest(3).unlink()
    run.checkpoint(3).unlink()
    with pytest.raises(Incomplete, match=why):
        generations.check_there(run)
    with pytest.raises(Incomplete, match=r"every checkpoint .* is damaged"):
        generations.newest_good(run, said.append)
    save_all(run, fence, 6)  # its own takes the place, and the other's is set aside
    assert generations.verify(run, 6).step == 6 and len(list((run.checkpoints / "set-aside").iterdir())) >= 2


def test_weights_to_start_from_and_a_run_json_that_knows_none_of_them_are_not_of_one_run(run: RunDir) -> None:
    run.run_json.write_text(json.dumps(OWN))
    run.start.write_bytes(b"weights")
    for look in (lambda: generations.newest_good(run, print), lambda: generations.check_there(run)):
        with pytest.raises(Incomplete, match=r"start\.safetensors is there, and .*run\.json says nothing"):
            look()
    run.start.unlink()
    began = dict.fromkeys(("source", "weights", "sha256", "start_sha256"), "x")
    run.run_json.write_text(json.dumps({**OWN, "from": began}))
    with pytest.raises(Incomplete, match=r"start\.safetensors is missing, and .*run\.json says that"):
        generations.check_there(run)


def test_a_checkpoint_that_was_read_ahead_is_not_read_again_unless_it_changed(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations.read_ahead(run)  # nothing is there
    save_all(run, fence, 3, 9)
    read: list[str] = []
    digest = generations.sha256_file
    monkeypatch.setattr(generations, "sha256_file", lambda path: read.append(path.name) or digest(path))
    generations.read_ahead(run)
    assert generations.verify(run, 9).step == 9 and read == ["step-000000009.pt"]
    assert generations.verify(run, 9).step == 9 and len(read) == 2
    generations.read_ahead(run)
    flip_bit(run.checkpoint(9), 3000)
    with pytest.raises(DamagedFile, match="sha256 does not match"):
        generations.verify(run, 9)
    generations.read_ahead(run)
    run.checkpoint(9).unlink()
    assert generations.newest_good(run, print) == generations.verify(run, 3)


def test_a_life_that_goes_on_holds_nothing_of_the_checkpoint_that_it_read(tmp_path: Path) -> None:
    config, run = make_config(), make_run(tmp_path)
    with Life(config, run) as life:
        life.train(stop_at=[5])
    with Life(config, run):
        assert str(run.checkpoints) not in Path("/proc/self/maps").read_text()


def test_a_pt_without_its_manifest_does_not_exist(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 3, 6)
    run.manifest(6).unlink()
    said: list[str] = []
    good = generations.newest_good(run, said.append)
    assert good is not None and good.step == 3 and said == []


def test_nothing_saved_is_no_error_and_all_damaged_is_do_not_retry(run: RunDir, fence: Fence) -> None:
    assert generations.newest_good(run, print) is None
    save_all(run, fence, 3, 6)
    for step in (3, 6):
        flip_bit(run.checkpoint(step), 100)
    said: list[str] = []
    with pytest.raises(DoNotRetry, match=r"every checkpoint .* is damaged \(2 rejected above\)"):
        generations.newest_good(run, said.append)
    assert len(said) == 2


@pytest.mark.parametrize("of", [RunDir.checkpoint, RunDir.manifest])
def test_a_generation_that_cannot_be_read_is_named_and_the_one_before_is_taken(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch, of: Any
) -> None:
    save_all(run, fence, 3, 6, 9)
    Unreadable(monkeypatch, {of(run, 9): 99})
    said: list[str] = []
    good = generations.newest_good(run, said.append)
    assert good is not None and good.step == 6
    (line,) = said
    assert line.startswith("checkpoint rejected: step=9 reason=") and "Input/output error" in line


def test_a_generation_that_can_be_read_at_the_second_try_is_good(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(run, fence, 3, 6)
    Unreadable(monkeypatch, {run.checkpoint(6): 1})
    said: list[str] = []
    good = generations.newest_good(run, said.append)
    assert good is not None and good.step == 6 and said == []


def test_where_nothing_can_be_read_a_later_life_may_try_again(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(run, fence, 3, 6)
    flip_bit(run.checkpoint(3), 100)
    Unreadable(monkeypatch, {run.checkpoint(6): 99})
    with pytest.raises(OSError, match="Input/output error"):
        generations.newest_good(run, lambda line: None)


def test_a_directory_that_cannot_be_listed_is_no_fresh_start(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    save_all(run, fence, 3)
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(f"os.{name}", refuse)
    with pytest.raises(PermissionError):
        generations.newest_good(run, print)


def test_a_run_with_a_damaged_checkpoint_ends_bit_identical(tmp_path: Path) -> None:
    config = make_config(checkpoint__every_steps=2)
    one, other = make_run(tmp_path / "whole"), make_run(tmp_path / "damaged")
    live(config, one)
    with Life(config, other) as life:
        life.train(stop_at=[5])
    flip_bit(other.checkpoint(5), 5000)
    flip_bit(other.manifest(4), 30)
    live(config, other)
    assert_same_end(one, other, 8)
    for step in other.steps_saved():
        generations.verify(other, step)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_at_0(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(), run) as life:
        life.train(stop_at=[5])
    flip_bit(run.checkpoint(5), 5000)
    before = run.metrics.read_bytes()
    with pytest.raises(DoNotRetry, match="every checkpoint"), Life(make_config(), run):
        pass
    assert run.metrics.read_bytes() == before


# ---------------------------------------------------------------- choosing one to read


def test_the_newest_good_one_is_read_unless_a_step_is_named(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 3, 6, 9)
    said: list[str] = []
    assert generations.choose(run, log=said.append).step == 9
    assert generations.choose(run, 3, said.append) == generations.verify(run, 3)
    flip_bit(run.checkpoint(9), 100)
    assert said == [] and generations.choose(run, log=said.append).step == 6
    (line,) = said
    assert line.startswith("checkpoint rejected: step=9 reason=")


def test_a_step_that_cannot_be_read_is_refused_with_those_that_can(run: RunDir, fence: Fence) -> None:
    with pytest.raises(generations.NothingSaved, match=r"run run has no checkpoint yet: train it first$"):
        generations.choose(run)
    with pytest.raises(generations.NothingSaved):
        generations.choose(run, 7)
    save_all(run, fence, 3, 6, 9)
    with pytest.raises(RequestError, match=r"run run has no checkpoint of step 7; it has \[3, 6, 9\]"):
        generations.choose(run, 7)
    flip_bit(run.checkpoint(6), 100)
    with pytest.raises(RequestError, match=r"the checkpoint of step 6 cannot be used: .*; others: \[9, 3\]"):
        generations.choose(run, 6)
    flip_bit(run.checkpoint(3), 100)
    with pytest.raises(RequestError, match=r"step 6 cannot be used: .*; others: \[9\]"):
        generations.choose(run, 6)
    flip_bit(run.checkpoint(9), 100)
    with pytest.raises(RequestError, match=r"step 6 cannot be used: .*; none of the others can be either"):
        generations.choose(run, 6)


def test_where_all_are_damaged_there_is_no_newest_to_read(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 3)
    flip_bit(run.checkpoint(3), 100)
    with pytest.raises(generations.NoneHolds, match="every checkpoint") as refused:
        generations.choose(run, log=lambda line: None)
    assert refused.value.run == run and refused.value.exit_code == 2


def test_what_was_made_of_a_checkpoint_is_compared_with_the_runs_own_of_that_step(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 1, 2)
    mine = (read_json(run.manifest(2)) or {})["sha256"]
    assert generations.of_another(run, 2, mine) == ""
    assert generations.of_another(run, 2, "0" * 64) == "is of another checkpoint than this run's step 2"
    assert generations.of_another(run, 7, mine) == generations.of_another(run, None, mine) == ""  # nothing to compare
    run.manifest(1).write_text("{}")
    assert generations.of_another(run, 1, "0" * 64) == ""
