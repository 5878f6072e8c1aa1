"""launch/terminal/logfiles.py: which file of a run's says what, across its lives, and what in it is SLURM's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpm.run.events import EventLog
from ddpm.run.paths import RunDir
from launch.terminal import logfiles

SAID = """srun: job 7 queued and waiting for resources
2026-11-27T11:00:00.000Z step=100/200 loss=0.1
slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED ***
[2026-11-27T11:00:01.502] error: *** JOB 7 ON n1 CANCELLED AT 2026-11-27T11:00:01 DUE TO JOB REQUEUE ***
submitit INFO (2026-11-27): Job has triggered
srun is a word that may stand in a line of ours
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    run.events.mkdir()
    return run


def wrote(run: RunDir, name: str, text: str, at: float = 0) -> Path:
    path = run.logs / name
    path.write_text(text)
    os.utime(path, (1_000_000_000 + at,) * 2)
    return path


def test_the_file_written_to_last_stands_last_whatever_jobs_are_called(run: RunDir) -> None:
    EventLog(run, "local-1", 0, "here").append("submitted", stage="train+sample", via="local")
    wrote(run, "train-9.out", "old", at=1)
    wrote(run, "train-10.out", "", at=9)  # of a job that has said nothing
    wrote(run, "local-1.out", "here", at=4)
    wrote(run, "sample-11_0.out", "task", at=3)
    wrote(run, "evaluate-12.out", "score", at=2)
    wrote(run, "evaluate-12.sh", "no log", at=8)
    wrote(run, ".notified-x", "no log", at=8)

    def names(stage: str | None) -> list[str]:
        return [path.name for path in logfiles.of_run(run, stage)]

    assert names(None) == ["train-9.out", "evaluate-12.out", "sample-11_0.out", "local-1.out"]
    assert names("train") == ["train-9.out", "local-1.out"] and names("evaluate") == ["evaluate-12.out"]


def test_which_of_all_logs_is_the_newest_is_known_without_reading_events(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = wrote(run, "local-1.out", "here")
    monkeypatch.delattr(logfiles, "read_events")
    assert logfiles.of_run(run, None) == [local]


@pytest.mark.parametrize("everything", [False, True])
def test_what_slurm_says_is_left_out_and_counted_unless_it_is_asked_for(
    run: RunDir, everything: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = logfiles.Filter(everything=everything)
    logfiles.show(wrote(run, "train-7.out", SAID), keep)
    shown = capsys.readouterr().out
    assert (shown == SAID) == everything and keep.hidden == (0 if everything else 4)
    assert "step=100" in shown and "srun is a word" in shown


def test_what_is_added_by_a_later_job_too_is_followed_until_nothing_is_at_work(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"line {i}\n" for i in range(20))
    wrote(run, "train-7.out", lines)
    told = ["", "complete at step 20", "complete at step 20"]
    asked: list[int] = []

    def over() -> str:
        asked.append(1)
        if len(asked) == 1:  # the job has ended, and its successor begins: half a line is none yet
            wrote(run, "train-7.out", f"{lines}srun: noise\nline 20\nhalf", at=1)
            wrote(run, "train-8.out", "goes on\n", at=5)
        return told.pop(0)

    monkeypatch.setattr(logfiles, "POLL_S", 0.001)
    monkeypatch.setattr(logfiles, "ASK_EVERY_S", 0.01)
    keep = logfiles.Filter(everything=False)
    assert logfiles.follow(lambda: logfiles.of_run(run, None), keep, over, last_lines=3) == "complete at step 20"
    head = f"==> {run.logs / 'train-8.out'} <=="
    assert capsys.readouterr().out.splitlines() == ["line 17", "line 18", "line 19", "line 20", head, "goes on"]


def test_of_several_ranks_the_first_ones_error_is_shown_and_not_what_torchrun_says_of_the_others() -> None:
    own = ["Traceback (most recent call last):", '  File "ddpm/training/step.py", line 199, in take', "KeyError: 3"]
    ends = (
        "W1128 13:10:31.713000 31975 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 3 SIGTERM"
    )
    others = [
        ends,
        "Traceback (most recent call last):",
        "RuntimeError: Connection closed by peer",
        "=====",
        "exitcode : 1",
    ]
    assert logfiles.last_error("\n".join([*own, *others])) == own
    assert logfiles.last_error("\n".join(own), num=1) == ["KeyError: 3"]
