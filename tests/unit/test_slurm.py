"""launch/slurm.py: what is read from SLURM's answers. They are given here, as SLURM 22.05 and 24.11 print them."""

import time

import pytest

from launch import slurm

JOB = "JobId=17 JobName=x QOS={qos} JobState=RUNNING Requeue={requeue} Restarts=2 TimeLimit=01:00:00 Partition=gpu"
CONFIG = """Configuration data as of 2026-01-01T00:00:00
KillWait                = 30 sec
PreemptMode             = {mode}
PreemptType             = preempt/{by}
"""


def answers(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    """By the words of the command."""

    def run(argv: list[str], **_: object) -> str:
        return next(said for words, said in given.items() if words.replace("_", " ") in " ".join(argv))

    monkeypatch.setattr(slurm, "run", run)


@pytest.mark.parametrize(
    ("requeue", "mode", "mercy"),
    [
        ("1", "REQUEUE", slurm.Mercy(True, 90, 30)),
        ("0", "REQUEUE", slurm.Mercy(False, 90, 30)),
        ("1", "CANCEL", slurm.Mercy(False, 90, 30)),
    ],
)
def test_a_partition_says_what_pre_emption_does(
    monkeypatch: pytest.MonkeyPatch, requeue: str, mode: str, mercy: slurm.Mercy
) -> None:
    answers(
        monkeypatch,
        show_job=JOB.format(qos="normal", requeue=requeue),
        show_config=CONFIG.format(mode="REQUEUE", by="partition_prio"),
        show_partition=f"PartitionName=gpu GraceTime=90 PreemptMode={mode} MaxTime=UNLIMITED",
    )
    assert slurm.mercy("17") == mercy


@pytest.mark.parametrize(
    ("qos", "cluster", "mercy"),
    [
        ("cancel|00:01:30", "REQUEUE", slurm.Mercy(False, 90, 30)),
        ("cluster|1-00:00:05", "REQUEUE", slurm.Mercy(True, 86405, 30)),
        ("cluster|00:00:00", "CANCEL", slurm.Mercy(False, 0, 30)),
        ("requeue|", "CANCEL", slurm.Mercy(True, 0, 30)),
    ],
)
def test_a_qos_says_so_where_slurm_pre_empts_by_it(
    monkeypatch: pytest.MonkeyPatch, qos: str, cluster: str, mercy: slurm.Mercy
) -> None:
    answers(
        monkeypatch,
        show_job=JOB.format(qos="scavenger", requeue="1"),
        show_config=CONFIG.format(mode=cluster, by="qos"),
        show_qos_scavenger=f"{qos}\n",
        show_partition="PartitionName=gpu GraceTime=0 PreemptMode=OFF",
    )
    assert slurm.mercy("17") == mercy


def test_a_job_is_shown_with_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, show_job=JOB.format(qos="normal", requeue="0") + " SubmitTime=2026-11-20T09:00:01")
    local = time.mktime((2026, 11, 20, 9, 0, 1, 0, 0, -1))
    utc = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(local))
    assert slurm.show("17") == slurm.Shown("RUNNING", 2, False, "gpu", "normal", "01:00:00", utc)


def test_a_job_is_shown_though_the_user_has_slurm_write_times_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, show_job=JOB.format(qos="normal", requeue="0") + " SubmitTime=Today")
    shown = slurm.show("17")
    assert shown is not None and shown.state == "RUNNING" and shown.queued_at is None


def test_a_job_that_slurm_has_forgotten_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> str:
        raise slurm.SlurmError("scontrol: slurm_load_jobs error: Invalid job id specified")

    monkeypatch.setattr(slurm, "run", run)
    assert slurm.show("17") is None
