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
from contextlib import suppress
from pathlib import Path

from ddpm.errors import EnvironmentLacks, NodeUnfit, RequestError, RunBusy
from ddpm.run.fence import Fence
from ddpm.run.files import TMP_PREFIX, DamagedFile, fsync_dir
from ddpm.run.log import amount, counted
from ddpm.run.owners import not_ours
from ddpm.run.paths import RunDir, listed
from launch.cluster import environment
from launch.queue import borrowing, work
from launch.queue.turns import turn
from launch.queue.waiting import asked_together
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


class Readers:
    """The runs, beside a run and in the root, that have its checkpoints. Of those in other roots nobody knows.

    Each is read once, however many runs are asked about: what it reads does not change.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[str, str]] = {}
        """Path and inode -> the run that it reads, "" if none; where its checkpoints lie, if it does not tell."""

    def of(self, run: RunDir, root: Path) -> list[Path]:
        own, found = (str(run.path.resolve()), os.path.realpath(run.checkpoints)), []
        for other in {path for place in (root, run.path.parent) for path in listed(place)} - {run.path}:
            with suppress(FileNotFoundError):
                key = str(other), other.lstat().st_ino
                if key not in self._known and other.name[0] != "." and console.may_be_run(other):
                    self._known[key] = self._read(RunDir(other))
                reads, lie = self._known.get(key, ("", ""))
                found += [other] if reads == own[0] or lie == own[1] else []
        return sorted(found)

    def _read(self, other: RunDir) -> tuple[str, str]:
        try:
            reads = borrowing.reads(other)
        except (DamagedFile, OSError):
            return "", os.path.realpath(other.checkpoints)
        return str(Path(reads).resolve()) if reads else "", ""


def check(run: RunDir, root: Path, readers: Readers) -> None:
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
    who = readers.of(run, root)
    if who:
        raise RequestError(
            f"run {run.name} is read by {', '.join(map(str, who))}, whose checkpoints are its own: remove that first"
        )


def sizes(path: Path) -> tuple[int, int]:
    """Bytes and files below a path, links not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_blocks * 512, 1
    found = [sizes(Path(entry.path)) for entry in os.scandir(path)]
    return sum(size for size, _ in found), 1 + sum(num for _, num in found)


def tell(run: RunDir) -> tuple[int, int]:
    """A line for each part, the largest first; and what lies elsewhere and stays. Returns bytes and files in all."""
    parts = {path.name: sizes(path) for path in listed(run.path)}
    for name, (size, num) in sorted(parts.items(), key=lambda part: -part[1][0]):
        if size >= 1 << 16:
            print(f"  {amount(size):>10}  {counted(num, 'file', '>7,')}  {name}")
    total, files = sum(size for size, _ in parts.values()), sum(num for _, num in parts.values())
    print(f"  {amount(total):>10}  {counted(files, 'file', '>7,')}  in all")
    for path in listed(run.path):
        if path.is_symlink():
            print(f"{path.name} is a link: {path.resolve()} stays as it is")
    return total, files


def remove(run: RunDir) -> None:
    """Remove a run: its name at once, then file by file. Raises RequestError if a job that nobody knew of holds it."""
    if run.config.is_file() and not borrowing.reads(run):
        try:
            Fence(run, {"job": f"remove-{os.getpid()}", "restart": 0, "host": environment.host()}, wait_s=0).release()
        except RunBusy as e:
            raise RequestError(str(e)) from None
        except NodeUnfit as e:
            raise EnvironmentLacks(str(e)) from None
    gone = run.path.with_name(f"{TMP_PREFIX}removed-{run.name}.{os.getpid()}")
    run.path.rename(gone)
    fsync_dir(run.path.parent)
    shutil.rmtree(gone)


def main() -> int:
    args = parse()
    runs, root, readers = console.find_runs(args.runs, args.root), environment.runs_root(args.root), Readers()
    with asked_together(runs):
        for run in runs:  # nothing is removed before all can be
            check(run, root, readers)
        freed = []
        for run in runs:
            print(f"{'removing' if args.yes else 'would remove'} {run.path}, which is at step {run.latest_step()}:")
            freed.append(tell(run))
        if runs[1:]:
            size, num = map(sum, zip(*freed, strict=True))
            print(f"all {len(runs)} runs: {amount(size)} in {counted(num, 'file', ',')}")
        if not args.yes:
            again = f"python launch/remove.py {shlex.join(args.runs)}{console.same_root(args.root)} --yes"
            print(f"nothing was removed; for good: {again}")
            return 0
        sys.stdout.flush()
        for run in runs:
            with turn(run):
                check(run, root, readers)
                remove(run)
            print(f"removed {run.name}" if len(runs) > 1 else "removed", flush=True)
    return 0


if __name__ == "__main__":
    console.run_script(main)
