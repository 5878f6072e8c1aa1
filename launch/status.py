#!/usr/bin/env python
"""Show runs: state, step, speed, restarts and goodput, from their directories and squeue. Loads no torch."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib
import json
from collections.abc import Callable
from typing import Any

from ddpm.errors import RequestError
from ddpm.run.log import plain
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler
from launch.queue.waiting import home, slurm_jobs
from launch.terminal import console, history, screen, side_by_side, streams, unheard, view
from launch.terminal.overview import describe, read_life

EXAMPLES = """examples:
  python launch/status.py                      all runs
  python launch/status.py --watch              … kept up to date; keys show a run's life and log, and stop it
  python launch/status.py cifar10 --events     its life: submitted, allocated, started, checkpoint, …
  python launch/status.py --watch | tee life   a line whenever something changes
  python launch/status.py --json               for scripts
  python launch/status.py --compare 'cifar10-lr*'      how they differ, loss and score, the best first
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names, directories, patterns or sweeps (default: all)")
    parser.add_argument("--watch", action="store_true", help="refresh every few seconds, with keys on a terminal")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--events", action="store_true", help="list the events of their lives instead")
    parser.add_argument("--compare", action="store_true", help="how runs differ, their loss and score, the best first")
    parser.add_root()
    return parser.parse_args()


def rows_of(runs: list[RunDir], tell: Callable[[str], None] = console.warn) -> list[dict[str, Any]]:
    """Each run, described; whatever befalls one of them, the others are shown. tell: where SLURM does not answer."""
    lives = [read_life(r) for r in runs]
    here = scheduler.cluster_name()
    homes = [home(events) or here for events, _ in lives]
    rows: dict[int, dict[str, Any]] = {}
    for cluster in dict.fromkeys(homes):
        there = [i for i, other in enumerate(homes) if other == cluster]
        with scheduler.asking(cluster):
            jobs = [job for i in there for job in slurm_jobs(runs[i], lives[i][0])]
            queued: dict[str, scheduler.Queued] | None = None
            try:
                queued = scheduler.look_up(jobs) if scheduler.available() else None
                gone = [unheard.last_job(lives[i][0]) for i in there] if queued is not None else []
                scheduler.ends(job for job in gone if job[:1].isdigit() and job not in (queued or {}))  # all at once
            except scheduler.SchedulerError as e:
                if isinstance(e, scheduler.NoAnswer) or cluster == here:
                    tell(f"SLURM does not answer ({e}): states are as the runs tell; ask again later")
                cluster = ""
        with scheduler.asking(cluster):  # "": a run that is elsewhere says so
            rows |= {i: describe(runs[i], queued, lives[i]) for i in there}
    return [rows[i] for i in range(len(runs))]


def print_events(runs: list[RunDir], as_json: bool) -> None:
    for run in runs:
        events, damage = read_life(run)
        for line in (json.dumps({**e, "run": run.name}) for e in events) if as_json else history.lines(run, events):
            print(plain(line))
        for what in damage:
            print(plain(f"{run.name}: {what}"), file=sys.stderr)


def main() -> int:
    args = parse()
    root = environment.runs_root(args.root)
    if args.compare and (args.watch or args.events):
        raise RequestError("--compare goes with --json alone: leave --watch and --events out")
    if args.watch and (args.events or args.json):
        raise RequestError("--watch shows runs as they stand, and goes neither with --events nor with --json")
    runs = console.find_runs(args.runs, args.root) if args.runs else console.all_runs(root)
    if not runs and not args.json:
        print(f"no runs in {root}; start one with python launch/submit.py{console.same_root(args.root)}")
        return 0
    if args.compare:
        found = side_by_side.rows(runs)
        print(json.dumps(found, indent=1)) if args.json else side_by_side.show(found)
        return 0
    if args.events:
        print_events(runs, args.json)
        return 0
    if args.json:
        print(json.dumps(rows_of(runs), indent=1))
        return 0
    if not args.watch:
        view.show(rows_of(runs), details=bool(args.runs))
        return 0

    def look(tell: Callable[[str], None] = console.warn) -> list[dict[str, Any]]:
        return rows_of(runs if args.runs else console.all_runs(root), tell)

    with contextlib.suppress(KeyboardInterrupt):
        if streams.draws(sys.stdout):
            screen.watch(look, details=bool(args.runs))
        else:
            view.tell(look)
    return 0


if __name__ == "__main__":
    console.run_script(main)
