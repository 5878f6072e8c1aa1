"""The end of a batch shell: gather the evidence, decide whether the job is put back, do it or say why not.

    python -m launch.life.supervisor RUN STAGE EXIT_CODE [SET]

What is decided, and why, is decision.py's.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ddpm.errors import EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE
from ddpm.run.events import EventLog, read_events
from ddpm.run.paths import RunDir
from launch.cluster import environment, slurm
from launch.cluster.environment import JobEnvironment
from launch.life.decision import (
    Evidence,
    bad_nodes,
    blames_its_node,
    decide,
    not_ours,
    retries_without_progress,
    uncounted_lives,
)
from launch.life.last_words import LastWords, last_words
from launch.life.life import shard_marker
from launch.life.progress import progress
from launch.queue.nodes import may_do_without
from launch.queue.submitting import submit_successor
from launch.queue.waiting import mercy_for
from launch.terminal import streams

KILLED_WITHIN_S = 300
SETTLE_S = 10
READ_PATIENCE_S = 15

T = TypeVar("T")


def end(run: RunDir, stage: str, code: int, set_name: str) -> int:
    """Decide about the job whose batch shell this is; returns the exit code that the shell leaves with."""
    env = environment.current()
    log = env.events(run)
    known = gather(run, env, stage, code, set_name)
    words = last_words(run, stage, env) if known.code else LastWords()
    if known.reason == "crash" and words.lacked:
        known = replace(known, reason="out_of_memory")
    decision = decide(known)
    bad = (words.node or env.host) if decision.goes_on and blames_its_node(known) else ""
    if decision.goes_on and known.can_tell:
        fields = {"reason": known.reason, "exit_code": known.code, "progress": known.progress, "stage": stage}
        if not _note(log, "requeued", **fields, **({"bad_node": bad, "error": words.error} if bad else {})):
            decision = decide(replace(known, can_tell=False))
    if decision.what == "fail":
        _forget_shard(run, env)
        return _failed(log, known.code, stage, decision.why, words)
    avoided = _without(bad, known.shown) if bad and known.shown else ""
    if decision.what == "succeed":
        _have_a_successor(run, env, stage, decision.why, avoided or (known.shown.excluded if known.shown else ""))
    elif decision.what == "requeue":
        _put_back(env, decision.why, avoided)
    elif decision.why:
        _say(decision.why)
    return known.code


# ---------------------------------------------------------------- the evidence


def gather(run: RunDir, env: JobEnvironment, stage: str, code: int, set_name: str) -> Evidence:
    """What is known of the job, in the order of what it costs to ask. Raises SlurmError where SLURM stays silent."""
    said, _, why = (_read(lambda: _ranks_word(run, env)) or "").partition(" ")
    known = Evidence(stage, code, restart=env.restart)
    if re.fullmatch(r"[0-9]{1,3}", said):  # empty where the disk was full
        known = replace(known, code=int(said), reason=why)
    if known.code in (0, EXIT_FATAL):
        _forget_shard(run, env)
        return known
    asked_at = time.monotonic()
    shown = slurm.patiently(lambda: slurm.show(env.job))
    known = replace(known, shown=shown)
    if known.code == EXIT_BUSY or shown is None or not_ours(shown, env.restart, or_preempted=True):
        return known
    if time.monotonic() - asked_at > slurm.RETRY_S:  # a slurmctld that has just come back may lose a requeue
        time.sleep(SETTLE_S)
    known = _read(lambda: _of_the_run(known, run, env, set_name)) or _unreadable(known, run, env)
    if stage != "sample" and (shown.preempted or known.reason in ("preempted", "save_failed")):
        known = replace(known, mercy=mercy_for(run, env.job))
    return known


def _forget_shard(run: RunDir, env: JobEnvironment) -> None:
    with contextlib.suppress(OSError):
        shard_marker(run, env.job).unlink(missing_ok=True)


def _ranks_word(run: RunDir, env: JobEnvironment) -> str:
    """The exit code and reason that rank 0 left, past srun, which may report another rank's; "" where it left none."""
    marker = run.exit_marker(env.job, env.restart)
    try:
        said = marker.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    with contextlib.suppress(OSError):
        marker.unlink()
    return said


def _of_the_run(known: Evidence, run: RunDir, env: JobEnvironment, set_name: str) -> Evidence:
    """With what the run directory says. Raises OSError."""
    here, events = progress(run, env.job, known.stage, set_name), read_events(run)
    return replace(
        known,
        stop_file=run.stop_file.exists(),
        progress=here,
        retries=retries_without_progress(events, env.job, here),
        uncounted=uncounted_lives(events, env.job, env.restart),
    )


