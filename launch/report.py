#!/usr/bin/env python
"""Write a run as one HTML page that needs no network; of several runs, a page that compares them. Loads no torch."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import os
from pathlib import Path

from ddpm.errors import RequestError
from ddpm.run.files import write_bytes
from ddpm.run.log import amount
from ddpm.run.owners import not_ours
from ddpm.run.paths import RunDir
from launch.cluster import environment
from launch.page import facts, page, side_by_side
from launch.page.markup import BEGINNING
from launch.status import rows_of
from launch.terminal import console

EXAMPLES = """examples:
  python launch/report.py cifar10                          runs/cifar10/report.html
  python launch/report.py cifar10 low-lr high-lr           runs/comparison.html: how they differ, and their results
  python launch/report.py 'cifar10-lr*'                    the same for a pattern of names, or a sweep
  python launch/report.py /shared/runs/cifar10 --out cifar10.html     of a run that you may only read

The page shows the run as it was when the page was made: run the command again for a newer one.
"""
COMPARISON = "comparison.html"
SUFFIXES = (".html", ".htm")


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_runs()
    parser.add_argument("--out", metavar="FILE.html", help="output file (default: in the run; of several, beside them)")
    parser.add_root()
    return parser.parse_args()


def place(args: argparse.Namespace, runs: list[RunDir]) -> Path:
    """Where the page goes. Raises RequestError where it cannot."""
    if args.out is None:
        roots = {run.path.parent for run in runs}
        beside = roots.pop() if len(roots) == 1 else environment.runs_root(args.root)
        path = runs[0].report if len(runs) == 1 else beside / COMPARISON
    else:
        path = environment.user_path(args.out, "--out")
        if path.suffix not in SUFFIXES:
            raise RequestError(f"--out {path}: must end in .html")
        if path not in [run.report for run in runs]:
            console.check_outside_runs(path, "--out")
        if path.is_file() and not _is_page(path):
            raise RequestError(f"--out {path}: exists, and is no page of this script's; name another file")
    if path.is_dir():
        raise RequestError(f"{path} is a folder: name a file with --out FILE.html")
    if not path.parent.is_dir():
        raise RequestError(f"there is no folder {path.parent} to write {path.name} in: make it, or give another --out")
    if args.out is None and not os.access(path.parent, os.W_OK | os.X_OK):
        why = not_ours(path.parent) or f"{path.parent} cannot be written"
        raise RequestError(f"{why}. Or write elsewhere: --out FILE.html")
    return path


def _is_page(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(len(BEGINNING)) in (BEGINNING.encode(), b"")


def main() -> int:
    args = parse()
    runs = list({run.path.resolve(): run for run in console.find_runs(args.runs, args.root)}.values())
    path = place(args, runs)
    told = [facts.read(run, row) for run, row in zip(runs, rows_of(runs), strict=True)]
    text = page.of_run(told[0]) if len(told) == 1 else side_by_side.of_runs(told, path)
    data = text.encode()
    write_bytes(path, data, replace=True)
    print(f"{path}: {amount(len(data))}, for any browser: {path.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    console.run_script(main)
