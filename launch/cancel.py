#!/usr/bin/env python
"""End a run: what waits is taken out of the queue, what runs saves and leaves, and nothing comes back by itself."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.first  # noqa: F401
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.queue import work
from launch.queue.turns import turn
from launch.terminal import console

EXAMPLES = """examples:
  python launch/cancel.py cifar10          its training, what follows, what succeeds it; on this machine too

It leaves a file STOP in the run. What is saved stays; submit the run again to go on, which removes the file.
"""
PATIENCE_S = 120.0
"""For what runs to save and leave; after that SLURM is told to end it."""
POLL_S = 1.0


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a name or a directory")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
    return parser.parse_args()


def stop(run: RunDir) -> work.Work:
    """Take out of the queue what waits there, and ask the rest to leave; what that was. Raises SchedulerError."""
    with turn(run):  # nobody queues more of it meanwhile
        found = work.of_run(run)
        if found and not run.is_stopped():
            run.stop_file.touch()  # first: whatever comes back, or succeeds another, ends at its start
        for job in found.jobs:
            scheduler.cancel_waiting(job)
    return found


def wait(run: RunDir, found: work.Work) -> work.Work:
    """Until nothing is at work any more, or patience ends; what still is. Raises SchedulerError.

    A beat tells of life for a minute after its end: it counts where it alone was found.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        left = work.of_run(run)
        if not found.elsewhere:
            left = replace(left, elsewhere="")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)


def main() -> int:
    args = parse()
    run = console.find_run(args.run, args.root)
    found = stop(run)
    if not found:
        print(f"run {run.name}: nothing of it is queued or at work")
        return 0
    for job, state in found.jobs.items():
        waits = state == "PENDING"
        print(f"{'cancelled' if waits else 'told to save and leave'}: job {job}")
    for pid in found.here.values():
        print(f"told to save and leave: pid {pid} on this machine")
    if found.elsewhere:
        print(f"told to save and leave: {found.elsewhere}")
    sys.stdout.flush()
    before = run.latest_step()
    try:
        left = wait(run, found)
    except KeyboardInterrupt:
        print(f"no longer waiting; {run.stop_file} ends what still runs", file=sys.stderr)
        return 130
    if left.jobs:
        scheduler.cancel(list(left.jobs))
        print(f"cancelled by scancel, as it had not left after {PATIENCE_S:.0f} s: job {', '.join(left.jobs)}")
    elif left:
        print(f"still at work after {PATIENCE_S:.0f} s: {left}. {run.stop_file} stays, and ends it", file=sys.stderr)
        return 1
    step = run.latest_step()
    again = f"go on by submitting it again: {run.stop_file} is there until then"
    print(f"run {run.name} is at step {step}{' (saved just now)' if step > before else ''}; {again}")
    return 0


if __name__ == "__main__":
    console.run_script(main)
