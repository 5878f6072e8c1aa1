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

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import EXIT_BUSY, RequestError
from ddpm.run.events import read_events
from ddpm.run.files import read_json, read_jsonl
from ddpm.run.paths import RunDir
from ddpm.run.state import finished_step
from ddpm.scoring.record import SCORE_NAMES, key_of
from launch.cluster import environment, slurm
from launch.queue.waiting import slurm_jobs
from launch.terminal import console, follow, goodput

EXAMPLES = """examples:
  python launch/status.py                      all runs
  python launch/status.py cifar10 --watch      one, kept up to date
  python launch/status.py cifar10 --events     its life: submitted, allocated, started, checkpoint, …
  python launch/status.py --json               for scripts
"""
SILENT_AFTER_S = 60.0
TRAINING = ("submitted", "started", "resumed", "finished", "failed")


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or directories (default: all)")
    parser.add_argument("--watch", action="store_true", help="refresh every few seconds until ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--events", action="store_true", help="list life events instead")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
    return parser.parse_args()


def describe(run: RunDir, states: dict[str, str]) -> dict[str, Any]:
    """One run as plain values, whatever of it exists."""
    every = read_events(run)
    # a job that found the run taken says nothing about the run, except that it held nodes meanwhile
    events = [e for e in every if e["event"] != "failed" or e.get("exit_code") != EXIT_BUSY]
    beat = read_json(run.heartbeat) or {}
    config, unread = _config(run)
    metrics = read_jsonl(run.metrics)
    last = metrics[-1] if metrics else {}
    saved = run.latest_step()
    jobs = {job: states[job] for job in slurm_jobs(events) if job in states}
    age = time.time() - goodput.seconds(beat["time"]) if beat.get("time") else None
    spent = goodput.breakdown(every, beat, time.time())
    scores = {}
    for path in sorted(run.eval.glob("*.json")):
        record = read_json(path) or {}
        score = {k: record[k] for k in (*SCORE_NAMES, "num_samples") if k in record}
        if len(score) == 2:  # a torn file is no score
            scores[path.stem] = score
    latest: dict[str, Any] = next((e for e in reversed(events) if e["event"] in TRAINING), {})  # of any stage
    return {
        "name": run.name,
        "path": str(run.path),
        "state": _state(run, events, config, jobs, age),
        "step": max(saved, int(beat.get("step", 0))),
        "saved_step": saved,
        "total_steps": config.train.total_steps if config else 0,
        "loss": last.get("loss"),
        "images_per_s": last.get("images_per_s"),
        "epoch": last.get("epoch"),
        "jobs": jobs,
        "restarts": max(0, len({(e["job"], e["restart"]) for e in events if e["event"] in ("started", "resumed")}) - 1),
        "goodput": goodput.share(spent),
        "allocated_s": {kind: round(s, 1) for kind, s in spent.items()},
        "heartbeat_age_s": None if age is None else round(age, 1),
        "host": beat.get("host"),
        "samples": {s.name: _shards(s.request, s.path) for s in run.sample_sets()},
        "scores": scores,
        "problem": latest.get("reason") if latest.get("event") == "failed" else unread,
    }


def _config(run: RunDir) -> tuple[Config | None, str | None]:
    """The run's config, or why it cannot be read: it is torn, or another version's."""
    try:
        config = reading.load(run.config)
    except RequestError as e:
        return None, str(e).splitlines()[0]
    return (config, None) if config.train.total_steps is not None else (None, "its config has no length in steps")


def _shards(request: Path, where: Path) -> str:
    asked = (read_json(request) or {}).get("shards", "?")
    return f"{sum(1 for _ in where.glob('shard-*.json'))}/{asked}"


