"""ddpm/run/fence.py: one writer per run, whoever else believes to be it."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ddpm.errors import RunBusy, RunGone
from ddpm.run import fence as fence_module
from ddpm.run import files
from ddpm.run.fence import Fence
from ddpm.run.paths import RunDir

OWNER = {"job": "17", "restart": 1, "host": "n1"}


def test_tokens_count_up(run: RunDir) -> None:
    tokens = []
    for _ in range(3):
        fence = Fence(run, OWNER, wait_s=0)
        tokens.append(fence.token)
        fence.check()
        fence.release()
    assert tokens == [1, 2, 3] and run.fence.read_text() == "3\n"


@pytest.mark.parametrize("there", ["", "x", "1" * 300, "1" * 9000])
def test_a_counter_that_is_no_number_or_beyond_all_bounds_begins_again(run: RunDir, there: str) -> None:
    run.fence.write_text(there)
    fence = Fence(run, OWNER, wait_s=0)
    assert fence.token == 1
    fence.check()
    fence.release()


def test_a_second_holder_waits_and_is_then_told_who_holds_the_run(run: RunDir, fence: Fence) -> None:
    said: list[str] = []
    with pytest.raises(RunBusy, match=rf"held by job 17 \(restart 1\) on n1, pid {os.getpid()};.*end it: cancel this"):
        Fence(run, {"job": "18"}, wait_s=0.6, how_to_end="cancel this", log=said.append)
    assert len(said) == 1 and "waiting up to" in said[0]
    fence.check()  # the first one has not been fenced out


def test_a_lock_that_is_one_file_with_another_runs_is_said_to_be_and_can_be_removed(run: RunDir, fence: Fence) -> None:
    copy = RunDir(run.path.with_name("copy"))
    shutil.copytree(run.path, copy.path, copy_function=os.link)
    with pytest.raises(RunBusy, match=f"one lock with run {run.path}, .*job 17 .* has it .*rm {copy.lock}"):
        Fence(copy, {"job": "18"}, wait_s=0)
    with pytest.raises(RunBusy, match="held by job 17"):
        Fence(run, {"job": "18"}, wait_s=0)
    copy.lock.unlink()
    theirs = Fence(copy, {"job": "18"}, wait_s=0)
    theirs.check()
    fence.check()  # neither is in the other's way
    theirs.release()


def test_a_lock_that_is_let_go_while_another_waits_is_theirs(run: RunDir) -> None:
    first = Fence(run, OWNER, wait_s=0)
    threading.Timer(0.3, first.release).start()
    second = Fence(run, {"job": "18"}, wait_s=20, log=lambda line: None)
    assert second.token == first.token + 1
    with pytest.raises(RunBusy):
        first.check()
    second.release()


def test_an_orphan_is_asked_about_by_name_and_fenced_out(run: RunDir, fence: Fence) -> None:
    asked: list[dict[str, Any]] = []

    def orphan(owner: dict[str, Any]) -> bool:
        asked.append(owner)
        return True

    heir = Fence(run, {**OWNER, "restart": 2}, wait_s=0, is_orphan=orphan, log=lambda line: None)
    assert asked == [{**OWNER, "pid": os.getpid(), "run": str(run.path)}]
    heir.check()
    with pytest.raises(RunBusy, match="taken over by a later job"):
        fence.check()
    heir.release()


def test_an_earlier_life_of_the_same_job_is_asked_about_at_once(run: RunDir, fence: Fence) -> None:
    began = time.monotonic()
    heir = Fence(run, {**OWNER, "restart": 2}, wait_s=300, is_orphan=lambda owner: True, log=lambda line: None)
    assert time.monotonic() - began < 30
    heir.release()


def test_another_job_is_asked_about_when_it_has_had_its_time(run: RunDir, fence: Fence) -> None:
    asked: list[float] = []

    def orphan(_: dict[str, Any]) -> bool:
        asked.append(time.monotonic())
        return True

    began = time.monotonic()
    heir = Fence(run, {**OWNER, "job": "18"}, wait_s=0.8, is_orphan=orphan, log=lambda line: None)
    assert len(asked) == 1 and asked[0] - began >= 0.8
    heir.release()


def test_an_heir_has_the_lock_as_soon_as_the_orphan_has_ended(run: RunDir, fence: Fence) -> None:
    heir = Fence(run, {**OWNER, "restart": 2}, wait_s=0, is_orphan=lambda owner: True, log=lambda line: None)
    heir.check()
    fence.release()
    heir.check()
    with pytest.raises(RunBusy, match=r"held by job 17 \(restart 2\)"):
        Fence(run, {"job": "18"}, wait_s=0, log=lambda line: None)
    heir.check()
    heir.release()


def test_an_orphan_that_was_fenced_out_does_not_take_the_lock_back(run: RunDir, fence: Fence) -> None:
    options: dict[str, Any] = {"wait_s": 0, "is_orphan": lambda owner: True, "log": lambda line: None}
    heir = Fence(run, {**OWNER, "restart": 2}, **options)
    heirs_heir = Fence(run, {**OWNER, "restart": 3}, **options)
    fence.release()
    with pytest.raises(RunBusy, match="taken over by a later job"):
        heir.check()
    heirs_heir.check()
    with pytest.raises(RunBusy, match=r"held by job 17 \(restart 3\)"):
        Fence(run, {"job": "18"}, wait_s=0, log=lambda line: None)
    heir.release()
    heirs_heir.release()


def test_a_file_system_without_locks_relies_on_the_token(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    said: list[str] = []
    first = Fence(run, OWNER, log=said.append)
    second = Fence(run, OWNER, log=said.append)
    assert "has no locks (No locks available)" in said[0]
    second.check()
    with pytest.raises(RunBusy):
        first.check()
    first.release()
    second.release()


def test_of_two_that_start_together_without_locks_one_may_write(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes and goes on while the first is about to write its number."""

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    write, others = files.write_bytes, []

    def late(*args: Any, **options: Any) -> None:
        monkeypatch.setattr("ddpm.run.fence.write_bytes", write)
        others.append(Fence(run, {"job": "18"}, log=lambda line: None))
        others[0].check()
        write(*args, **options)

    monkeypatch.setattr("ddpm.run.fence.write_bytes", late)
    first = Fence(run, OWNER, log=lambda line: None)
    first.check()
    with pytest.raises(RunBusy):
        others[0].check()
    third = Fence(run, {"job": "19"}, log=lambda line: None)
    assert sorted((first.token, others[0].token, third.token)) == [1, 2, 3] and third.token == 3
    assert [p.name for p in run.path.glob(".fence-*")] == [".fence-3"]
    for fence in (first, *others, third):
        fence.release()


