#!/usr/bin/env python
"""How runs get on: state, step, speed, restarts and goodput, from their directories and squeue. Loads no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from ddpm.run.log import plain
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler
from launch.queue.waiting import slurm_jobs
from launch.terminal import console, follow, standing, streams
from launch.terminal.overview import describe, read_life

EXAMPLES = """examples:
  python launch/status.py                      all runs
  python launch/status.py cifar10 --watch      one, kept up to date
  python launch/status.py cifar10 --events     its life: submitted, allocated, started, checkpoint, …
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


def table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    t = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "step", "saved", "loss", "img/s", "restarts", "goodput", "jobs", "samples", "score"):
        t.add_column(name, justify="right" if name in ("saved", "loss", "img/s", "restarts", "goodput") else "left")
    for r in rows:
        t.add_row(
            plain(r["name"]),
            r["state"],
            f"{r['step']}/{r['total_steps']}",
            str(r["saved_step"]),
            _number(r["loss"], ".4f"),
            _number(r["images_per_s"], ".0f"),
            str(r["restarts"]),
            _number(r["goodput"], ".0%"),
            " ".join(plain(f"{j}:{s}") for j, s in r["jobs"].items()),
            " ".join(r["samples"].values()),
            "\n".join(r["scores_told"].values()),
        )
    return t


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def rows_of(runs: list[RunDir]) -> list[dict[str, Any]]:
    """Each run, described; whatever befalls one of them, the others are shown."""
    lives = [read_life(r) for r in runs]
    jobs = [job for r, (events, _) in zip(runs, lives, strict=True) for job in slurm_jobs(r, events)]
    queued: dict[str, scheduler.Queued] | None = None
    try:
        queued = scheduler.look_up(jobs) if scheduler.available() else None
    except scheduler.SchedulerError as e:
        print(f"SLURM does not answer: {e}", file=sys.stderr)
    return [describe(r, queued, life) for r, life in zip(runs, lives, strict=True)]


def where_time_went(row: dict[str, Any]) -> str:
    """One line: the time that the run held nodes, and its shares."""
    spent = row["allocated_s"]
    total = sum(spent.values())
    shares = (f"{kind.replace('_', '-')} {s / total:.1%}" for kind, s in spent.items() if s)
    return f"{row['name']}: {total / 3600:.2f} h allocated: {', '.join(shares)}"


def print_events(runs: list[RunDir], as_json: bool) -> None:
    for run in runs:
        events, damage = read_life(run)
        for e in events:
            if as_json:
                print(json.dumps({**e, "run": run.name}))
                continue
            known = ("event", "time", "job", "restart", "host", "options", "args", "launch", "run")
            rest = " ".join(f"{k}={v}" for k, v in e.items() if k not in known)
            print(plain(f"{e['time']}  {run.name}  job {e['job']}.{e['restart']}  {e['event']:14} {rest}"))
        for what in damage:
            print(plain(f"{run.name}: {what}"), file=sys.stderr)


def main() -> int:
    args = parse()
    root = environment.runs_root(args.root)
    runs = [console.find_run(word, args.root) for word in args.runs] if args.runs else console.all_runs(root)
    if not runs and not args.json:
        print(f"no runs in {root}; start one with python launch/submit.py, or look elsewhere with --root")
        return 0
    if args.events:
        print_events(runs, args.json)
        return 0
    if args.json:
        print(json.dumps(rows_of(runs), indent=1))
        return 0
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    terminal = Console(file=streams.below(sys.stdout), width=width, markup=False, emoji=False)
    if not args.watch:
        rows = rows_of(runs)
        terminal.print(table(rows))
        _print_more(rows, terminal, details=bool(args.runs))
        return 0
    from rich.live import Live

    try:
        with Live(table(rows_of(runs)), console=terminal, auto_refresh=False) as live:
            while True:
                time.sleep(follow.POLL_S)
                live.update(table(rows_of(runs)), refresh=True)
    except KeyboardInterrupt:
        return 0


def _print_more(rows: list[dict[str, Any]], terminal: Any, *, details: bool) -> None:
    for row in rows:
        if details and any(row["allocated_s"].values()):
            terminal.print(plain(where_time_went(row)), highlight=False)
        for wait in row["waits"]:
            if wait["next_step"] or wait["expected_start"]:
                terminal.print(plain(f"{row['name']}: job {wait['job']} waits: {standing.line(wait)}"), highlight=False)
        if row["bad_nodes"] and details:
            terminal.print(plain(f"{row['name']}: lives of it died by themselves on {', '.join(row['bad_nodes'])}"))
        if row["problem"]:
            terminal.print(plain(f"{row['name']}: {row['problem']}"), style="red")


if __name__ == "__main__":
    console.run_script(main)