def _unreadable(known: Evidence, run: RunDir, env: JobEnvironment) -> Evidence:
    try:
        events = read_events(run)
    except OSError:
        events = []
    return replace(known, can_tell=False, uncounted=uncounted_lives(events, env.job, env.restart))


def _read(ask: Callable[[], T]) -> T | None:
    """What the run directory says; None where its file system fails for long: before a time limit there is little."""
    try:
        return slurm.patiently(ask, OSError, min(slurm.PATIENCE_S, READ_PATIENCE_S))
    except OSError as e:
        _say(f"the run directory cannot be read: {e}")
        return None


# ---------------------------------------------------------------- what is done


def _without(bad: str, shown: slurm.Shown) -> str:
    """The nodes that the job is not to have any more, as SLURM lists them; "" where it cannot do without this one."""
    try:
        total, spare = slurm.spare_nodes(shown.partition.split(",")[0], shown.excluded)
    except slurm.SlurmError as e:
        _say(f"node {bad} is not left out, though a life died there by itself: {e}")
        return ""
    if not may_do_without(bad, total, spare, environment.num_nodes()):
        return ""
    _say(f"node {bad} is left out from now on: a life of this job died there by itself")
    return ",".join(filter(None, [shown.excluded, bad]))


def _put_back(env: JobEnvironment, told: str, avoided: str) -> None:
    def order() -> bool:
        if not _still_ours(env):
            return False
        slurm.requeue(env.job)
        return True

    _say(f"{told} requeueing job {env.job}")
    with _undisturbed():  # SLURM ends this shell as soon as it has put the job back, and the node is yet to be excluded
        is_back = slurm.patiently(order)
        if is_back:
            _exclude(env, avoided)
    if is_back:
        time.sleep(KILLED_WITHIN_S)  # SLURM ends this shell: leaving first would race the requeue


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Within: SIGTERM does not end this process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exclude(env: JobEnvironment, avoided: str) -> None:
    """From this job, which waits again; from its siblings; and from what waits for it."""
    if not avoided:
        return
    base = env.job.partition("_")[0]
    try:
        slurm.exclude(env.job, avoided)
        others = [*([base] if base != env.job else []), *slurm.followers(base)]
    except slurm.SlurmError as e:
        _say(f"{avoided} could not be excluded: {e}")
        return
    for other in others:
        with contextlib.suppress(slurm.SlurmError):  # tasks that run cannot be changed, the others are
            slurm.exclude(other, avoided)


def _have_a_successor(run: RunDir, env: JobEnvironment, stage: str, told: str, avoided: str) -> None:
    def order() -> str | None:
        return submit_successor(run, stage, env.job, avoided) if _still_ours(env, or_preempted=True) else None

    successor = slurm.patiently(order)
    if successor is not None:
        _chain_waits_for(successor, env.job)
        _say(f"{told} requeue is forbidden: successor job {successor}")


def _still_ours(env: JobEnvironment, *, or_preempted: bool = False) -> bool:
    """Whether this life is still to be put back: asked right before each such order. Raises SlurmError."""
    why = not_ours(slurm.show(env.job), env.restart, or_preempted=or_preempted)
    if why:
        _say(why)
    return not why


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


def _failed(log: EventLog, code: int, stage: str, why: str, words: LastWords) -> int:
    env = environment.current()
    reason = f"{why}: {words.told(stage, env.host, environment.memory_asked_for())}"
    run = RunDir(log.path.parent.parent)
    with contextlib.suppress(OSError):
        if nodes := bad_nodes(read_events(run), env.job):
            reason += f"; lives of it died on {', '.join(nodes)} before"
    fields = {"log_file": str(words.log) if words.log else None, "last_error": words.error or None}
    _note(log, "failed", stage=stage, exit_code=code, reason=reason, **fields)
    _say(f"failed: {reason}")
    return code


def main() -> int:
    environment.supervisor_is_heard()
    streams.make_safe()
    path, stage, code, *rest = sys.argv[1:]
    run = RunDir(Path(path))
    try:
        return end(run, stage, int(code), rest[0] if rest else "")
    except (slurm.SlurmError, OSError) as e:
        env = environment.current()
        why = f"could not be put back: {e}; submit the run again"
        return _failed(env.events(run), int(code) or EXIT_REQUEUE, stage, why, last_words(run, stage, env))


if __name__ == "__main__":
    sys.exit(main())
