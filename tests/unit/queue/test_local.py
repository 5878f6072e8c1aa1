"""launch/queue/local.py: what runs in the background on this machine is known as that run's, or ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks
from ddpm.run.events import EventLog, read_events
from ddpm.run.paths import RunDir
from launch.cluster import environment
from launch.cluster.job import Job
from launch.cluster.site import Site
from launch.queue import local
from tests.cli.harness import is_alive, wait_for
from tests.conftest import PROJECT, requires


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "tiny")
    for path in (run.checkpoints, run.logs, run.events):
        path.mkdir(parents=True)
    return run


def pids_of(run: RunDir) -> list[int]:
    """Processes that have the run's path among their words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run.path).encode() in words and is_alive(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def test_a_process_that_could_not_be_noted_down_is_ended_and_that_is_said(run: RunDir) -> None:
    run.events.rmdir()
    run.events.touch()
    with pytest.raises(EnvironmentLacks, match=r"events.*ended"):
        local.start(run, [Job("train", run, Site(cluster="local"))])
    assert pids_of(run) == []


def noted(run: RunDir, **odd: object) -> None:
    fields = {"stage": "train", "via": "local", "run": str(run.path), "pid": os.getpid(), **odd}
    EventLog(run, "local-1", 0, environment.host()).append("submitted", **fields)


@pytest.mark.parametrize("odd", [{"pid": "x"}, {"pid": None}, {"host": 7}, {"stage": None}])
def test_a_submission_that_does_not_say_which_process_it_began_tells_of_none(
    run: RunDir, odd: dict[str, object]
) -> None:
    noted(run, **odd)
    assert local.running(run) is None


def started_on(run: RunDir, user: int | None = None) -> subprocess.Popen[bytes]:
    """Stands there as a process of the run's does, and does nothing."""
    argv = [sys.executable, "-c", "import time; time.sleep(300)", "-m", "launch.queue.local", str(run.path), "[]"]
    process = subprocess.Popen(argv, env={**os.environ, "DDPM_JOB": "local-1"}, user=user)
    noted(run, pid=process.pid)
    wait_for(lambda: pids_of(run) == [process.pid], "the process")
    return process


def test_a_process_trains_the_run_that_it_was_started_on_and_no_copy_of_it(run: RunDir, tmp_path: Path) -> None:
    with started_on(run) as process:
        copy = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
        found = (local.running(run), local.running(copy))
        process.kill()
    assert found == (process.pid, None) and local.running(run) is None


def test_a_process_of_another_users_has_the_run_too(run: RunDir) -> None:
    """Its environment cannot be read, its words can."""
    requires(os.geteuid() == 0, "other users are needed", "run the tests as root")
    with tempfile.TemporaryDirectory() as where:
        Path(where).chmod(0o755)
        theirs = RunDir(shutil.copytree(run.path, Path(where) / "theirs"))
        ask = "import sys, pathlib; from ddpm.run.paths import RunDir; from launch.queue import local; "
        ask += "print(local.running(RunDir(pathlib.Path(sys.argv[1]))))"
        with started_on(theirs, user=61001) as process:
            argv = [sys.executable, "-c", ask, str(theirs.path)]
            done = subprocess.run(argv, user=61002, capture_output=True, text=True, timeout=60, cwd=PROJECT)
            process.kill()
        assert done.stdout == f"{process.pid}\n", done.stderr


def test_a_job_behind_several_waits_for_the_last_of_them(run: RunDir) -> None:
    done = run.path / "done"
    command = ["/bin/touch", str(done), "launch.jobs", "train", str(run.path)]
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    two = [subprocess.Popen(["sleep", "300"], env={**env, "DDPM_JOB": f"local-{i}"}) for i in range(2)]
    behind = [word for i, before in enumerate(two) for word in (str(before.pid), f"local-{i}")]
    argv = [sys.executable, "-m", "launch.queue.local", str(run.path), json.dumps([command]), *behind]
    waiting = subprocess.Popen(argv, cwd=run.path, env={**env, "DDPM_JOB": "local-9"})
    noted(run, pid=waiting.pid, behind=behind)
    for before in reversed(two):  # as where the one in the middle of a line is cancelled
        assert local.is_behind(read_events(run)) and waiting.poll() is None and not done.exists()
        before.kill()
        before.wait()
    assert waiting.wait(60) == 0 and done.exists() and not local.is_behind(read_events(run))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_job_behind_another_runs_begins_when_that_has_ended_or_ends_itself_where_it_is_stopped(
    run: RunDir, stopped: bool
) -> None:
    done = run.path / "done"
    command = ["/bin/touch", str(done), "launch.jobs", "train", str(run.path)]
    with subprocess.Popen(["sleep", "300"], env={**os.environ, "DDPM_JOB": "local-0"}) as before:
        behind = [str(before.pid), "local-0"]
        argv = [sys.executable, "-m", "launch.queue.local", str(run.path), json.dumps([command]), *behind]
        of_the_project = {**os.environ, "DDPM_JOB": "local-1", "PYTHONPATH": str(PROJECT)}
        waiting = subprocess.Popen(argv, cwd=run.path, env=of_the_project)
        noted(run, pid=waiting.pid, behind=behind)
        assert local.is_behind(read_events(run)) and not done.exists()
        if stopped:
            run.stop_file.touch()
            assert waiting.wait(60) == 0 and not done.exists() and before.poll() is None
        before.kill()
    assert waiting.wait(60) == 0 and done.exists() is not stopped and not local.is_behind(read_events(run))


