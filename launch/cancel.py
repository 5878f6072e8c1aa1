#!/usr/bin/env python
"""End runs: waiting jobs leave the queue, running ones save and exit, and none comes back by itself."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import time
from contextlib import suppress
from dataclasses import replace

from ddpm.config import reading
from ddpm.errors import DDPMError, RequestError
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir
from ddpm.run.state import finished_step
from launch.cluster.scheduler import NoAnswer, SchedulerError
from launch.queue import work
from launch.queue.waiting import asked_together
from launch.terminal import console

EXAMPLES = """examples:
  python launch/cancel.py cifar10          all its jobs: training, later stages, successors; on this machine too
  python launch/cancel.py low high 'lr-*'  several runs; a sweep by its name

A run that is not complete keeps a file STOP. What was saved stays; submitting the run again removes STOP and goes on.
"""
PATIENCE_S = 120.0
"""Time for running jobs to save and exit; after that they are ended by scancel."""
POLL_S = 1.0
AT_ONCE = 100
"""Runs that are told to end together: each takes an open file meanwhile."""
Told = tuple[RunDir, work.Work, int]
"""A run that was told to end, what of it was at work, and the step that was saved before."""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_runs()
    parser.add_root()
    return parser.parse_args()


def tell(found: work.Work) -> None:
    for job, state in found.jobs.items():
        if job in found.stays:
            print(f"error: job {work.named(job)} stays in the queue, and ends at its start by the run's STOP. Whoever "
                  f"submitted it can cancel it ({found.stays[job]})", file=sys.stderr)  # fmt: skip
            continue
        waits = state == "PENDING"
        print(f"{'cancelled' if waits else 'told to save and leave'}: job {work.named(job)}")
    for pid in found.here.values():
        print(f"told to save and leave: pid {pid} on this machine")
    if found.elsewhere:
        print(f"told to save and leave: {found.elsewhere}")
    sys.stdout.flush()


def await_ends(told: list[Told]) -> int:
    """Wait until nothing of them is at work or PATIENCE_S is over, and say how each ended; returns the exit code.
    SLURM is asked about all at once. Raises SchedulerError."""
    deadline, worst = time.monotonic() + PATIENCE_S, 0
    while told:
        left, refused = _left(told), ""
        late = time.monotonic() > deadline
        jobs = [job for still in left for job in still.jobs]
        if late and jobs:
            try:
                work.cancel(jobs)
            except NoAnswer:
                raise
            except SchedulerError as e:  # one is another user's who shares the run
                left, refused = _left(told), " ".join(str(e).split())
        for (run, found, before), still in zip(told, left, strict=True):
            if late or not still:
                worst = max(worst, say_how_it_ended(run, still, before, stays=bool(found.stays), refused=refused))
        told = [] if late else [one for one, still in zip(told, left, strict=True) if still]
        time.sleep(POLL_S if told else 0)
    return worst


def _left(told: list[Told]) -> list[work.Work]:
    """What is still at work of each, without what stays. A heartbeat looks alive for a minute after its process ended:
    it counts only if nothing else was found."""
    left = []
    with asked_together(run for run, *_ in told):
        for run, found, _ in told:
            now = work.of_run(run)
            jobs = {job: state for job, state in now.jobs.items() if job not in found.stays}
            left.append(replace(now, jobs=jobs, elsewhere=now.elsewhere if found.elsewhere else ""))
    return left


def say_how_it_ended(run: RunDir, left: work.Work, before: int, *, stays: bool, refused: str = "") -> int:
    """Returns the exit code. left: what had not ended by itself. stays: whether a job waits on, for STOP to end it.
    refused: why SLURM has not ended all of it."""
    if left.jobs and not refused:
        named = ", ".join(map(work.named, left.jobs))
        print(f"cancelled by scancel, as it had not left after {PATIENCE_S:.0f} s: job {named}")
    elif left:
        told = f"{left} ({refused})" if refused else left
        print(f"still at work after {PATIENCE_S:.0f} s: {told}. {run.stop_file} stays, and ends it", file=sys.stderr)
        return 1
    step = run.latest_step()
    if not is_finished(run):
        again = f"go on by submitting it again: {run.stop_file} is there until then"
        print(f"run {run.name} is at step {step}{' (saved just now)' if step > before else ''}; {again}")
    elif stays:
        print(f"run {run.name} is complete at step {step}; {run.stop_file} stays, and ends what waits on")
    else:  # nothing of it is to be kept from training
        with suppress(OSError):
            run.stop_file.unlink()
        print(f"run {run.name} is complete at step {step}; what was to be made of it is cancelled")
    return 0


def is_finished(run: RunDir) -> bool:
    try:
        return finished_step(run, reading.of_run(run)) is not None
    except (DDPMError, DamagedFile):
        return False


def main() -> int:
    args = parse()
    named = list({run.path.resolve(): run for run in console.find_runs(args.runs, args.root)}.values())
    runs = [run for run in named if not work.not_from_here(run)]
    for run in (run for run in named if run not in runs):  # another's, in a sweep or under a pattern
        print(f"error: {work.not_from_here(run)}", file=sys.stderr)
    told: list[Told] = []
    stays = len(runs) < len(named)
    for first in range(0, len(runs), AT_ONCE):  # all of them first: none waits for another's end
        some = runs[first : first + AT_ONCE]
        before = [run.latest_step() for run in some]
        for run, found, step in zip(some, work.end_all(some), before, strict=True):
            if found:
                tell(found)
                told.append((run, found, step))
                stays = stays or bool(found.stays)
            elif not found.silent:
                print(f"run {run.name}: nothing of it is queued or at work")
            for cluster in found.silent:
                stays = True
                print(f"error: cluster {cluster} had jobs of run {run.name}, and does not answer: {run.stop_file} ends "
                      f"what it still has; give this again once it answers", file=sys.stderr)  # fmt: skip
    try:
        ended = await_ends(told)
    except KeyboardInterrupt:
        print(f"no longer waiting; {', '.join(str(run.stop_file) for run, *_ in told)} ends what still runs",
              file=sys.stderr)  # fmt: skip
        return 130
    return max(ended, RequestError.exit_code) if stays else ended


if __name__ == "__main__":
    console.run_script(main)
