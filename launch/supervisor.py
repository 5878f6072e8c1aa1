"""The end of every batch shell, on both submission paths: put the job back, or say why not.

    python -m launch.supervisor RUN STAGE EXIT_CODE [SET]

A crash leaves SLURM's job FAILED, which SLURM never requeues; a job that saved before its time limit left with 75. Both
are put back here, and only while SLURM calls this very life of the job RUNNING: under scancel it is COMPLETING, and a
requeue would raise it from the dead; and where a node was out of reach, a later life may run elsewhere. Policy by
progress: endless while saved steps advance; failed after MAX_RETRIES retries in a row without a new one. SLURM itself
requeues what it pre-empts; where it does not, a successor goes on, also for a job that is COMPLETING by pre-emption.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ddpm.errors import EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE
from ddpm.rundir import EventLog, RunDir, read_events
from launch import environment, slurm
from launch.queue.submitting import submit_successor

MAX_RETRIES = 3
KILLED_WITHIN_S = 300
SETTLE_S = 10
READ_PATIENCE_S = 15

T = TypeVar("T")


def progress(run: RunDir, stage: str, set_name: str) -> int:
    """What advances when a life of this stage was not in vain: saved steps, or finished batches and shards.

    Raises OSError where it cannot look.
    """
    if stage == "train":
        return run.latest_step()
    where = run.sample_set(set_name)
    done = [n for n in _names(where.path) if n.startswith(("shard-", "features-")) and n.endswith(".json")]
    return len(_names(where.part)) + len(done)


def _names(directory: Path) -> list[str]:
    try:
        return [p.name for p in directory.iterdir()]
    except FileNotFoundError:
        return []


def retries_without_progress(run: RunDir, job: str, now_at: int) -> int:
    """How many times in a row `job`, or those it succeeds, was put back by its own fault at the progress it has."""
    count, lives = 0, {job}
    for event in reversed(read_events(run)):
        if event.get("job") in lives and event.get("successor_of"):
            lives.add(event["successor_of"])
        if event["event"] != "requeued" or event.get("job") not in lives:
            continue
        if event.get("progress") != now_at:
            break
        count += event.get("reason") != "preempted"
    return count


def end(run: RunDir, stage: str, code: int, set_name: str) -> int:
    """Decide about the job whose batch shell this is; returns the exit code that the shell leaves with."""
    env = environment.current()
    log = env.events(run)
    reason = "crash"
    said, _, why = (_read(lambda: _ranks_word(run, env)) or "").partition(" ")
    if said.isdigit():  # empty where the disk was full
        code, reason = int(said), why
    if code == 0:
        return 0
    failed = partial(_failed, log, code, stage)
    if code == EXIT_BUSY and not slurm.patiently(lambda: _runs(env)):
        return code  # an orphan, which its own job's later life has fenced out
    if code in (EXIT_BUSY, EXIT_FATAL):
        why = "another job holds the run" if code == EXIT_BUSY else "starting again would end the same way"
        return failed(f"exit code {code}: {why}; the log above says more")
    asked_at = time.monotonic()
    shown = slurm.patiently(lambda: _runs(env, or_preempted=True))
    if shown is None:
        return code
    if time.monotonic() - asked_at > slurm.RETRY_S:  # a slurmctld that has just come back may lose a requeue
        time.sleep(SETTLE_S)
    found = _read(lambda: _evidence(run, env, stage, set_name))
    forbids, here, tried = found or (False, None, 0)
    if forbids:
        return failed("a STOP file forbids another start")
    if tried >= MAX_RETRIES and reason != "preempted":
        return failed(
            f"{tried + 1} lives in a row ended ({reason}, exit code {code}) without progress "
            f"beyond {here}; see the log, mend the cause, submit again"
        )
    # Where pre-emption means cancelling, SLURM lets a job requeue itself but remembers that it was to end it. The task
    # of an array has no successor: it comes back by itself, or is made up for later.
    stopped = reason in ("preempted", "save_failed") or shown.preempted
    mercy = slurm.mercy(env.job) if stopped and stage != "sample" else None
    cancels = mercy is not None and not mercy.requeues
    if shown.preempted and (mercy is None or mercy.requeues or mercy.grace_s > 0):
        _say("SLURM is ending the job: leaving it to SLURM")
        return code  # with a grace period it is scancel that ends a job so early
    forbidden = cancels or not shown.may_requeue
    if forbidden and stage == "sample":
        return failed("requeue is forbidden; the evaluation, or launch/sample.py, makes what is missing")
    noted = found is not None and _note(log, "requeued", reason=reason, exit_code=code, progress=here, stage=stage)
    if not noted and reason != "preempted" and (forbidden or _uncounted_lives(run, env) >= MAX_RETRIES):
        lacks = "can be read" if found is None else "can be written to events/: make room there"
        return failed(f"its lives cannot be counted while nothing {lacks}; submit the run again")
    told = f"exit code {code} ({reason}); progress {'unknown' if here is None else here};"
    if forbidden:
        successor = slurm.patiently(
            lambda: submit_successor(run, stage, env.job) if _runs(env, or_preempted=True) else None
        )
        if successor is not None:
            _chain_waits_for(successor, env.job)
            _say(f"{told} requeue is forbidden: successor job {successor}")
        return code
    _say(f"{told} requeueing job {env.job}")
    if slurm.patiently(lambda: _requeue(env)):
        time.sleep(KILLED_WITHIN_S)  # SLURM ends this shell: leaving first would race the requeue
    return code


def _read(ask: Callable[[], T]) -> T | None:
    """What the run directory says; None where its file system fails for long: before a time limit there is little."""
    try:
        return slurm.patiently(ask, OSError, min(slurm.PATIENCE_S, READ_PATIENCE_S))
    except OSError as e:
        _say(f"the run directory cannot be read: {e}")
        return None


def _ranks_word(run: RunDir, env: environment.JobEnvironment) -> str:
    """The exit code and reason that rank 0 left, past srun, which may report another rank's; "" where it left none."""
    marker = run.exit_marker(env.job, env.restart)
    try:
        said = marker.read_text()
    except FileNotFoundError:
        return ""
    with contextlib.suppress(OSError):
        marker.unlink()
    return said