def test_a_stop_signal_that_comes_when_a_stage_is_done_already_ends_the_job_all_the_same(run: RunDir) -> None:
    begun, go, done = (run.path / name for name in ("begun", "go", "done"))
    last_step = f"trap '' TERM; touch '{begun}'; until [ -e '{go}' ]; do sleep 0.1; done"
    commands = [["/bin/sh", "-c", last_step, "launch.jobs", "train", str(run.path)],
                ["/bin/touch", str(done), "launch.jobs", "sample", str(run.path), "few"]]  # fmt: skip
    argv = [sys.executable, "-m", "launch.queue.local", str(run.path), json.dumps(commands)]
    of_the_project = {**os.environ, "DDPM_JOB": "local-1", "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(argv, cwd=run.path, env=of_the_project) as job:
        wait_for(begun.exists, "the first stage")
        job.terminate()
        go.touch()
        assert job.wait(60) == 128 + signal.SIGTERM and not done.exists()


@pytest.mark.parametrize(
    ("signum", "told"),
    [(9, "SIGKILL, as by the kernel where memory runs out"), (7, "SIGBUS, as where a file that is mapped"),
     (8, "SIGFPE"), (35, "signal 35")],
)  # fmt: skip
def test_a_stage_that_was_killed_is_told_in_the_log_since_it_could_not_say_so_itself(
    run: RunDir, signum: int, told: str
) -> None:
    command = ["/bin/sh", "-c", f"kill -{signum} $$", "launch.jobs", "train", str(run.path)]
    argv = [sys.executable, "-m", "launch.queue.local", str(run.path), json.dumps([command])]
    of_the_project = {**os.environ, "DDPM_JOB": "local-1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(argv, cwd=run.path, env=of_the_project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signum and f"train was killed by {told}" in done.stdout, done.stderr
    (event,) = read_events(run)
    assert event["event"] == "failed" and event["reason"].startswith(f"train was killed by {told}")


@pytest.mark.parametrize(("code", "said", "told"), [
    (-9, "", "train was killed by SIGKILL, as by the kernel where memory runs out"),
    (1, "", "train ended with exit code 1"),
    (1, "no room", "train ended with exit code 1: no room"),
])  # fmt: skip
def test_the_owner_is_told_once_how_a_job_here_ended(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, code: int, said: str, told: str
) -> None:
    heard: list[str] = []
    monkeypatch.setenv("DDPM_JOB", "local-1")
    monkeypatch.setattr(local.ending, "of_failure", lambda *words: heard.append(words[-1]))
    if said:
        EventLog(run, "local-1", 0, "here").append("failed", reason=said)
    local._tell(run, "train", "", code)
    assert heard == [told]


SAID = """\
Traceback (most recent call last):
  File "x.py", line 3, in <module>
ValueError: ours
W1128 16:15:58.933000 31560 torch/distributed/elastic/multiprocessing/api.py:1019] Sending process 31743 closing signal
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
ROOT = """\
Root Cause (first observed failure):
[0]:
  time      : 2026-11-28_16:15:58
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 31744){more}
"""


@pytest.mark.parametrize(("said", "told"), [
    ("", "ended with exit code 1"), (SAID, "ended with exit code 1: ValueError: ours"),
    (ROOT.format(code=-9, more="  (SIGKILL)"), "ended, since rank 1 was killed by SIGKILL, as by the kernel where"),
    (SAID + ROOT.format(code=1, more=""), "ended with exit code 1: ValueError: ours"),
])  # fmt: skip
def test_why_ranks_ended_is_told_as_torchrun_has_seen_it(run: RunDir, said: str, told: str) -> None:
    (run.logs / "local-1.out").write_text(said)
    assert local._how_said(run, "local-1", 1).startswith(told)
