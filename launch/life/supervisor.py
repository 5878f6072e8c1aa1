"""The end of a batch shell: gathers the evidence, decides whether the job is requeued, does it or says why not.

    python -m launch.life.supervisor RUN STAGE EXIT_CODE [SET]

decision.py has the rules.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ddpm.errors import EXIT_REQUEUE
from ddpm.run.events import EventLog, read_events
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler
from launch.cluster.environment import JobEnvironment
from launch.life.decision import (
    Evidence,
    bad_nodes,
    blames_its_node,
    decide,
    mistaken_again,
    not_ours,
    wait_s,
)
from launch.life.gathering import forget_shard, gather, say
from launch.life.last_words import LastWords, last_words
from launch.life.life import after_scancel
from launch.queue import ending
from launch.queue.nodes import by_the_profile, may_do_without
from launch.queue.submitting import submit_successor
from launch.queue.waiting import of_this_cluster
from launch.terminal import streams

KILLED_WITHIN_S = 300


def end(run: RunDir, stage: str, code: int, set_name: str) -> int:
    """Decide about the job whose batch shell this is; returns the exit code that the shell leaves with."""
    env = environment.current()
    log = env.events(run)
    known = gather(run, env, stage, code, set_name)
    words = last_words(run, stage, env) if known.code else LastWords()
    if known.reason == "crash" and words.lacked:
        known = replace(known, reason="out_of_memory")
    if known.reason == "crash":
        with contextlib.suppress(OSError):
            told = of_this_cluster(read_events(run))
            known = replace(known, mistaken=mistaken_again(told, env.job, words.error, known.progress))
    decision = decide(known)
    died = decision.goes_on and blames_its_node(known)
    bad = (words.node or env.host) if died and not words.by_no_node else ""
    if decision.goes_on and known.can_tell:
        fields = {"reason": known.reason, "exit_code": known.code, "progress": known.progress, "stage": stage}
        fields |= {"wait_s": wait_s(known)} if wait_s(known) else {}
        fields |= {"bad_node": bad} if bad else {}
        fields |= {"error": words.error} if died else {}
        if not _note(run, log, "requeued", **fields):
            decision = decide(replace(known, can_tell=False))
    if decision.what == "fail":
        forget_shard(run, env)
        return _failed(run, log, known.code, stage, set_name, decision.why, words)
    avoided = _without(bad, known.shown, run, words.error) if bad and known.shown else ""
    if decision.what == "succeed":
        _have_a_successor(run, env, stage, decision.why, avoided, known)
    elif decision.what == "requeue":
        _put_back(env, decision.why, avoided, wait_s(known))
    elif decision.why:
        say(decision.why)
        told = of_this_cluster(read_events(run)) if words.cancelled else []
        if words.cancelled and not any(e["event"] == "cancelled" and e["job"] == env.job for e in told):
            after_scancel(run, env)  # its ranks could not, in a container
        ending.of_hold(run, env, stage, set_name)
    elif known.code == 0:
        ending.of_success(run, env, stage, set_name)
    return known.code


# ---------------------------------------------------------------- what is done


def _without(bad: str, shown: scheduler.Shown, run: RunDir, error: str) -> str:
    """The node list to exclude from now on, with `bad` added; "" if too few nodes would be left without `bad`, or if
    the life died there of the site profile."""
    this = {"bad_node": bad, "error": error}
    try:
        if by_the_profile(of_this_cluster(read_events(run)), this):
            say(f"no fault of node {bad}, which is not left out: mend the site profile's `setup` ({error})")
            return ""
    except OSError:
        pass
    try:
        total, spare = scheduler.spare_nodes(shown.partition.split(",")[0], shown.excluded)
    except scheduler.SchedulerError as e:
        say(
            f"node {bad} is not left out, though a life died there by itself: {e}; by hand: submit with --exclude {bad}"
        )
        return ""
    if not may_do_without(bad, total, spare, environment.num_nodes()):
        return ""
    say(f"node {bad} is left out from now on: a life of this job died there by itself")
    return ",".join(filter(None, [shown.excluded, bad]))


def _put_back(env: JobEnvironment, told: str, avoided: str, wait_s: int) -> bool:
    """Whether it is back. Raises SchedulerError."""

    def order() -> bool:
        if not _still_ours(env):
            return False
        scheduler.requeue(env.job)
        return True

    later = f", which is not to begin in less than {wait_s} s: it is not the first retry in a row" if wait_s else ""
    say(f"{told} requeueing job {env.job}{later}")
    shell = os.getppid()
    with _undisturbed():  # SLURM ends this shell as soon as it has put the job back, and the node is yet to be excluded
        is_back = scheduler.patiently(order)
        if is_back:
            _exclude(env, avoided)
            _delay(env, wait_s)
    # SLURM ends the shell: leaving first would race the requeue
    for _ in range(KILLED_WITHIN_S if is_back else 0):
        if os.getppid() != shell:
            break
        time.sleep(1)
    return is_back


def _delay(env: JobEnvironment, wait_s: int) -> None:
    try:
        if wait_s:
            scheduler.delay(env.job, wait_s)
    except scheduler.SchedulerError as e:
        say(f"the job may begin at once: {e}")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Within: SIGTERM does not end this process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exclude(env: JobEnvironment, avoided: str) -> None:
    """Exclude nodes from this job, which waits again, from other tasks of its array, and from jobs that wait for it."""
    if not avoided:
        return
    base = env.job.partition("_")[0]
    try:
        scheduler.exclude(env.job, avoided)
        others = [*([base] if base != env.job else []), *scheduler.followers(base)]
    except scheduler.SchedulerError as e:
        say(f"{avoided} could not be excluded: {e}; by hand: scontrol update jobid={env.job} excnodelist={avoided}")
        return
    for other in others:
        with contextlib.suppress(scheduler.SchedulerError):  # tasks that run cannot be changed, the others are
            scheduler.exclude(other, avoided)


def _have_a_successor(run: RunDir, env: JobEnvironment, stage: str, told: str, avoided: str, known: Evidence) -> None:
    excluded = avoided or (known.shown.excluded if known.shown else "")

    def order() -> str | None:
        return submit_successor(run, stage, env.job, excluded) if _still_ours(env, or_preempted=True) else None

    try:
        successor = scheduler.patiently(order)
    except (scheduler.NoAnswer, scheduler.NoJobId):
        raise
    except scheduler.SchedulerError as refused:  # such as a full queue, in which this job is one of those that fill it
        say(f"no successor: {_in_a_line(refused)}")
        if known.shown is not None and known.shown.may_requeue:
            with contextlib.suppress(scheduler.SchedulerError):
                if _put_back(env, told, avoided, wait_s(known)):
                    return
        raise
    if successor is not None:
        _chain_waits_for(successor, env.job)
        say(f"{told} requeue is forbidden: successor job {successor}")


def _still_ours(env: JobEnvironment, *, or_preempted: bool = False) -> bool:
    """Whether this life may still be requeued or succeeded: asked right before each such order. SchedulerError."""
    why = not_ours(scheduler.show(env.job), env.restart, or_preempted=or_preempted)
    if why:
        say(why)
    return not why


def _chain_waits_for(successor: str, job: str) -> None:
    """Make jobs that wait for this job wait for its successor; otherwise they would start on unfinished work."""
    try:
        for waiting in scheduler.dependents(job):
            scheduler.make_wait(waiting, successor)
            say(f"job {waiting} now waits for {successor}")
    except scheduler.SchedulerError as e:
        say(f"what waits for this job could not be made to wait for {successor}: {e}; by hand, for each job that does: "
            f"scontrol update jobid=JOB dependency=afterany:{successor}")  # fmt: skip


def _note(run: RunDir, log: EventLog, event: str, **fields: object) -> bool:
    """Append an event; returns whether it was written: a full disk must not keep the job from being requeued."""
    try:
        log.append(event, world_size=environment.num_tasks(), step=run.latest_step(), **fields)
    except OSError as e:
        say(f"event {event} not written: {e}")
        return False
    return True


def _failed(run: RunDir, log: EventLog, code: int, stage: str, set_name: str, why: str, words: LastWords) -> int:
    """Say that the job has failed for good, in its log, its events and to the owner; returns `code`."""
    env = environment.current()
    reason = f"{why}: {words.told(stage, env.host, environment.memory_asked_for())}"
    with contextlib.suppress(OSError):
        if nodes := bad_nodes(of_this_cluster(read_events(run)), env.job):
            reason += f"; lives of it died on {', '.join(nodes)} before"
    fields = {"log_file": str(words.log) if words.log else None, "last_error": words.error or None}
    _note(run, log, "failed", stage=stage, exit_code=code, reason=reason, **fields)
    say(f"failed: {reason}")
    ending.of_failure(run, env, stage, set_name, code, reason)
    return code


def _in_a_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())


def main() -> int:
    environment.supervisor_is_heard()
    streams.make_safe()
    path, stage, code, *rest = sys.argv[1:]
    run, set_name = RunDir(Path(path)), rest[0] if rest else ""
    try:
        return end(run, stage, int(code), set_name)
    except (scheduler.SchedulerError, OSError) as e:
        env = environment.current()
        why = f"could not be put back: {_in_a_line(e)}; submit the run again"
        code_left = int(code) or EXIT_REQUEUE
        return _failed(run, env.events(run), code_left, stage, set_name, why, last_words(run, stage, env))


if __name__ == "__main__":
    sys.exit(main())
