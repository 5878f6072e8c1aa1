#!/usr/bin/env python
"""Show what removing runs would free; with --yes, remove them."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from ddpm.errors import RequestError, RunBusy
from ddpm.run.fence import Fence
from ddpm.run.files import TMP_PREFIX, DamagedFile, fsync_dir, not_ours
from ddpm.run.log import amount, counted
from ddpm.run.paths import RunDir, listed
from launch.cluster import environment
from launch.queue import borrowing, work
from launch.queue.turns import turn
from launch.terminal import console

EXAMPLES = """examples:
  python launch/remove.py old-run            its parts and their sizes; removes nothing
  python launch/remove.py old-run --yes      remove it, for good
  python launch/remove.py 'lr-*' other       several runs, or a sweep by its name; if one is refused, none is removed

Refused while a job of the run is queued or at work (end it: python launch/cancel.py RUN), or another run reads it.
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_runs()
    parser.add_argument("--yes", action="store_true", help="remove them")
    parser.add_root()
    return parser.parse_args()


def check(run: RunDir, root: Path) -> None:
    """Raises RequestError where somebody still needs the run."""
    if run.path.is_symlink():
        raise RequestError(f"{run.path} is a link to {run.path.resolve()}: give that, or remove the link yourself")
    for path in (run.path, run.path.parent):
        if not os.access(path, os.W_OK):
            why = not_ours(path) or f"{path} cannot be written"
            raise RequestError(f"run {run.name} cannot be removed from here: {why}")
    found = work.of_run(run)
    if found:
        raise RequestError(f"run {run.name} is queued or at work: {found}. End it first: {work.to_end(run)}")
    if run.config.is_file():
        try:
            borrowing.reads(run)
        except DamagedFile as e:
            raise RequestError(f"{e}. If nothing there is of use, remove it by hand: rm -r {run.quoted}") from None
    who = list(_borrowers(run, root))
    if who:
        raise RequestError(
            f"run {run.name} is read by {', '.join(map(str, who))}, whose checkpoints are its own: remove that first"
        )


def _borrowers(run: RunDir, root: Path) -> Iterator[Path]:
    """The runs, beside it and in the root, that have its checkpoints. Of those in other roots nobody knows."""
    for place in {root, run.path.parent}:
        for other in console.all_runs(place):
            try:
                reads = borrowing.reads(other)
                has_them = reads is not None and Path(reads).resolve() == run.path.resolve()
            except (DamagedFile, OSError):  # where its links lead tells too
                has_them = os.path.realpath(other.checkpoints) == os.path.realpath(run.checkpoints)
            if has_them and other.path != run.path:
                yield other.path


def sizes(path: Path) -> tuple[int, int]:
    """Bytes and files below a path, links not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_blocks * 512, 1
    found = [sizes(Path(entry.path)) for entry in os.scandir(path)]
    return sum(size for size, _ in found), 1 + sum(num for _, num in found)


def tell(run: RunDir) -> None:
    """A line for each part, the largest first; and what lies elsewhere and stays."""
    parts = {path.name: sizes(path) for path in listed(run.path)}
    for name, (size, num) in sorted(parts.items(), key=lambda part: -part[1][0]):
        if size >= 1 << 16:
            print(f"  {amount(size):>10}  {counted(num, 'file', '>7,')}  {name}")
    total, files = sum(size for size, _ in parts.values()), sum(num for _, num in parts.values())
    print(f"  {amount(total):>10}  {counted(files, 'file', '>7,')}  in all")
    for path in listed(run.path):
        if path.is_symlink():
            print(f"{path.name} is a link: {path.resolve()} stays as it is")


def remove(run: RunDir) -> None:
    """Out of sight at once, then file by file. Raises RequestError where a job that nobody else tells of holds it."""
    if run.config.is_file() and not borrowing.reads(run):
        try:
            Fence(run, {"job": f"remove-{os.getpid()}", "restart": 0, "host": environment.host()}, wait_s=0).release()
        except RunBusy as e:
            raise RequestError(str(e)) from None
    gone = run.path.with_name(f"{TMP_PREFIX}removed-{run.name}.{os.getpid()}")
    run.path.rename(gone)
    fsync_dir(run.path.parent)
    shutil.rmtree(gone)


def main() -> int:
    args = parse()
    runs, root = console.find_runs(args.runs, args.root), environment.runs_root(args.root)
    for run in runs:  # nothing is removed before all can be
        check(run, root)
    for run in runs:
        print(f"{'removing' if args.yes else 'would remove'} {run.path}, which is at step {run.latest_step()}:")
        tell(run)
    if not args.yes:
        again = f"python launch/remove.py {shlex.join(args.runs)}{console.same_root(args.root)} --yes"
        print(f"nothing was removed; for good: {again}")
        return 0
    sys.stdout.flush()
    for run in runs:
        with turn(run):
            check(run, root)
            remove(run)
        print(f"removed {run.name}" if len(runs) > 1 else "removed", flush=True)
    return 0


if __name__ == "__main__":
    console.run_script(main)