def _state(
    run: RunDir, events: list[dict[str, Any]], config: Config | None, jobs: dict[str, str], age: float | None
) -> str:
    """complete | running | queued | failed | stopped | completing | prepared | ended, by the run directory and SLURM.

    completing: SLURM is ending the last job there is, and does not say whether it comes back, as a pre-empted one does.
    """
    alive = {state for state in jobs.values() if state != "COMPLETING"}
    last = next((e["event"] for e in reversed(events) if e["event"] not in ("allocated", "checkpoint")), None)
    if config is not None and finished_step(run, config) is not None and not alive:
        return "complete"
    if alive:
        return "running" if "RUNNING" in alive else "queued"
    if last == "failed":
        return "failed"
    if run.stop_file.exists():
        return "stopped"
    if jobs:
        return "completing"
    if age is not None and abs(age) < SILENT_AFTER_S and last in ("started", "resumed"):
        return "running"
    return "prepared" if last is None else "ended"


def table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    t = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "step", "saved", "loss", "img/s", "restarts", "goodput", "jobs", "samples", "score"):
        t.add_column(name, justify="right" if name in ("saved", "loss", "img/s", "restarts", "goodput") else "left")
    for r in rows:
        scores = "; ".join(
            f"{SCORE_NAMES[key_of(s)].split()[0]} {s[key_of(s)]:.3f} ({s['num_samples']})" for s in r["scores"].values()
        )
        t.add_row(
            r["name"],
            r["state"],
            f"{r['step']}/{r['total_steps']}",
            str(r["saved_step"]),
            _number(r["loss"], ".4f"),
            _number(r["images_per_s"], ".0f"),
            str(r["restarts"]),
            _number(r["goodput"], ".0%"),
            " ".join(f"{j}:{s}" for j, s in r["jobs"].items()),
            " ".join(r["samples"].values()),
            scores,
        )
    return t


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show(runs: list[RunDir], args: argparse.Namespace) -> Any:
    jobs = [job for r in runs for job in slurm_jobs(read_events(r))]
    try:
        states = slurm.queued(jobs) if slurm.available() else {}
    except slurm.SlurmError as e:
        print(f"SLURM does not answer: {e}", file=sys.stderr)
        states = {}
    rows = [describe(r, states) for r in runs]
    return json.dumps(rows, indent=1) if args.json else table(rows)


def where_time_went(row: dict[str, Any]) -> str:
    """One line: the time that the run held nodes, and its shares."""
    spent = row["allocated_s"]
    total = sum(spent.values())
    shares = (f"{kind.replace('_', '-')} {s / total:.1%}" for kind, s in spent.items() if s)
    return f"{row['name']}: {total / 3600:.2f} h allocated: {', '.join(shares)}"


def print_events(runs: list[RunDir], as_json: bool) -> None:
    for run in runs:
        for e in read_events(run):
            if as_json:
                print(json.dumps({"run": run.name, **e}))
                continue
            rest = " ".join(
                f"{k}={v}"
                for k, v in e.items()
                if k not in ("event", "time", "job", "restart", "host", "options", "args")
            )
            print(f"{e['time']}  {run.name}  job {e['job']}.{e['restart']}  {e['event']:14} {rest}")


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
        print(show(runs, args))
        return 0
    from rich.console import Console

    terminal = Console(width=None if sys.stdout.isatty() else 200)
    if not args.watch:
        terminal.print(show(runs, args))
        _print_more(runs, terminal, details=bool(args.runs))
        return 0
    from rich.live import Live

    try:
        with Live(show(runs, args), console=terminal, auto_refresh=False) as live:
            while True:
                time.sleep(follow.POLL_S)
                live.update(show(runs, args), refresh=True)
    except KeyboardInterrupt:
        return 0


def _print_more(runs: list[RunDir], terminal: Any, *, details: bool) -> None:
    for run in runs:
        row = describe(run, {})
        if details and any(row["allocated_s"].values()):
            terminal.print(where_time_went(row), markup=False, highlight=False)
        if row["problem"] and row["state"] not in ("running", "queued"):
            terminal.print(f"{run.name}: {row['problem']}", style="red", markup=False)


if __name__ == "__main__":
    console.run_script(main)