# ---------------------------------------------------------------- a run that is no longer where it was


def renamed(run: RunDir) -> None:
    run.path.rename(run.path.with_name("elsewhere"))


def deleted(run: RunDir) -> None:
    shutil.rmtree(run.path)


def replaced_by_a_copy(run: RunDir) -> None:
    renamed(run)
    shutil.copytree(run.path.with_name("elsewhere"), run.path)


def deleted_and_restored(run: RunDir) -> None:
    shutil.copytree(run.path, run.path.with_name("backup"))
    shutil.rmtree(run.path)
    shutil.copytree(run.path.with_name("backup"), run.path)


def another_in_its_place(run: RunDir) -> None:
    renamed(run)
    run.path.mkdir()


@pytest.mark.parametrize("what", [renamed, deleted, replaced_by_a_copy, deleted_and_restored, another_in_its_place])
def test_a_run_that_is_moved_or_deleted_is_said_to_be_and_nothing_is_written_in_its_place(
    run: RunDir, fence: Fence, what: Any
) -> None:
    what(run)
    with pytest.raises(RunGone, match="was moved, renamed or deleted") as gone:
        fence.check()
    assert ("elsewhere now" in str(gone.value)) == run.path.with_name("elsewhere").exists()
    assert gone.value.exit_code == 78
    with pytest.raises(RunGone):
        files.write_json(run.heartbeat, {}, replace=True, may_publish=fence.check)
    assert not run.heartbeat.exists()


def test_a_mount_that_is_away_for_a_moment_takes_no_run_from_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "mount" / "run")
    run.path.mkdir(parents=True)
    fence = Fence(run, OWNER, wait_s=0)
    run.path.parent.rename(tmp_path / "away")
    with pytest.raises(RunGone, match=r"it is .*/away/run now"):
        fence.check()
    readlink = Mock(side_effect=FileNotFoundError)  # of a mount that is not there nobody knows where it is
    monkeypatch.setattr(Path, "readlink", readlink)
    for empty in (False, True):  # without its place, or with that alone
        if empty:
            run.path.parent.mkdir()
        with pytest.raises(OSError, match="a mount is away for a moment"):
            fence.check()
    run.path.parent.rmdir()
    (tmp_path / "away").rename(run.path.parent)
    fence.check()
    run.path.parent.rename(tmp_path / "away")
    monkeypatch.setattr(fence_module, "AWAY_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(fence_module.os, "fstat", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
        with pytest.raises(RunGone, match="was moved, renamed or deleted"):  # as where another host has deleted it
            fence.check()
    monkeypatch.setattr(fence_module, "AWAY_S", 600.0)
    shutil.rmtree(tmp_path / "away")
    with pytest.raises(RunGone):
        fence.check()
    fence.release()


def test_a_lock_file_that_was_removed_leaves_the_run_to_whoever_has_its_number(run: RunDir, fence: Fence) -> None:
    run.lock.unlink()
    fence.check()


def test_a_job_that_came_after_the_lock_was_removed_has_taken_over_and_nothing_was_moved(
    run: RunDir, fence: Fence
) -> None:
    run.lock.unlink()
    heir = Fence(run, {"job": "18"}, wait_s=0, log=lambda line: None)
    with pytest.raises(RunBusy, match="taken over by a later job") as taken:
        fence.check()
    assert not isinstance(taken.value, RunGone)
    heir.check()
    heir.release()


def test_a_run_that_was_moved_is_not_said_to_be_taken_over_where_a_copy_without_its_lock_lies_there(
    run: RunDir, fence: Fence
) -> None:
    replaced_by_a_copy(run)
    run.lock.unlink()
    run.fence.write_text("9\n")
    with pytest.raises(RunGone, match=r"was moved, renamed or deleted.*elsewhere now"):
        fence.check()


@pytest.mark.parametrize("name", ["lock", "fence"])
def test_a_copy_that_is_put_over_a_run_is_said_to_be(run: RunDir, fence: Fence, name: str) -> None:
    (run.path / "copied").write_text("0\n")
    (run.path / "copied").rename(run.path / name)
    with pytest.raises(RunGone, match="as where a copy is put over a run"):
        fence.check()


def test_files_of_the_fence_have_the_mode_that_the_umask_says(run: RunDir) -> None:
    before = os.umask(0o002)
    try:
        Fence(run, OWNER, wait_s=0).release()
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in run.path.iterdir()}
    assert modes == dict.fromkeys(("lock", "fence", ".fence-1"), 0o664)
