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
from ddpm.errors import DDPMError
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir
from ddpm.run.state import finished_step
from launch.queue import work
from launch.terminal import console

EXAMPLES = """examples:
  python launch/cancel.py cifar10          all its jobs: training, later stages, successors; on this machine too
  python launch/cancel.py low high 'lr-*'  several runs; a sweep by its name

A run that is not complete keeps a file STOP. What was saved stays; submitting the run again removes STOP and goes on.
"""
PATIENCE_S = 120.0
"""Time for running jobs to save and exit; after that they are ended by scancel."""
POLL_S = 1.0


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_runs()
    parser.add_root()
    return parser.parse_args()


def wait(run: RunDir, found: work.Work) -> work.Work:
    """Wait until nothing is at work or PATIENCE_S is over; returns what still is. Raises SchedulerError.

    A heartbeat still looks alive for a minute after its process ended: it counts only if nothing else was found.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        left = work.of_run(run)
        if not found.elsewhere:
            left = replace(left, elsewhere="")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)


def tell(found: work.Work) -> None:
    for job, state in found.jobs.items():
        waits = state == "PENDING"
        print(f"{'cancelled' if waits else 'told to save and leave'}: job {work.named(job)}")
    for pid in found.here.values():
        print(f"told to save and leave: pid {pid} on this machine")
    if found.elsewhere:
        print(f"told to save and leave: {found.elsewhere}")
    sys.stdout.flush()


def await_end(run: RunDir, found: work.Work, before: int) -> int:
    """Wait for one run, and say how it ended; returns the exit code. before: the step saved when it was told to end."""
    left = wait(run, found)
    if left.jobs:
        work.cancel(left.jobs)
        named = ", ".join(map(work.named, left.jobs))
        print(f"cancelled by scancel, as it had not left after {PATIENCE_S:.0f} s: job {named}")
    elif left:
        print(f"still at work after {PATIENCE_S:.0f} s: {left}. {run.stop_file} stays, and ends it", file=sys.stderr)
        return 1
    step = run.latest_step()
    if is_finished(run):  # nothing of it is to be kept from training
        with suppress(OSError):
            run.stop_file.unlink()
        print(f"run {run.name} is complete at step {step}; what was to be made of it is cancelled")
        return 0
    again = f"go on by submitting it again: {run.stop_file} is there until then"
    print(f"run {run.name} is at step {step}{' (saved just now)' if step > before else ''}; {again}")
    return 0


def is_finished(run: RunDir) -> bool:
    try:
        return finished_step(run, reading.of_run(run)) is not None
    except (DDPMError, DamagedFile):
        return False


def main() -> int:
    args = parse()
    runs = list({run.path.resolve(): run for run in console.find_runs(args.runs, args.root)}.values())
    told = []
    for run in runs:  # all of them first: none waits for another's end
        before = run.latest_step()
        found = work.end(run)
        if found:
            tell(found)
            told.append((run, found, before))
        else:
            print(f"run {run.name}: nothing of it is queued or at work")
    try:
        return max((await_end(*one) for one in told), default=0)
    except KeyboardInterrupt:
        print(f"no longer waiting; {', '.join(str(run.stop_file) for run, *_ in told)} ends what still runs",
              file=sys.stderr)  # fmt: skip
        return 130


if __name__ == "__main__":
    console.run_script(main)
