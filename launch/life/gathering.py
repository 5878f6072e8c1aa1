"""Gathers the evidence about a job at the end of its batch shell, as far as it can be read and asked."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ddpm.errors import EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE
from ddpm.run.events import read_events
from ddpm.run.files import seconds
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.cluster.environment import JobEnvironment
from launch.life.decision import Evidence, not_ours, retries_without_progress, uncounted_lives
from launch.life.progress import progress
from launch.queue.waiting import is_told_to_stop, mercy_for, of_this_cluster

SETTLE_S = 10
READ_PATIENCE_S = 60
HURRIED_S = 15
"""The same of a life that saved and left, for the little time that it had."""
AFTER_SUSPENSION_S = 300

T = TypeVar("T")


def gather(run: RunDir, env: JobEnvironment, stage: str, code: int, set_name: str) -> Evidence:
    """The evidence about a job, cheapest questions first. Raises SchedulerError if SLURM does not answer."""
    word = _read(lambda: _ranks_word(run, env), code)
    said, _, why = (word or "").partition(" ")
    known = Evidence(stage, code, restart=env.restart)
    if re.fullmatch(r"[0-9]{1,3}", said):  # empty where the disk was full
        known = replace(known, code=int(said), reason=why)
    if known.code in (0, EXIT_FATAL):
        forget_shard(run, env)
        return known
    asked_at = time.monotonic()
    shown = scheduler.patiently(lambda: scheduler.show(env.job))
    known = replace(known, shown=shown)
    if known.reason == "crash" and shown is not None and _was_suspended(shown, env):
        known = replace(known, reason="suspended")
    if known.code == EXIT_BUSY or shown is None or not_ours(shown, env.restart, or_preempted=True):
        return known
    if time.monotonic() - asked_at > scheduler.RETRY_S:  # a slurmctld that has just come back may lose a requeue
        time.sleep(SETTLE_S)
    hurried = EXIT_REQUEUE if word is None else known.code  # it was waited for: this job's time may be over soon
    known = _read(lambda: _of_the_run(known, run, env, set_name), hurried) or _unreadable(known, run, env)
    if stage != "sample" and (shown.preempted or known.reason in ("preempted", "save_failed")):
        known = replace(known, mercy=mercy_for(run, env.job))
    return known


def _was_suspended(shown: scheduler.Shown, env: JobEnvironment) -> bool:
    """Whether SLURM suspended this life and resumed it shortly before it died: its ranks took each other for dead."""
    at = shown.suspended_at
    return at is not None and at > env.since and time.time() - seconds(at) < AFTER_SUSPENSION_S


def forget_shard(run: RunDir, env: JobEnvironment) -> None:
    with contextlib.suppress(OSError):
        run.shard_marker(env.job).unlink(missing_ok=True)


def _ranks_word(run: RunDir, env: JobEnvironment) -> str:
    """The exit code and reason that rank 0 left, past srun, which may report another rank's; "" where it left none."""
    marker = run.exit_marker(env.job, env.restart)
    try:
        said = marker.read_text(errors="replace")
    except FileNotFoundError:
        if _is_away(run):
            raise
        return ""
    with contextlib.suppress(OSError):
        marker.unlink()
    return said


def _is_away(run: RunDir) -> bool:
    """Whether a run is away with what it is on, as a mount may be for a moment: then nothing is beside it either."""
    try:
        return not run.path.is_dir() and not any(run.path.parent.iterdir())
    except OSError:
        return True


def _of_the_run(known: Evidence, run: RunDir, env: JobEnvironment, set_name: str) -> Evidence:
    """`known` with what the run directory shows. Raises OSError."""
    here, events = progress(run, env.job, known.stage, set_name), of_this_cluster(read_events(run))
    return replace(
        known,
        stop_file=is_told_to_stop(run, env.job),
        progress=here,
        retries=retries_without_progress(events, env.job, here),
        uncounted=uncounted_lives(events, env.job, env.restart),
    )


def _unreadable(known: Evidence, run: RunDir, env: JobEnvironment) -> Evidence:
    try:
        events = of_this_cluster(read_events(run))
    except OSError:
        events = []
    return replace(known, can_tell=False, uncounted=uncounted_lives(events, env.job, env.restart))


def while_away(ask: Callable[[], T], code: int) -> T:
    """Call `ask`, repeatedly while the run's file system fails, as ranks wait for it too. Raises OSError if it fails
    for READ_PATIENCE_S. code: of this life."""
    patience_s = HURRIED_S if code == EXIT_REQUEUE else READ_PATIENCE_S
    return scheduler.patiently(ask, OSError, min(scheduler.PATIENCE_S, patience_s))


def _read(ask: Callable[[], T], code: int) -> T | None:
    try:
        return while_away(ask, code)
    except OSError as e:
        say(f"the run directory cannot be read: {e}")
        return None


def say(text: str) -> None:
    """Print a line to the job's log; a full disk is ignored, so that the job is still requeued."""
    with contextlib.suppress(OSError):
        print(f"[batch] {text}", flush=True)
