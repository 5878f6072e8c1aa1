"""launch/queue/work.py: what is at work for a run, and how it is ended. SLURM's answers are given here."""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import EnvironmentLacks, NodeUnfit, RequestError
from ddpm.run.events import EventLog
from ddpm.run.files import stamp, write_json
from ddpm.run.paths import RunDir
from launch import cancel, prepare, recover, remove, status
from launch.cluster import asked, environment, scheduler
from launch.cluster.site import Site
from launch.queue import chain, local, waiting, work
from launch.terminal import overview
from tests.training import make_config


@pytest.fixture
def slurm(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What SLURM has of the run's jobs, and what was cancelled; what is at work here."""
    run.events.mkdir()
    told: dict[str, Any] = {"states": {}, "here": {}, "asked": [], "cancelled": []}

    def queued(jobs: list[str]) -> dict[str, str]:
        told["asked"].append(jobs)
        if isinstance(told["states"], Exception):
            raise told["states"]
        return {job: told["states"][job] for job in jobs if job in told["states"]}

    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": told["states"] is not None)
    monkeypatch.setattr(scheduler, "queued", queued)
    monkeypatch.setattr(scheduler, "cancel_waiting", lambda *jobs: told["cancelled"].append((jobs, run.is_stopped())))
    monkeypatch.setattr(local, "at_work", lambda run: told["here"])
    return told


def submitted(run: RunDir, *jobs: str) -> None:
    for job in jobs:
        EventLog(run, job, 0, "login").append("submitted", stage="train", via="sbatch")


def beats(run: RunDir, age_s: float = 5, **fields: Any) -> None:
    """A heartbeat of job 17's second life."""
    at = stamp(datetime.fromtimestamp(time.time() - age_s, tz=timezone.utc))
    record = {"time": at, "job": "17", "restart": 1, "step": 3, "host": "n1", "inode": run.path.stat().st_ino}
    write_json(run.heartbeat, {**record, **fields}, replace=True)


def test_what_slurm_has_and_what_is_at_work_here_is_told(run: RunDir, slurm: dict[str, Any]) -> None:
    assert not work.of_run(run) and slurm["asked"] == []
    submitted(run, "17", "18")
    beats(run, job="90")  # which of them this is nobody knows
    slurm["states"], slurm["here"] = {"18": "PENDING"}, {"local-1": (77, ["train"])}
    found = work.of_run(run)
    assert found and str(found) == "job 18 (pending), pid 77 on this machine"
    slurm["states"] = {}
    assert str(work.of_run(run)) == "pid 77 on this machine"
    slurm["states"], slurm["here"] = {"17": "RUNNING"}, {}
    assert str(work.of_run(run)) == "job 17 (running)"


def test_where_slurm_does_not_answer_nobody_can_tell_and_where_there_is_none_nobody_is_asked(
    run: RunDir, slurm: dict[str, Any]
) -> None:
    submitted(run, "17")
    slurm["states"] = scheduler.NoAnswer("Unable to contact slurm controller")
    with pytest.raises(scheduler.NoAnswer, match="cannot tell whether run run is at work"):
        work.of_run(run)
    slurm["states"] = None
    assert not work.of_run(run)


def test_a_trainer_elsewhere_is_known_by_its_heartbeat_of_the_last_minute(run: RunDir, slurm: dict[str, Any]) -> None:
    for age_s in (5, 55, -5):  # by the clock of another host
        beats(run, age_s)
        assert str(work.of_run(run)).startswith("job 17 on n1, alive")
    for age_s in (65, -65):
        beats(run, age_s)
        assert not work.of_run(run)
    beats(run, inode=run.path.stat().st_ino + 1)  # came along with a copy
    assert not work.of_run(run)


@pytest.mark.parametrize(("job", "restart", "event", "alive"), [
    ("17", 1, "finished", False), ("17", 1, "failed", False), ("17", 1, "requeued", False),
    ("17", 1, "cancelled", False), ("17", 1, "started", True), ("17", 0, "requeued", True), ("18", 1, "finished", True),
])  # fmt: skip
def test_a_trainer_that_has_said_that_it_ends_is_not_at_work(
    run: RunDir, slurm: dict[str, Any], job: str, restart: int, event: str, alive: bool
) -> None:
    beats(run)
    for what in ("allocated", event):
        EventLog(run, job, restart, "n1").append(what)
    slurm["states"] = None
    assert bool(work.of_run(run)) == alive


def test_a_trainer_whose_job_slurm_has_not_any_more_is_not_at_work(run: RunDir, slurm: dict[str, Any]) -> None:
    submitted(run, "17")
    beats(run, job="17_3")
    assert not work.of_run(run)


@pytest.mark.parametrize("host", ["here", "another"])
def test_a_process_of_this_machine_that_has_ended_is_not_at_work(run: RunDir, slurm: dict[str, Any], host: str) -> None:
    beats(run, job="local-1", restart=0, host=host)
    where = environment.host() if host == "here" else host
    EventLog(run, "local-1", 0, where).append("submitted", stage="train", via="local", pid=77)
    assert bool(work.of_run(run)) == (host == "another")


def test_an_end_makes_stop_before_it_cancels_what_waits(run: RunDir, slurm: dict[str, Any]) -> None:
    assert not work.end(run) and not run.is_stopped()
    submitted(run, "17", "18")
    slurm["states"] = {"17": "RUNNING", "18": "PENDING"}
    assert list(work.end(run).jobs) == ["17", "18"]
    assert slurm["cancelled"] == [(("17", "18"), True)]


def test_several_runs_are_ended_by_one_question_and_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, commands = [RunDir(tmp_path / name) for name in ("b", "a", "c")], []

    def answer(argv: list[str], **_: Any) -> str:
        commands.append(argv)
        return "17 17 RUNNING\n18 18 PENDING\n" if argv[0] == "squeue" else ""

    for r, job in zip(runs, ("17", "18", "19"), strict=True):
        r.events.mkdir(parents=True)
        submitted(r, job)
    monkeypatch.setattr("launch.cluster.slurm.run", answer)
    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": True)
    assert [list(found.jobs) for found in work.end_all(runs)] == [["17"], ["18"], []]
    assert [r.is_stopped() for r in runs] == [True, True, False]
    asked, *others = commands
    assert asked[0] == "squeue" and sorted(asked[-1].split(",")) == ["17", "18", "19"]
    assert others == [["scancel", "--state=PENDING", "17", "18"]]


@pytest.mark.parametrize("owner", ["", "it is another's"])
def test_a_run_that_cannot_be_written_is_not_ended_from_here(
    run: RunDir, slurm: dict[str, Any], monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(work, "not_ours", lambda path: owner)
    with pytest.raises(RequestError, match=f"cannot be ended from here: {owner or '.*cannot be written'}"):
        work.end(run)


def test_a_run_whose_lock_is_anothers_is_neither_recovered_nor_removed_which_the_machine_lacks(
    run: RunDir, slurm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NodeUnfit(f"run {run.name} cannot be written")

    for script in (recover, remove):
        monkeypatch.setattr(script, "Fence", refuse)
    run.config.touch()
    write_json(run.run_json, {})
    with pytest.raises(EnvironmentLacks, match="cannot be written"), recover.held(run):
        pass
    with pytest.raises(EnvironmentLacks, match="cannot be written"):
        remove.remove(run)
    assert run.path.is_dir()


def test_what_cannot_be_ended_from_here_is_said_and_the_others_are_ended(
    run: RunDir, slurm: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = RunDir(run.path.with_name("theirs"))
    for r in (theirs, run):
        r.events.mkdir(parents=True, exist_ok=True)
        r.run_json.write_text("{}")
        submitted(r, "17")
    slurm["states"] = {"17": "PENDING"}
    monkeypatch.setattr(os, "access", lambda path, mode: path != theirs.path)
    monkeypatch.setattr(cancel, "await_ends", lambda told: 0)
    monkeypatch.setattr(sys, "argv", ["cancel.py", "*", "--root", str(run.path.parent)])
    assert cancel.main() == 2 and run.is_stopped() and not theirs.is_stopped()
    told = capsys.readouterr()
    assert told.err.startswith("error: run theirs cannot be ended from here: ") and told.err.count("\n") == 1
    assert told.out == "cancelled: job 17\n"


@pytest.mark.parametrize("complete", [False, True])
def test_a_job_that_is_anothers_stays_until_stop_ends_it_and_is_not_waited_for(
    run: RunDir,
    slurm: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    complete: bool,
) -> None:
    def denied(*jobs: str) -> None:
        del slurm["states"]["18"]
        raise scheduler.SchedulerError("scancel: error: Kill job error on job id 17: Access/permission denied")

    run.run_json.write_text("{}")
    submitted(run, "17", "18")
    slurm["states"] = {"17": "PENDING", "18": "PENDING"}
    monkeypatch.setattr(scheduler, "cancel_waiting", denied)
    monkeypatch.setattr(cancel, "is_finished", lambda run: complete)
    monkeypatch.setattr(sys, "argv", ["cancel.py", str(run.path)])
    assert cancel.main() == 2 and run.is_stopped()
    told = capsys.readouterr()
    assert told.err.startswith("error: job 17 stays in the queue") and "permission denied" in told.err
    then = f"complete at step 0; {run.stop_file} stays, and ends" if complete else "at step 0; go on by submitting"
    assert told.out.startswith(f"cancelled: job 18\nrun run is {then}")


def test_a_running_job_that_is_anothers_and_does_not_leave_is_told_as_such(
    run: RunDir, slurm: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(jobs: list[str]) -> None:
        slurm["states"]["18"] = "COMPLETING"
        raise scheduler.SchedulerError("scancel: error: Kill job error on job id 17: Access/permission denied")

    run.run_json.write_text("{}")
    submitted(run, "17", "18")
    slurm["states"] = {"17": "RUNNING", "18": "RUNNING"}
    monkeypatch.setattr(scheduler, "cancel", denied)
    monkeypatch.setattr(cancel, "PATIENCE_S", -1)
    monkeypatch.setattr(sys, "argv", ["cancel.py", str(run.path)])
    assert cancel.main() == 1 and run.is_stopped()
    told = capsys.readouterr().err
    assert told.startswith("still at work after -1 s: job 17 (running), job 18 (completing) (scancel: error: Kill job")
    assert told.endswith(f"permission denied). {run.stop_file} stays, and ends it\n") and told.count("\n") == 1


UNKNOWN = (
    "squeue: error: No cluster 'bravo' known by database.\n  error: 'bravo' can't be reached now, or it is an invalid "
    "entry for SLURM_CLUSTERS.  Use 'sacctmgr list clusters' to see available clusters."
)
SILENT = "squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
"""As SLURM 22.05 says it."""


@pytest.fixture
def two(run: RunDir, slurm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What two clusters have whose jobs have the same ids; asked from a login of alpha."""
    has: dict[str, Any] = {}

    def queued(jobs: list[str]) -> dict[str, str]:
        if isinstance(has[asked.cluster() or "alpha"], Exception):
            raise has[asked.cluster() or "alpha"]
        return {job: state for job, state in has[asked.cluster() or "alpha"].items() if job in jobs}

    slurm["states"] = {}
    monkeypatch.setattr(scheduler, "queued", queued)
    monkeypatch.setattr(scheduler, "cluster_name", lambda: asked.cluster() or "alpha")
    monkeypatch.setattr(scheduler, "cancel", lambda jobs: slurm["cancelled"].append((jobs, asked.cluster())))
    monkeypatch.setattr(scheduler, "cancel_waiting", lambda job: slurm["cancelled"].append((job, asked.cluster())))
    monkeypatch.delenv("SLURM_CLUSTERS", raising=False)
    for cluster in ("alpha", "bravo"):
        EventLog(run, "17", 0, "login", prefix="submit-", cluster=cluster).append(
            "submitted", stage="train", via="sbatch"
        )
    return has


def test_jobs_are_found_and_ended_on_the_cluster_where_they_are(
    run: RunDir, slurm: dict[str, Any], two: dict[str, Any]
) -> None:
    two |= {"alpha": {}, "bravo": {"17": "PENDING"}}
    found = work.end(run)
    assert str(found) == "job 17 of cluster bravo (pending)" and slurm["cancelled"] == [("17", "bravo")]
    assert chain.is_training(run) and not waiting.jobs_in_queue(run, "train")
    work.cancel(found.jobs)
    assert slurm["cancelled"][1:] == [(["17"], "bravo")]
    two["alpha"] = {"17": "RUNNING"}
    assert work.of_run(run).jobs == {"17": "RUNNING", "17;bravo": "PENDING"}


def test_what_one_cluster_refuses_keeps_no_job_of_another_from_its_end(
    run: RunDir, slurm: dict[str, Any], two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(*jobs: str) -> None:
        if asked.cluster() != "bravo":
            raise scheduler.SchedulerError("scancel: error: Access/permission denied")
        two["bravo"] = {}

    two |= {"alpha": {"17": "PENDING"}, "bravo": {"17": "PENDING"}}
    monkeypatch.setattr(scheduler, "cancel_waiting", cancelled)
    found = work.end(run)
    assert [*found.stays] == ["17"]
    assert str(found) == "job 17 (pending, and stays so), job 17 of cluster bravo (pending)"


def test_a_cluster_that_is_not_known_here_has_nothing_and_of_one_that_is_silent_that_is_told_once(
    run: RunDir, two: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    two |= {"alpha": {}, "bravo": scheduler.SchedulerError(UNKNOWN)}
    assert not work.of_run(run) and capsys.readouterr().err == ""
    two["bravo"] = scheduler.NoAnswer(SILENT)
    assert not work.of_run(run) and not work.of_run(run)
    assert capsys.readouterr().err == f"warning: cluster bravo, which had jobs of run run: {SILENT}\n"


def test_what_a_silent_cluster_may_have_is_ended_by_stop_and_told(
    run: RunDir, two: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two |= {"alpha": {}, "bravo": scheduler.NoAnswer(SILENT)}
    run.run_json.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["cancel.py", str(run.path)])
    assert cancel.main() == 2 and run.is_stopped()
    told = capsys.readouterr()
    assert "error: cluster bravo had jobs of run run, and does not answer" in told.err and told.out == ""


def test_a_heartbeat_of_one_clusters_job_is_not_taken_for_that_of_anothers_which_is_gone(
    run: RunDir, two: dict[str, Any]
) -> None:
    two |= {"alpha": {}, "bravo": scheduler.SchedulerError(UNKNOWN)}
    beats(run, cluster="alpha")
    assert not work.of_run(run)
    beats(run, cluster="bravo")
    assert "job 17 on n1, alive" in str(work.of_run(run))


def test_a_submission_to_another_cluster_than_the_one_that_has_the_run_is_refused(
    run: RunDir, two: dict[str, Any]
) -> None:
    two |= {"alpha": {}, "bravo": {"17": "RUNNING"}}
    with pytest.raises(RequestError, match=r"queue of cluster bravo as job 17: .*--sbatch clusters=bravo"):
        prepare.is_at_work(run, make_config(), Site())


def test_one_login_shows_runs_with_the_same_job_id_on_two_clusters(
    run: RunDir, two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunDir(run.path.with_name("other"))
    other.events.mkdir(parents=True)
    EventLog(other, "17", 0, "login", prefix="submit-", cluster="alpha").append(
        "submitted", stage="train", via="sbatch"
    )
    two |= {"alpha": {"17": scheduler.Queued("PENDING")}, "bravo": {"17": scheduler.Queued("RUNNING")}}
    monkeypatch.setattr(scheduler, "look_up", scheduler.queued)
    monkeypatch.setattr(overview, "cluster_name", scheduler.cluster_name)
    monkeypatch.setattr(local, "at_work", lambda run, events: {})
    told: list[str] = []
    rows = status.rows_of([other, run], told.append)
    assert [(row["state"], row["cluster"], row["jobs"]) for row in rows] == [
        ("queued", "alpha", {"17": "PENDING"}), ("running", "bravo", {"17": "RUNNING"}),
    ]  # fmt: skip
    two["bravo"] = scheduler.SchedulerError(UNKNOWN)
    assert [row["state"] for row in status.rows_of([other, run], told.append)] == ["queued", "elsewhere"] and not told
    two["bravo"] = scheduler.NoAnswer(SILENT)
    assert status.rows_of([run], told.append)[0]["state"] == "elsewhere" and SILENT in told[0]
