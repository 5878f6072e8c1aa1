"""Break a run on purpose, and count what is lost.

python -m tools.chaos                          every row, full counts (SLURM rows need root on Debian)
python -m tools.chaos power-cut kill-9         these rows
python -m tools.chaos --reduced --json out.json
python -m tools.chaos two-jobs --count 3
python -m tools.chaos --mutants                show that the rows can fail
python -m tools.chaos --list                   rows, counts and what the full ones take
"""

from __future__ import annotations

import launch.first  # noqa: F401

# isort: split
import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table

from ddpm.run.files import now, write_json
from launch.cluster.environment import PROJECT
from launch.terminal import console, streams
from tools.chaos import (
    anywhere,
    cluster,
    copies,
    fifty_thousand,
    files,
    mutants,
    outside,
    processes,
    slurm_faults,
    slurm_stops,
)
from tools.chaos.cluster import Cluster, NotRun
from tools.chaos.files import Result

HERE = {**files.ROWS, **anywhere.ROWS, **copies.ROWS, **processes.ROWS, **outside.ROWS, **fifty_thousand.HERE_ROWS}
ON_SLURM = {**slurm_stops.ROWS, **slurm_faults.ROWS, **fifty_thousand.ROWS}
ROWS: dict[str, Any] = {**HERE, **ON_SLURM}
SECONDS = {
    "kill-each-operation": 70, "power-cut": 35, "flipped-bits": 7, "failing-operations": 30, "all-damaged": 1,
    "save-fails-anywhere": 25, "publication-fails-anywhere": 15,
    "copies": 300, "kill-9": 225, "resume-inside": 70, "fp16-overflow": 20, "world-sizes": 8, "non-finite-batch": 30,
    "outside": 300, "cache-damaged": 15, "start-damaged": 15, "manifests-gone": 4, "label-changed": 5,
    "request-flipped": 8,
    "non-finite-always": 3, "startup-stops": 5, "disk-full-at-stop": 25, "pre-emptions": 745,
    "startup-pre-emptions": 155, "no-grace": 65, "preempt-cancel": 35,
    "preempt-cancel-at-once": 35, "requeue-forbidden": 35, "scancel": 270,
    "time-limit": 150, "one-rank-signalled": 470, "term-by-hand": 50, "stop-file": 15, "signal-in-save": 45,
    "signal-in-packing": 85, "signal-in-compile": 170, "signal-in-evaluation": 80, "one-rank-killed": 90,
    "rank-stopped": 85, "node-failure": 160, "crash-loop": 20, "slurmctld-restart": 195, "two-jobs": 220,
    "orphan": 170, "orphan-of-stepd": 85, "array-task-requeued": 190, "fifty-thousand": 1750, "inception-killed": 900,
}  # fmt: skip
"""What a row took at its full count, on two cores that others used too."""


def run_row(name: str, count: int, site: Cluster | None) -> Result | str:
    """One row of the table, whatever happens in it; a string is the reason why it was not run."""
    row = ROWS[name][0]
    try:
        return row(count) if site is None else site.row(row, count)
    except NotRun as e:
        return str(e)
    except Exception as e:
        return Result(name, "", f"{type(e).__name__}: {str(e)[:300]}", False)


def show_mutants(via: str) -> int:
    """Each mutant must make its row fail."""
    survivors = 0

    def report(name: str, row: str, result: Result | str) -> None:
        nonlocal survivors
        noticed = isinstance(result, Result) and not result.passed
        survivors += not noticed
        seen = (result.seen if isinstance(result, Result) else f"not run: {result}").splitlines()[0]
        print(f"{'noticed ' if noticed else 'SURVIVES'}  {name}: row {row} saw {seen}", flush=True)

    rows = {name: row for name, (row, *_) in {**mutants.MUTANTS, **mutants.SHELL_MUTANTS}.items()}
    on_slurm = {name: row for name, row in rows.items() if row in ON_SLURM}
    for name, row in rows.items():
        if row in HERE:
            with mutants.replaced(mutants.MUTANTS[name]):
                report(name, row, run_row(row, ROWS[row][2], None))
    if os.geteuid() != 0:
        print(f"not run (no root, no SLURM): {', '.join(on_slurm)}")
        return 1
    for name, row in on_slurm.items():
        with mutants.tree_with(PROJECT, name) as tree, cluster.cluster(tree, sys.executable, via) as site:
            report(name, row, run_row(row, ROWS[row][2], site))
    return 1 if survivors else 0


