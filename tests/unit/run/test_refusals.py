"""What the rooms that save and fence do where the system refuses something, or somebody has been at their files."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.errors import NodeUnfit, RequestError, RunBusy, RunGone
from ddpm.run import files, generations, saving, unfinished
from ddpm.run.evidence import Incomplete
from ddpm.run.fence import Fence
from ddpm.run.files import DamagedFile, HashingFile, write_json
from ddpm.run.owners import not_ours
from ddpm.run.paths import RunDir
from ddpm.run.saving import HostCopy
from ddpm.run.state import finished_step
from launch.terminal import faults
from tests.saves import flip_bit, save_all, saver, state_at
from tests.training import make_config

OWNER = {"job": "18", "restart": 0, "host": "n2"}


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """os.open of files of that name fails."""
    real = os.open

    def opened(path: Any, *args: Any, **options: Any) -> int:
        if Path(os.fsdecode(path)).name == name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", opened)


# ---------------------------------------------------------------- the fence


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_run_that_may_not_be_written_here_is_refused_by_what_may_not_and_another_node_may_be_tried(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, "lock", number)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        Fence(run, OWNER, wait_s=0)
    known = faults.of_a_job(error.value, run.path)
    assert isinstance(known, NodeUnfit) and str(run.lock) in str(known)


def test_a_disk_that_fails_for_now_is_no_refusal(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "lock", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        Fence(run, OWNER, wait_s=0)


def test_a_long_wait_is_said_once_and_a_holder_without_a_name_is_another_process(run: RunDir, fence: Fence) -> None:
    run.lock.write_bytes(b"\xff half a name")
    said: list[str] = []
    with pytest.raises(RunBusy, match="run run is held by another process"):
        Fence(run, OWNER, wait_s=1.2, log=said.append)
    assert said == ["lock: held by another process; waiting up to 1 s"]


def test_a_moved_run_is_said_to_be_one_where_nobody_knows_whereto(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(path: Path) -> Path:
        raise OSError(errno.ENOENT, "no /proc here")

    monkeypatch.setattr(Path, "readlink", unknown)
    run.path.rename(run.path.with_name("moved"))
    with pytest.raises(RunGone, match="while this job had it: nothing is"):
        fence.check()


def test_a_number_that_others_took_and_gave_up_meanwhile_is_not_taken_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def opened(path: Any, *args: Any, **options: Any) -> int:
        if Path(os.fsdecode(path)).name == ".fence-1":
            run.fence.write_text("3\n")  # by whoever came third, and has removed the claims before its own
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    late = Fence(run, OWNER, wait_s=0)
    assert late.token == 4
    late.release()


# ---------------------------------------------------------------- files


def test_a_refused_write_says_why_whatever_is_made_of_it() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        out = HashingFile(full)
        with pytest.raises(OSError, match="No space left"):
            out.write(b"x")
    assert isinstance(out.failed, OSError) and out.failed.errno == errno.ENOSPC


def test_a_file_is_not_published_into_a_directory_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_bytes(tmp_path / "gone" / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_directory_is_named_with_its_owner_and_what_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not_ours(tmp_path / "no" / "such" / "file") == ""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    said = not_ours(tmp_path / "no" / "such" / "file")
    assert said.startswith(f"{tmp_path} belongs to ") and "this is uid 54321" in said
    assert f"chmod -R g+rwX {tmp_path}" in said
    tmp_path.chmod(0o770)
    monkeypatch.setattr(os, "getegid", lambda: 54321)
    monkeypatch.setattr(os, "getgroups", list)
    said = not_ours(tmp_path / "file")
    assert "is not in its group " in said and "chmod" not in said


def test_where_nothing_can_be_looked_at_nobody_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path, **_: Any) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as m:
        m.setattr(Path, "stat", unknown)
        assert not_ours(tmp_path / "file") == ""


def test_a_record_nested_beyond_all_sense_has_no_digest_and_is_damaged() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(DamagedFile, match="nested too deep"):
        files.sha256_json(nested)


# ---------------------------------------------------------------- generations


def test_a_look_at_sizes_refuses_a_run_of_which_nothing_can_be_good(run: RunDir, fence: Fence) -> None:
    generations.check_there(run)  # nothing was ever saved
    save_all(run, fence, 1, 2, 3)
    generations.check_there(run)
    flip_bit(run.manifest(3), 40)
    run.checkpoint(2).unlink()
    generations.check_there(run)  # the first one looks whole
    os.truncate(run.checkpoint(1), 10)
    with pytest.raises(Incomplete, match=r"no checkpoint in .* is whole \(3 have a manifest\)"):
        generations.check_there(run)


def test_a_run_without_a_checkpoint_is_not_finished(run: RunDir) -> None:
    assert finished_step(run, make_config()) is None


# ---------------------------------------------------------------- saving


def test_a_copy_of_a_state_on_a_gpu_is_whole_when_it_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    HostCopy().take({"w": torch.ones(2)})
    assert waited == [True]


def test_what_stops_a_write_inside_of_torchs_own_is_told_as_what_it_is(run: RunDir, fence: Fence) -> None:
    s = saver(run, fence)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            s.save({**state_at(1), "extra": {"large": torch.ones(100_000)}}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    s.save(state_at(2), wait=True)
    assert run.steps_saved() == [2]


def test_where_no_thread_can_be_started_a_save_is_written_all_the_same(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    said: list[str] = []
    s = saver(run, fence, said)
    with monkeypatch.context() as m:
        m.setattr(threading.Thread, "start", none_left)
        s.save(state_at(1))
        s.save(state_at(2), wait=True)
    s.save(state_at(3), wait=True)
    assert run.steps_saved() == [3, 2, 1]
    assert said[0] == "checkpoint: step=1 is written by no thread of its own: can't start new thread"


def test_a_thread_that_dies_before_it_writes_has_not_saved(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = saver(run, fence)
    with monkeypatch.context() as m:
        m.setattr(threading.Thread, "run", lambda thread: None)
        with pytest.raises(OSError, match="did not come to an end"):
            s.save(state_at(1), wait=True)
    s.save(state_at(2), wait=True)
    assert run.steps_saved() == [2]


class Unsaveable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


def test_a_state_that_cannot_be_saved_is_no_failed_write(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PLAIN", (*saving.PLAIN, Unsaveable))
    s = saver(run, fence)
    with pytest.raises(RuntimeError, match="not to be pickled"):
        s.save({**state_at(1), "extra": {"odd": Unsaveable()}}, wait=True)
    s.save(state_at(2), wait=True)
    assert run.steps_saved() == [2] and not run.checkpoint(1).exists()


def test_a_set_whose_request_is_gone_frees_nothing(run: RunDir, fence: Fence) -> None:
    said: list[str] = []
    sample_set = run.sample_set("set")
    sample_set.path.mkdir(parents=True)
    sample_set.shard(0, 2).write_bytes(b"of a checkpoint that nobody can name")
    save_all(run, fence, 1, 2, 3, 4, 5, log=said)
    assert sorted(run.steps_saved()) == [1, 2, 3, 4, 5]
    assert sum("missing beside what was made of it" in line for line in said) == 1


def test_a_set_that_is_not_begun_and_a_request_of_no_checkpoint_keep_nothing(run: RunDir, fence: Fence) -> None:
    run.sample_set("empty").path.mkdir(parents=True)
    body = {"checkpoint": None}
    run.sample_set("set").path.mkdir(parents=True)
    write_json(run.sample_set("set").request, {**body, "digest": files.sha256_json(body)})
    save_all(run, fence, 1, 2, 3, 4, 5)
    assert run.steps_saved() == [5, 4, 3]


def test_a_sign_that_says_nothing_is_no_saves(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 1)
    run.checkpoint(2).write_bytes(b"somebody's")
    (run.checkpoints / f"{unfinished.SIGN}step-000000002.7").write_bytes(b"\xff")
    save_all(run, fence, 3)
    assert (run.checkpoints / unfinished.ASIDE / "step-000000002.pt").read_bytes() == b"somebody's"


def test_a_sign_that_cannot_be_read_is_no_saves(run: RunDir, fence: Fence) -> None:
    """What lies beside it then is moved aside, and not removed."""
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / ".saving-step-000000004.1").mkdir()
    assert [(sign.step, sign.is_ours) for sign in unfinished.signs(run)] == [(4, False)]


def test_a_checkpoint_of_other_mathematics_is_refused_and_one_that_does_not_say_is_not(run: RunDir) -> None:
    for saved in ({"config_digest": "ab" * 32}, {}):
        generations.check_mathematics(run.checkpoint(3), saved, "ab" * 32)
    with pytest.raises(RequestError, match=r"step-000000003\.pt belongs to other mathematics"):
        generations.check_mathematics(run.checkpoint(3), {"config_digest": "cd" * 32}, "ab" * 32)


def test_a_record_beyond_all_sense_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="more than"):
        files.parse_json(b" " * (files.RECORD_BYTES + 1))
