"""The end of every batch shell, on both submission paths: put the job back, or say why not.

    python -m launch.supervisor RUN STAGE EXIT_CODE [SET]

A crash leaves SLURM's job FAILED, which SLURM never requeues; a job that saved before its time limit left with 75. Both
are put back here, and only while squeue calls the job RUNNING: under scancel it is COMPLETING, and a requeue would
raise it from the dead. Policy by progress: endless while saved steps advance; failed after MAX_RETRIES retries in a
row without a new one. Pre-emptions never come here: SLURM itself requeues those.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from ddpm.errors import EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE
from ddpm.rundir import EventLog, RunDir, read_events
from launch import environment, slurm
from launch.scheduler import submit_successor

MAX_RETRIES = 3
KILLED_WITHIN_S = 300


def progress(run: RunDir, stage: str, set_name: str) -> int:
    """What advances when a life of this stage was not in vain: saved steps, or finished batches and shards."""
    if stage == "train":
        return run.latest_step()
    where = run.sample_set(set_name).path
    return len([*where.glob("part/*"), *where.glob("shard-*.json"), *where.glob("features-*.json")])


def retries_without_progress(run: RunDir, job: str, now_at: int) -> int:
    """How many times in a row `job`, or those it succeeds, was put back by its own fault at the progress it has."""
    count, lives = 0, {job}
    for event in reversed(read_events(run)):
        if event["event"] != "requeued" or not lives & {event.get("job"), event.get("successor")}:
            continue
        lives.add(str(event["job"]))
        if event.get("progress") != now_at:
            break
        count += event.get("reason") != "preempted"
    return count


def end(run: RunDir, stage: str, code: int, set_name: str) -> int:
    """Decide about the job whose batch shell this is; returns the exit code that the shell leaves with."""
    env = environment.current()
    log = env.events(run)
    marker = run.exit_marker(env.job, env.restart)
    reason = "crash"
    if marker.exists():  # the ranks' own word, past srun, which may report another rank's
        said, _, why = marker.read_text().partition(" ")
        if said.isdigit():  # empty where the disk was full
            code, reason = int(said), why
        marker.unlink(missing_ok=True)
    if code == 0:
        return 0
    if code in (EXIT_BUSY, EXIT_FATAL):
        why = "another job holds the run" if code == EXIT_BUSY else "starting again would end the same way"
        return _failed(log, code, f"exit code {code}: {why}; the log above says more")
    state = slurm.patiently(lambda: slurm.job_state(env.job))
    if state != "RUNNING":
        _say(f"exit code {code}; SLURM calls the job {state or 'gone'}: leaving it to SLURM")
        return code
    if run.stop_file.exists():
        return _failed(log, code, "a STOP file forbids another start")
    here = progress(run, stage, set_name)
    tried = 0 if reason == "preempted" else retries_without_progress(run, env.job, here)
    if tried >= MAX_RETRIES:
        return _failed(
            log,
            code,
            f"{tried + 1} lives in a row ended ({reason}, exit code {code}) without progress "
            f"beyond {here}; see the log, mend the cause, submit again",
        )
    fields = {"reason": reason, "exit_code": code, "progress": here, "stage": stage}
    # Where pre-emption means cancelling, SLURM lets a job requeue itself but remembers that it was to end it. The task
    # of an array has no successor: it comes back by itself, or is made up for later.
    cancels = reason == "preempted" and stage != "sample" and not slurm.mercy(env.job).requeues
    if cancels or not slurm.may_requeue(env.job):
        if stage == "sample":
            return _failed(
                log, code, "requeue is forbidden; the evaluation, or launch/sample.py, makes what is missing"
            )
        successor = submit_successor(run, stage, env.job)
        _chain_waits_for(successor, env.job)
        _note(log, "requeued", successor=successor, **fields)
        _say(f"exit code {code} ({reason}); requeue is forbidden: successor job {successor}")
        return code
    _note(log, "requeued", **fields)
    _say(f"exit code {code} ({reason}); progress {here}; requeueing job {env.job}")
    slurm.patiently(lambda: slurm.requeue(env.job))
    time.sleep(KILLED_WITHIN_S)  # SLURM ends this shell: leaving first would race the requeue
    return code


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


def _note(log: EventLog, event: str, **fields: object) -> None:
    """A disk too full for one more line must not cost the job its return."""
    run = RunDir(log.path.parent.parent)
    try:
        log.append(event, world_size=environment.num_tasks(), step=run.latest_step(), **fields)
    except OSError as e:
        _say(f"event {event} not written: {e}")


def _failed(log: EventLog, code: int, reason: str) -> int:
    _note(log, "failed", exit_code=code, reason=reason)
    _say(f"failed: {reason}")
    return code


def main() -> int:
    path, stage, code, *rest = sys.argv[1:]
    run = RunDir(Path(path))
    try:
        return end(run, stage, int(code), rest[0] if rest else "")
    except slurm.SlurmError as e:
        log = environment.current().events(run)
        return _failed(log, int(code) or EXIT_REQUEUE, f"could not be put back: {e}; submit the run again")


if __name__ == "__main__":
    sys.exit(main())