def _evidence(run: RunDir, env: environment.JobEnvironment, stage: str, set_name: str) -> tuple[bool, int, int]:
    """Whether there is a STOP file, the progress, and how many retries in a row did not add to it. Raises OSError."""
    here = progress(run, stage, set_name)
    return run.stop_file.exists(), here, retries_without_progress(run, env.job, here)


def _requeue(env: environment.JobEnvironment) -> bool:
    if not _runs(env):
        return False
    slurm.requeue(env.job)
    return True


def _runs(env: environment.JobEnvironment, *, or_preempted: bool = False) -> slurm.Shown | None:
    """What SLURM says of this life where it is still to be put back: asked right before each such order.

    or_preempted: or followed by a successor, which may also be where pre-emption is ending it. Raises SlurmError.
    """
    shown = slurm.show(env.job)
    if shown is None or shown.state != "RUNNING":
        if or_preempted and shown is not None and shown.preempted and shown.restarts == env.restart:
            return shown
        _say(f"SLURM calls the job {shown.state if shown else 'gone'}: leaving it to SLURM")
    elif shown.restarts != env.restart:
        _say(f"SLURM runs life {shown.restarts} of the job, and this is {env.restart}: leaving it alone")
    else:
        return shown
    return None


def _uncounted_lives(run: RunDir, env: environment.JobEnvironment) -> int:
    """How many lives of the job began since the last that had room to tell what became of it."""
    try:
        events = read_events(run)
    except OSError:
        events = []
    told = (e for e in events if e.get("job") == env.job and e["event"] != "allocated")
    return env.restart - max((int(e["restart"]) for e in told), default=0)


def _chain_waits_for(successor: str, job: str) -> None:
    """What was to follow this job follows its successor; otherwise it would start on unfinished work."""
    try:
        for waiting in slurm.dependents(job):
            slurm.make_wait(waiting, successor)
            _say(f"job {waiting} now waits for {successor}")
    except slurm.SlurmError as e:
        _say(f"what waits for this job could not be made to wait for {successor}: {e}")


def _say(text: str) -> None:
    """A line in the job's log; where the log's disk is full, the job is put back without a word."""
    with contextlib.suppress(OSError):
        print(f"[batch] {text}", flush=True)


def _note(log: EventLog, event: str, **fields: object) -> bool:
    """Whether it was written: a disk too full for one more line must not cost the job its return."""
    run = RunDir(log.path.parent.parent)
    try:
        log.append(event, world_size=environment.num_tasks(), step=run.latest_step(), **fields)
    except OSError as e:
        _say(f"event {event} not written: {e}")
        return False
    return True


def _failed(log: EventLog, code: int, stage: str, reason: str) -> int:
    _note(log, "failed", stage=stage, exit_code=code, reason=reason)
    _say(f"failed: {reason}")
    return code


def main() -> int:
    path, stage, code, *rest = sys.argv[1:]
    run = RunDir(Path(path))
    try:
        return end(run, stage, int(code), rest[0] if rest else "")
    except (slurm.SlurmError, OSError) as e:
        log = environment.current().events(run)
        return _failed(log, int(code) or EXIT_REQUEUE, stage, f"could not be put back: {e}; submit the run again")


if __name__ == "__main__":
    sys.exit(main())