def show_list() -> None:
    for name, (row, full, fewer) in ROWS.items():
        counts = f"full {full or '-'}, reduced {fewer or '-'}"
        print(f"{name:22} {counts:22} {SECONDS[name]:4} s  {(row.__doc__ or '').splitlines()[0]}")


def _is_table(path: Path) -> bool:
    """Whether this is what `tabulate` has written, or nothing."""
    try:
        rows = json.loads(path.read_bytes() or b"[]")
    except ValueError:
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and "outcome" in row for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument("--reduced", action="store_true", help="a few of each")
    counts.add_argument("--count", type=int, metavar="N", help="N of each, in rows that count")
    parser.add_argument("--via", choices=["sbatch", "submitit"], default="sbatch", help="for the SLURM rows")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--mutants", action="store_true", help="take safeties away and see rows fail")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if unknown := [r for r in args.rows if r not in ROWS]:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if args.count is not None and args.count < 1:
        parser.error(f"--count {args.count}: at least 1")
    if args.json is not None:
        console.check_outside_runs(args.json, "--json")
        if args.json.is_file() and not _is_table(args.json):
            parser.error(f"--json {args.json}: exists, and is no table of this bench; name another file")
    if args.list:
        show_list()
        return 0
    if args.mutants:
        return show_mutants(args.via)
    wanted = args.rows or list(ROWS)
    if set(wanted) & set(ON_SLURM) and os.geteuid() != 0:
        parser.error(f"the rows {', '.join(ON_SLURM)} start a SLURM and need root; name others to leave them out")
    return tabulate(wanted, args)


def tabulate(wanted: list[str], args: argparse.Namespace) -> int:
    records: list[dict[str, Any]] = []

    def take(name: str, site: Cluster | None) -> None:
        began, date = time.monotonic(), now()
        _, full, fewer = ROWS[name]
        count = (args.count or (fewer if args.reduced else full)) if fewer else 0
        result = run_row(name, count, site)
        if isinstance(result, str):
            result, outcome = Result(name, "", result, False), "not run"
        else:
            outcome = "passed" if result.passed else "FAILED"
        records.append({
            "row": name, "via": args.via if site else None, "slurm": site.version() if site else None,
            "count": count or None, "fault": result.fault, "promised": result.promised, "seen": result.seen,
            "passed": result.passed if outcome != "not run" else None, "outcome": outcome.lower(),
            "seconds": round(time.monotonic() - began, 1), "date": date,
        })  # fmt: skip
        print(f"{outcome}  {name}: {result.seen}", flush=True)
        if args.json:  # whole after each row: the bench takes hours, and may be killed too
            write_json(args.json, records, replace=True)

    for name in [n for n in wanted if n not in ON_SLURM]:
        take(name, None)
    if on_slurm := [n for n in wanted if n in ON_SLURM]:
        with cluster.cluster(PROJECT, sys.executable, args.via) as site:
            for name in on_slurm:
                take(name, site)
                site.clear()
    table = Table("fault", "promised", "seen", "", "s")
    for r in records:
        table.add_row(r["fault"], r["promised"], r["seen"], r["outcome"], str(r["seconds"]))
    streams.drawing(sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
    told = {k: sum(r["outcome"] == k for r in records) for k in ("passed", "failed", "not run")}
    print(json.dumps({**told, "rows": len(records)}))
    return 1 if told["failed"] else 0


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # whoever ends the bench ends its clusters and runs too
    console.run_script(main)
