"""Whether a job's end is the end of the run, from the run directory and the jobs that follow; its owner is then told.

Training that is followed by sampling does not end the run, jobs for milestones never do, and nobody is told of a run
that a person has stopped.
"""

from __future__ import annotations

from dataclasses import replace

from ddpm.config import reading
from ddpm.errors import EXIT_BUSY, RequestError
from ddpm.run.files import DamagedFile, read_json
from ddpm.run.paths import RunDir
from ddpm.run.state import finished_step
from ddpm.scoring.record import scores_of, told
from launch.cluster import scheduler
from launch.cluster.environment import JobEnvironment
from launch.queue import notify
from launch.queue.sets import wrong_with
from launch.queue.waiting import is_told_to_stop


def of_success(run: RunDir, env: JobEnvironment, stage: str, set_name: str) -> None:
    """Tell that the run has finished, if this job, which succeeded, was its last one."""
    if not _is_asked(run, env, set_name):
        return
    try:
        made = _made(run, stage, set_name)
    except (OSError, DamagedFile, RequestError):
        return
    if made and not _follows(env):
        notify.tell(run, env, "has finished", f"{made}; {run.path}", stage=stage)


def of_failure(run: RunDir, env: JobEnvironment, stage: str, set_name: str, code: int, reason: str) -> None:
    """Tell that the run has failed, unless a later job repairs it, or an earlier failure was told already."""
    if code == EXIT_BUSY or not _is_asked(run, env, set_name):
        return
    try:
        waits_for_training = stage != "train" and finished_step(run, reading.of_run(run)) is None
        if waits_for_training and not run.sample_set(set_name).request.exists():
            return
    except (OSError, DamagedFile, RequestError):
        pass
    if stage == "sample" and _follows(env):  # which has made what is missing
        return
    notify.tell(run, env, "has failed", f"{reason}; {run.path}", stage=stage)


def of_hold(run: RunDir, env: JobEnvironment, stage: str, set_name: str) -> None:
    """Tell that the job is held, if SLURM says so of a job that it requeues."""
    if not _is_asked(run, env, set_name):
        return
    try:
        found = scheduler.look_up([env.job]).get(env.job)
    except scheduler.SchedulerError:
        return
    end = f"python launch/cancel.py {run.quoted}"  # as in work.py, which cannot be imported from here
    wait = scheduler.explain(env.job, replace(found, state="PENDING"), end) if found else None  # COMPLETING before
    if wait is not None and wait.held:
        notify.tell(run, env, notify.HELD, f"{stage} job {env.job}: {wait}; {run.path}", stage=stage)


def _is_asked(run: RunDir, env: JobEnvironment, set_name: str) -> bool:
    try:
        return run.notify.exists() and not is_told_to_stop(run, env.job) and not set_name.startswith("milestone")
    except OSError:
        return False


def _follows(env: JobEnvironment) -> bool:
    try:
        return env.is_scheduled and bool(scheduler.followers(env.job))
    except scheduler.SchedulerError:  # to be told early is better than never
        return False


def _made(run: RunDir, stage: str, set_name: str) -> str:
    """The job's result in words, "" if it is not complete. Raises OSError, DamagedFile, RequestError."""
    if stage == "train":
        step = finished_step(run, reading.of_run(run))
        return "" if step is None else f"step {step}"
    of = run.sample_set(set_name)
    asked = (read_json(of.request) or {}).get("shards")
    if asked is not None and of.num_published() != asked:
        return ""
    if stage == "sample":
        return f"samples {set_name}" if asked else ""
    return next((told(score.record) for score in reversed(scores_of(run, set_name)) if not wrong_with(run, score)), "")
