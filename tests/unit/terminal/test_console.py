"""launch/terminal: how scripts leave, and how long they follow a job."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.run.events import EventLog
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir
from launch.cluster import slurm
from launch.terminal import console, faults, follow


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ESHUTDOWN, 3), (errno.ENOSPC, 3)])
def test_only_a_reader_that_has_read_enough_ends_a_script_well(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise OSError(number, "it is so")

    with pytest.raises(SystemExit) as left:
        console.run_script(main)
    assert left.value.code == code
    assert capsys.readouterr().err == ("error: it is so\n" if code else "")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """squeue's, in turn: job 17 is pre-empted, for longer than a few questions, comes back, and ends."""
    lives = ["RUNNING", *["COMPLETING"] * 9, "PENDING", "RUNNING", "COMPLETING"]
    lines = iter([*(f"17 17 {state}" for state in lives), "", "", ""])
    monkeypatch.setattr(slurm, "run", lambda argv: next(lines))
    monkeypatch.setattr(follow, "POLL_S", 0)
    return lines


def test_a_job_that_slurm_puts_back_is_followed(tmp_path: Path, answers: Iterator[str]) -> None:
    follow.follow_jobs(RunDir(tmp_path), ["17"])
    assert list(answers) == []


def test_a_job_that_was_submitted_by_hand_is_followed(tmp_path: Path, answers: Iterator[str]) -> None:
    EventLog(RunDir(tmp_path), "17", 0, "n1").append("allocated")
    follow.follow_jobs(RunDir(tmp_path), ["16"])
    assert list(answers) == []


def test_a_job_that_does_not_come_to_its_end_is_not_followed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()
    monkeypatch.setattr(slurm, "run", lambda argv: f"17 17 {'RUNNING' if next(asked) < 5 else 'COMPLETING'}")
    monkeypatch.setattr(follow, "POLL_S", 0)
    follow.follow_jobs(RunDir(tmp_path), ["17"])
    assert next(asked) > 100


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/a"), r"^Too many open files: /a: .*open files.*"),
        (RuntimeError("can't start new thread"), r"^can't start new thread: .*processes and threads.*"),
        (MemoryError(), r"^out of memory: .*memory.*"),
        (ImportError("libtorch.so: failed to map segment from shared object"), r"^libtorch.so: failed.*memory.*"),
        (OSError(errno.ENOSPC, "No space left on device"), r"^No space left on device: /run$"),
        (DamagedFile("step-1.pt: short"), r"^step-1.pt: short$"),
        (RuntimeError("of our own"), None),
        (ImportError("No module named x"), None),
        (ValueError("x"), None),
    ],
)
def test_what_is_no_fault_of_ours_has_words_and_what_is_keeps_its_traceback(error: Exception, told: str | None) -> None:
    said = faults.words(error, "/run")
    assert said is None if told is None else re.search(told, said or ""), said
