#!/usr/bin/env python
"""How runs get on: state, step, speed, restarts and goodput, from their directories and squeue. Loads no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.first  # noqa: F401
from ddpm.run.log import plain
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler
from launch.queue.waiting import slurm_jobs
from launch.terminal import console, history, view
from launch.terminal.overview import describe, read_life

EXAMPLES = """examples:
  python launch/status.py                      all runs
  python launch/status.py cifar10 --watch      one, kept up to date
  python launch/status.py cifar10 --events     its life: submitted, allocated, started, checkpoint, …
  python launch/status.py --watch | tee life   a line whenever something changes
  python launch/status.py --json               for scripts
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or directories (default: all)")
    parser.add_argument("--watch", action="store_true", help="refresh every few seconds until ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--events", action="store_true", help="list life events instead")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
    return parser.parse_args()


def rows_of(runs: list[RunDir]) -> list[dict[str, Any]]:
    """Each run, described; whatever befalls one of them, the others are shown."""
    lives = [read_life(r) for r in runs]
    jobs = [job for r, (events, _) in zip(runs, lives, strict=True) for job in slurm_jobs(r, events)]
    queued: dict[str, scheduler.Queued] | None = None
    try:
        queued = scheduler.look_up(jobs) if scheduler.available() else None
    except scheduler.SchedulerError as e:
        print(f"SLURM does not answer ({e}): states are as the runs tell; ask again later", file=sys.stderr)
    return [describe(r, queued, life) for r, life in zip(runs, lives, strict=True)]


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
    runs = [console.find_run(word, args.root) for word in args.runs] if args.runs else console.all_runs(root)
    if not runs and not args.json:
        print(f"no runs in {root}; start one with python launch/submit.py{console.same_root(args.root)}")
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

    def look() -> list[dict[str, Any]]:
        return rows_of(runs if args.runs else console.all_runs(root))

    with contextlib.suppress(KeyboardInterrupt):
        view.watch(look, details=bool(args.runs))
    return 0


if __name__ == "__main__":
    console.run_script(main)
