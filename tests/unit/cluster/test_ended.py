"""launch/cluster/ended.py: what SLURM knows of jobs that ended without a word, as its commands were seen to tell it."""

from __future__ import annotations

import os

import pytest

from launch.cluster import ended, scheduler, slurm

NO_ACCOUNTING = "sacct: Slurm accounting storage is disabled"


def says(monkeypatch: pytest.MonkeyPatch, sacct: str | None, scontrol: str | None = None) -> list[str]:
    """The commands that are asked, by their first words. None: it answers with an error."""
    asked: list[str] = []

    def run(argv: list[str], **_: object) -> str:
        asked.append(argv[0])
        said = sacct if argv[0] == "sacct" else scontrol
        if said is None:
            raise scheduler.SchedulerError(NO_ACCOUNTING)
        return said

    monkeypatch.setattr(slurm, "run", run)
    monkeypatch.setattr(ended, "_known", {})
    return asked


@pytest.mark.parametrize(("sacct", "told"), [
    ("17|OUT_OF_MEMORY|0:125\n17.batch|OUT_OF_MEMORY|0:125\n", "OUT_OF_MEMORY (it used more memory than it had asked"),
    ("17|FAILED|0:9\n17.batch|OUT_OF_MEMORY|0:125\n", "OUT_OF_MEMORY (it used more memory"),
    ("17|FAILED|0:9\n17.batch|CANCELLED|0:9\n", "FAILED (its batch shell was killed by SIGKILL)"),
    ("17|FAILED|0:35\n", "FAILED (its batch shell was killed by signal 35)"),
    ("17|FAILED|137:0\n", "FAILED (exit code 137)"),
    ("17|NODE_FAIL|1:0\n", "NODE_FAIL (its node failed)"),
    ("17|BOOT_FAIL|0:0\n", "BOOT_FAIL (its node did not come up)"),
    ("17|DEADLINE|0:0\n", "DEADLINE (the time of its --deadline was over)"),
    ("17|PREEMPTED|0:0\n", "PREEMPTED (a job of higher priority took its nodes)"),
    ("17|CANCELLED by 1|0:0\n", "CANCELLED (by daemon)"),
    ("17|CANCELLED by 4000000|0:15\n", "CANCELLED (by uid 4000000)"),
    ("17|TIMEOUT|0:0\n", "TIMEOUT (its time limit was over before it had saved"),
    ("17|COMPLETED|0:0\n", "COMPLETED"),
])  # fmt: skip
def test_accounting_tells_how_a_job_ended(monkeypatch: pytest.MonkeyPatch, sacct: str, told: str) -> None:
    asked = says(monkeypatch, sacct)
    assert scheduler.ends(["17"])["17"].startswith(f"SLURM calls it {told}") and asked == ["sacct"]


def test_who_cancelled_a_job_may_be_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, f"17|CANCELLED by {os.geteuid()}|0:0\n")
    assert scheduler.ends(["17"]) == {"17": "SLURM calls it CANCELLED (by you)"}


@pytest.mark.parametrize("sacct", [None, "", "17|RUNNING|0:0\n"])
def test_without_accounting_slurmctld_is_asked_which_remembers_for_a_while(
    monkeypatch: pytest.MonkeyPatch, sacct: str | None
) -> None:
    says(monkeypatch, sacct, "JobId=17 JobState=NODE_FAIL Reason=NodeDown Requeue=0 ExitCode=0:1 DerivedExitCode=0:0")
    assert scheduler.ends(["17"]) == {"17": "SLURM calls it NODE_FAIL (its node failed)"}
    says(monkeypatch, sacct)
    assert scheduler.ends(["17"]) == {"17": ""}


def test_many_jobs_are_asked_about_at_once_and_what_is_known_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = says(monkeypatch, "17|TIMEOUT|0:0\n19|FAILED|1:0\n")
    told = scheduler.ends(["17", "18", "19"])
    assert told["19"] == "SLURM calls it FAILED (exit code 1)" and told["18"] == "" and asked == ["sacct", "scontrol"]
    assert scheduler.ends(["17", "18", "19"]) == told and asked == ["sacct", "scontrol"]
    later = ended.time.monotonic() + 2 * ended.AGAIN_S
    monkeypatch.setattr(ended.time, "monotonic", lambda: later)
    assert scheduler.ends(["17", "18", "19"]) == told and asked == ["sacct", "scontrol"] * 2
