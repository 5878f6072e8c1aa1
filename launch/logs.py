#!/usr/bin/env python
"""Show the log of a run's newest job, over all its restarts."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib

from ddpm.errors import RequestError
from ddpm.run.events import read_events
from ddpm.run.log import counted, plain
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.queue import work
from launch.queue.waiting import home
from launch.terminal import console, logfiles
from launch.terminal.overview import describe

EXAMPLES = """examples:
  python launch/logs.py cifar10                    of whichever job ran last
  python launch/logs.py cifar10 -f                 its end and what is added, also by later jobs, until none is left
  python launch/logs.py cifar10 --stage train      of training jobs alone
  python launch/logs.py cifar10 --all | less       SLURM's own lines too
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a name, a directory, a pattern or a sweep")
    parser.add_argument("-f", "--follow", action="store_true", help="stay, and show new lines")
    parser.add_argument("--stage", choices=logfiles.STAGES, help="only jobs of this stage")
    parser.add_argument("--all", action="store_true", help="include the lines of srun, slurmstepd and submitit")
    parser.add_root()
    return parser.parse_args()


def how_it_ended(run: RunDir) -> str:
    """One line about the run's end; "" while a job of it is queued or at work, or SLURM does not answer."""
    try:
        if work.of_run(run):
            return ""
        with scheduler.asking(home(read_events(run))):
            row = describe(run, {})
    except (scheduler.SchedulerError, OSError):
        return ""
    why = f": {row['problem']}" if row["problem"] else ""
    return plain(f"nothing of run {run.name} is queued or at work: {row['state']} at step {row['step']}{why}")


def main() -> int:
    args = parse()
    runs = console.find_runs([args.run], args.root)
    if args.follow and len(runs) > 1:
        raise RequestError(f"--follow is of one run: give one of {', '.join(run.name for run in runs)}")
    for run in runs if len(runs) > 1 else []:
        if logfiles.of_run(run, args.stage):
            show(run, args)
        else:
            print(f"run {run.name} has said nothing yet", file=sys.stderr)
    return 0 if len(runs) > 1 else show(runs[0], args)


def show(run: RunDir, args: argparse.Namespace) -> int:
    """Show the log of a run's newest job; returns the exit code. Raises RequestError if there is none."""
    keep = logfiles.Filter(everything=args.all)
    files = logfiles.of_run(run, args.stage)
    if args.follow:
        if not files:
            print("nothing has been said yet: waiting for a job to begin", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            print(logfiles.follow(lambda: logfiles.of_run(run, args.stage), keep, lambda: how_it_ended(run)))
        return 0
    if not files:
        what = f"no {args.stage} job" if args.stage else "no job"
        raise RequestError(
            f"{what} of run {run.name} has said anything yet (looked in {run.logs}): python launch/status.py "
            f"{run.path} shows whether one waits; if none does, {logfiles.unheard(run)}"
        )
    print(f"==> {files[-1]} <==", file=sys.stderr, flush=True)
    logfiles.show(files[-1], keep)
    if keep.hidden:
        print(f"({counted(keep.hidden, 'line')} of SLURM's own not shown: --all)", file=sys.stderr)
    others = files[:-1]
    if others:
        last = ", ".join(path.name for path in others[-3:])
        print(f"({len(others)} older in {run.logs}: {'… ' if others[3:] else ''}{last})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    console.run_script(main)
