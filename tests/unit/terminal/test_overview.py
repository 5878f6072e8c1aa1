"""launch/terminal/overview.py: what one run's files say of it while it is at work, and of a copy of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.reading import load
from ddpm.run import files
from ddpm.run.events import EventLog
from ddpm.run.files import now, sign, stamp, write_json
from ddpm.run.paths import RunDir
from ddpm.run.records import place_of
from launch.cluster import environment, scheduler
from launch.queue import local
from launch.terminal import lacking, results, standing, unheard, view
from launch.terminal.overview import describe
from tests.cli.harness import TINY


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """One that trains here and now, by a job that nobody can look for."""
    run = RunDir(tmp_path / "runs" / "tiny")
    for path in (run.checkpoints, run.logs, run.events):
        path.mkdir(parents=True)
    run.config.write_text(TINY)
    write_json(run.run_json, sign({"config_digest": load(run.config).digest()}))
    tell(run, "started", step=0)
    beat(run)
    return run


def tell(run: RunDir, event: str, restart: int = 0, **fields: Any) -> None:
    EventLog(run, "17", restart, "n1").append(event, **fields)


def beat(run: RunDir, **fields: Any) -> None:
    record = {"time": now(), "job": "17", "restart": 0, "step": 100, "inode": place_of(run), **fields}
    write_json(run.heartbeat, record, replace=True)


def test_a_run_that_beats_is_running_and_a_copy_of_it_with_its_heartbeat_is_not(run: RunDir, tmp_path: Path) -> None:
    assert describe(run, {})["state"] == "running"
    assert describe(RunDir(shutil.copytree(run.path, tmp_path / "copy")), {})["state"] == "ended"


def test_a_copy_without_events_is_not_prepared_and_says_what_was_trained(run: RunDir, tmp_path: Path) -> None:
    run.heartbeat.unlink()
    shutil.rmtree(run.events)
    assert describe(run, {})["state"] == "prepared" and describe(run, {})["problem"] is None
    beat(run)
    copy = describe(RunDir(shutil.copytree(run.path, tmp_path / "copy")), {})
    assert copy["state"] == "ended" and "tell of step 100, and no event of the life that wrote them" in copy["problem"]
    run.manifest(100).touch()
    assert describe(run, {})["state"] == "ended"


def test_checkpoints_that_cannot_be_looked_at_are_not_said_to_lack_any(run: RunDir) -> None:
    tell(run, "checkpoint", step=100)
    assert "checkpoints/ has none after step 0" in describe(run, {})["problem"]
    run.checkpoints.rmdir()
    assert "checkpoints/ has none after step 0" in describe(run, {})["problem"]
    run.checkpoints.symlink_to("/not/mounted")
    told = describe(run, {})["problem"]
    assert "a link to /not/mounted" in told and "has none" not in told


def test_a_copy_of_a_run_of_before_heartbeats_said_where_they_are_is_not_alive_beside_it(
    run: RunDir, tmp_path: Path
) -> None:
    EventLog(run, "17", 0, "n1", prefix="submit-").append("submitted", run=str(run.path), stage="train")
    write_json(run.heartbeat, {"time": now(), "job": "17", "restart": 0, "step": 100}, replace=True)
    assert describe(run, {})["state"] == "running"
    assert describe(RunDir(shutil.copytree(run.path, tmp_path / "copy")), {})["state"] == "ended"


def test_a_run_whose_saves_are_refused_says_so_until_one_succeeds(run: RunDir) -> None:
    assert describe(run, {})["problem"] is None
    tell(run, "save_failed", step=0, at_step=100, reason="8.0 MiB free for a checkpoint of 572 MiB")
    problem = describe(run, {})["problem"]
    assert "nothing was saved since step 0" in problem and problem.endswith("8.0 MiB free for a checkpoint of 572 MiB")
    tell(run, "checkpoint", step=0)
    assert describe(run, {})["problem"] is None


@pytest.mark.parametrize(("minutes", "told"), [(25, False), (32, True)])
def test_a_run_that_should_have_saved_long_ago_says_so(run: RunDir, minutes: int, told: bool) -> None:
    run.config.write_text(TINY.replace("every_min: null", "every_min: 10"))
    line = {"event": "resumed", "time": stamp(ago(minutes)), "job": "17", "restart": 0, "step": 0}
    (run.events / "17.0.jsonl").write_text(json.dumps(line) + "\n")
    problem = describe(run, {})["problem"]
    assert (f"nothing was saved for {minutes} minutes" in (problem or "")) == told, problem


def ago(minutes: float) -> datetime:
    return datetime.now(timezone.utc) - timedelta(minutes=minutes)


def test_each_life_that_had_its_nodes_is_a_restart_though_it_never_came_to_train(run: RunDir) -> None:
    for restart in range(1, 5):
        tell(run, "allocated", restart, step=0)
    assert describe(run, {})["restarts"] == 4


def test_what_its_owner_stopped_and_began_again_is_no_restart(run: RunDir) -> None:
    for life, (event, more) in enumerate(
        [("stop_requested", {"reason": "STOP"}), ("requeued", {}), ("finished", {}), ("failed", {}), ("resumed", {})]
    ):
        tell(run, "allocated", life, step=0)
        tell(run, event, life, step=0, **more)
    assert describe(run, {})["restarts"] == 2  # after the one that was put back, and the one that failed


def test_the_end_is_where_the_speed_leads(run: RunDir) -> None:
    assert describe(run, {})["expected_end"] is None  # no speed yet
    line = {"step": 100, "time": now(), "epoch": 0.1, "loss": 1, "grad_norm": 1, "lr": 1, "images_per_s": 0.8}
    run.metrics.write_text(json.dumps(line) + "\n")
    told = datetime.fromisoformat(describe(run, {})["expected_end"].replace("Z", "+00:00"))
    assert abs((told - ago(0)).total_seconds() - (400 - 100) * 8 / 0.8) < 60


def test_while_samples_are_made_the_pace_and_the_end_are_theirs(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "word", lambda facts: "sampling")
    made = run.sample_set("s")
    made.path.mkdir(parents=True)
    made.request.write_text('{"num_samples": 40, "shards": 4}')
    for shard, minutes in enumerate((10, 5)):
        path, at = made.shard_manifest(shard, 4), ago(minutes).timestamp()
        path.touch()
        os.utime(path, (at, at))
    row = describe(run, {})
    assert row["images_per_s"] == pytest.approx(10 / 600, rel=0.01)
    left_s = (datetime.fromisoformat(row["expected_end"].replace("Z", "+00:00")) - ago(0)).total_seconds()
    assert left_s == pytest.approx(20 * 60, rel=0.01)
    (line,) = [line for line in view.page([row], 200, details=False) if line.startswith("tiny: ")]
    assert line.startswith("tiny: s: 20 of 40 images, 0.0167 images/s, until ")
    monkeypatch.setattr(standing, "word", lambda facts: "running")
    assert describe(run, {})["making"] is None


def test_a_job_that_samples_on_this_machine_is_shown_as_at_work(run: RunDir) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "launch.queue.local", str(run.path), "[]"]
    with subprocess.Popen(argv, env={**os.environ, "DDPM_JOB": "local-1"}) as process:
        fields = {"stage": "sample", "via": "local", "run": str(run.path), "pid": process.pid}
        EventLog(run, "local-1", 0, environment.host(), prefix="submit-").append("submitted", **fields)
        while not local.at_work(run):
            time.sleep(0.05)
        jobs = describe(run, {})["jobs"]
        process.kill()
    assert jobs == {"local-1": "RUNNING"} and describe(run, {})["jobs"] == {}


def test_a_job_here_that_waits_for_another_runs_is_queued_and_none_of_it_is_running(run: RunDir) -> None:
    run.heartbeat.unlink()
    env = {**os.environ, "DDPM_JOB": "local-1"}
    with subprocess.Popen(["sleep", "60"], env=env) as before, subprocess.Popen(["sleep", "60"], env=env) as mine:
        fields = {"stage": "train", "via": "local", "run": str(run.path), "pid": mine.pid}
        told = EventLog(run, "local-1", 0, environment.host(), prefix="submit-")
        told.append("submitted", **fields, behind=[str(before.pid), "local-1"])
        waits = describe(run, {})
        before.kill()
        before.wait()
        begins = describe(run, {})
        mine.kill()
    assert (waits["state"], waits["jobs"]) == ("queued", {"local-1": "PENDING"})
    assert begins["state"] != "queued" and begins["jobs"] == {"local-1": "RUNNING"}


@pytest.mark.parametrize(("why", "setup"), [
    ({"error": "modul: command not found; setup failed on n1 (exit code 127): modul load x", "reason": "crash"}, True),
    ({"error": "RuntimeError: x", "reason": "crash"}, False),
    ({"error": "", "reason": "crash"}, False),
    ({"reason": "/x/python does not run on node n1"}, False),
])  # fmt: skip
def test_why_the_last_life_died_is_told_until_another_begins(run: RunDir, why: dict[str, str], setup: bool) -> None:
    tell(run, "requeued", job="7", bad_node="n2", reason="/x/python does not run on node n2")
    tell(run, "requeued", bad_node="n1", **why)
    problem, said = describe(run, {})["problem"], why.get("error") or why["reason"]
    assert f"died on node n1: {said}" in problem and ("mend the site profile's `setup`" in problem) is setup
    tell(run, "resumed", restart=1, step=0)
    assert said not in (describe(run, {})["problem"] or "")


def test_a_view_reads_the_config_of_a_run_again_only_where_it_has_changed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    really = lacking.reading.of_run
    monkeypatch.setattr(lacking.reading, "of_run", lambda run: read.append(run.name) or really(run))
    monkeypatch.setattr(files, "SETTLED_S", 0.0)
    before = describe(run, {})["total_steps"]
    assert describe(run, {})["total_steps"] == before and read == ["tiny"]
    run.config.write_text(TINY.replace(f"total_steps: {before}", f"total_steps: {before}0"))
    assert describe(run, {})["total_steps"] == 10 * before and read == ["tiny"] * 2


def test_a_job_that_left_the_queue_unheard_is_told_with_what_may_have_kept_it_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": False)
    run = RunDir(tmp_path / "runs" / "tiny")
    run.events.mkdir(parents=True)
    EventLog(run, "17", 0, "login", prefix="submit-").append("submitted", stage="train", via="sbatch")
    EventLog(run, "18", 0, "login", prefix="submit-").append("submitted", stage="sample", via="sbatch")
    told = describe(run, {})
    assert told["state"] == "cancelled" and "job 17 left the queue" in told["problem"]
    assert f"that lacks {tmp_path / 'runs'} (scontrol show job 17" in told["problem"]
    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": True)
    monkeypatch.setattr(scheduler, "ends", lambda jobs: dict.fromkeys(jobs, "SLURM calls it DEADLINE"))
    assert "began: SLURM calls it DEADLINE" in describe(run, {})["problem"]
    EventLog(run, "17", 0, "n1").append("cancelled", stage="train")
    assert describe(run, {})["state"] == "cancelled"
    assert "left the queue" not in (describe(run, {})["problem"] or "")


def test_a_life_that_ended_without_a_word_is_told_with_what_slurm_knows(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.heartbeat.unlink()
    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": True)
    monkeypatch.setattr(scheduler, "ends", lambda jobs: dict.fromkeys(jobs, "SLURM calls it NODE_FAIL"))
    told = describe(run, {})
    assert told["state"] == "ended"
    assert told["problem"] == "job 17 ended without a word: SLURM calls it NODE_FAIL; submit it again to go on"
    (run.logs / "train-17.out").write_text("begun\n")
    assert results.why_not(run).startswith(f": {told['problem']}; python launch/logs.py")
    monkeypatch.setattr(scheduler, "ends", lambda jobs: dict.fromkeys(jobs, ""))
    assert "SLURM does not say why" in describe(run, {})["problem"]
    assert describe(run, None)["problem"] is None  # it cannot be asked
    for event, fields in (("stop_requested", {"reason": "STOP"}), ("failed", {"reason": "why"})):
        tell(run, event, **fields)
        assert "without a word" not in (describe(run, {})["problem"] or "")


@pytest.mark.parametrize(("host", "booted", "told"), [
    ("", 0.0, "ended without a word, as where it is killed"),
    ("", 4e9, "ended as this machine was started again"),
    ("elsewhere", 0.0, "has given no sign of life since 20"),
])  # fmt: skip
def test_a_process_of_this_machine_that_is_gone_without_a_word_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, booted: float, told: str
) -> None:
    run, host = RunDir(tmp_path / "tiny"), host or environment.host()
    run.events.mkdir(parents=True)
    monkeypatch.setattr(unheard, "_booted", lambda: booted)
    sent = EventLog(run, "local-1", 0, host, prefix="submit-")
    sent.append("submitted", stage="train", via="local", pid=999_999_999, run=str(run.path))
    EventLog(run, "local-1", 0, host).append("started", step=0)
    for queued in ({}, None):  # where there is no SLURM, too
        row = describe(run, queued)
        assert row["state"] == "ended" and f"pid 999999999 on {host} {told}" in row["problem"]
    EventLog(run, "local-1", 0, host).append("stop_requested", reason="interrupted", step=3)
    assert "999999999" not in (describe(run, {})["problem"] or "")
    later = EventLog(run, "local-2", 0, host, prefix="submit-")  # its milestones
    later.append("submitted", stage="sample+evaluate", via="local", pid=999_999_999, run=str(run.path))
    assert "999999999" not in (describe(run, {})["problem"] or "")


def test_a_run_whose_logs_may_not_be_looked_into_is_shown_all_the_same(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run.logs))

    run.heartbeat.unlink()
    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": False)
    monkeypatch.setattr(unheard, "why", denied)
    row = describe(run, {})
    assert row["state"] == "ended" and str(run.logs) in row["problem"]
