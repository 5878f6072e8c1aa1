"""Break a run on purpose, and count what is lost.

python -m tools.chaos                          every row, full counts (SLURM rows need root on Debian)
python -m tools.chaos power-cut kill-9         these rows
python -m tools.chaos --reduced --json out.json
python -m tools.chaos --mutants                show that the rows can fail
python -m tools.chaos --list                   rows, counts and what they take
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ddpm.rundir import write_json
from launch.environment import PROJECT
from tools.chaos import cluster, files, mutants, processes
from tools.chaos.files import Result


def run_row(name: str, reduced: bool, site: cluster.Cluster | None) -> Result:
    """One row of the table, whatever happens in it."""
    rows: dict[str, Any] = {**files.ROWS, **processes.ROWS, **cluster.ROWS}
    row, full, fewer = rows[name]
    count = fewer if reduced else full
    try:
        return row(site, count) if name in cluster.ROWS else row(count)
    except Exception as e:
        return Result(name, "", f"{type(e).__name__}: {str(e)[:300]}", False)


def show_mutants() -> int:
    """Each mutant must make its row fail."""
    survivors = 0
    for name, (row, broken) in mutants.MUTANTS.items():
        with broken():
            result = run_row(row, True, None)
        survivors += result.passed
        print(f"{'SURVIVES' if result.passed else 'noticed '}  {name}: row {row} saw {result.seen}", flush=True)
    return 1 if survivors else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    known = [*files.ROWS, *processes.ROWS, *cluster.ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--reduced", action="store_true", help="a few of each")
    parser.add_argument("--via", choices=["sbatch", "submitit"], default="sbatch", help="for the SLURM rows")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--mutants", action="store_true", help="take safeties away and see rows fail")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if unknown := [r for r in args.rows if r not in known]:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(known)}")
    if args.list:
        for name, (row, full, fewer) in {**files.ROWS, **processes.ROWS, **cluster.ROWS}.items():
            print(f"{name:22} full {full or '-'}, reduced {fewer or '-'}: {(row.__doc__ or '').splitlines()[0]}")
        return 0
    if args.mutants:
        return show_mutants()
    wanted = args.rows or known
    if set(wanted) & set(cluster.ROWS) and os.geteuid() != 0:
        parser.error(f"the rows {', '.join(cluster.ROWS)} start a SLURM and need root; name others to leave them out")
    return tabulate(wanted, args)


def tabulate(wanted: list[str], args: argparse.Namespace) -> int:
    results = []

    def take(name: str, site: cluster.Cluster | None) -> None:
        began = time.monotonic()
        result = run_row(name, args.reduced, site)
        results.append({"row": name, "via": args.via if site else None, **asdict(result),
                        "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
        print(f"{'passed' if result.passed else 'FAILED'}  {name}: {result.seen}", flush=True)

    for name in [n for n in wanted if n not in cluster.ROWS]:
        take(name, None)
    if on_slurm := [n for n in wanted if n in cluster.ROWS]:
        with cluster.cluster(PROJECT, sys.executable, args.via) as site:
            for name in on_slurm:
                take(name, site)
                site.bed.end_all_jobs()
    table = Table("fault", "promised", "seen", "", "s")
    for r in results:
        table.add_row(r["fault"], r["promised"], r["seen"], "passed" if r["passed"] else "FAILED", str(r["seconds"]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        write_json(args.json, results, replace=True)
    print(json.dumps({"passed": sum(r["passed"] for r in results), "rows": len(results)}))
    return 0 if all(r["passed"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
