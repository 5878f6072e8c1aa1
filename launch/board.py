#!/usr/bin/env python
"""Start TensorBoard for runs on this login node, on localhost and a free port; prints the ssh line that reaches it."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import os
import shlex
import shutil
import socket
import tempfile
from pathlib import Path

from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.paths import RunDir
from launch.cluster import environment
from launch.terminal import console

EXAMPLES = """examples:
  python launch/board.py                   all runs
  python launch/board.py cifar10 low-lr    these runs

Runs that are begun later are shown once it is started again.
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or directories (default: all)")
    parser.add_argument("--port", type=int, help="port (default: a free one)")
    parser.add_root()
    parser.add_argument("--dry-run", action="store_true", help="print the command; start nothing")
    return parser.parse_args()


def free_port(wanted: int | None) -> int:
    """`wanted`, or one that nobody listens on. Raises RequestError if it is taken."""
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as e:
            raise RequestError(f"--port {wanted}: cannot be used ({e}); leave it out for a free one") from None
        return int(s.getsockname()[1])


def link(runs: list[RunDir], where: Path) -> None:
    """Make the folder `where`, with a link to each run's tb/ under the run's name. Raises EnvironmentLacks.

    Given run directories, TensorBoard would show paths instead of names, and rescan everything in them again and again.
    """
    try:
        where.parent.mkdir(mode=0o700, exist_ok=True)
        if where.parent.lstat().st_uid != os.getuid():
            raise EnvironmentLacks(f"{where.parent} is somebody else's: choose another folder with TMPDIR")
        shutil.rmtree(where, ignore_errors=True)  # an earlier board's: nobody listens on this port
        where.mkdir()
        for run in runs:
            (where / run.name).symlink_to(run.tensorboard.absolute())
    except OSError as e:
        raise EnvironmentLacks(f"cannot write {where} ({e.strerror}): choose another folder with TMPDIR") from None


def main() -> int:
    args = parse()
    root = environment.runs_root(args.root)
    runs = [console.find_run(word, args.root) for word in args.runs]
    if not runs and not console.all_runs(root):
        raise RequestError(f"no runs in {root}; start one with python launch/submit.py, or look elsewhere with --root")
    port = free_port(args.port)
    runs = runs or console.all_runs(root)
    if len({r.name for r in runs}) < len(runs):
        raise RequestError("two of these runs have the same name: give them one at a time")
    where = Path(tempfile.gettempdir()) / f"ddpm-hpc-{os.getuid()}" / f"board-{port}"
    beside = Path(sys.executable).with_name("tensorboard")
    program = str(beside) if beside.exists() else shutil.which("tensorboard")
    if program is None:
        raise EnvironmentLacks("tensorboard is not installed: pip install tensorboard")
    command = [program, "--host", "127.0.0.1", "--port", str(port), "--logdir", str(where)]
    print(
        f"on your own machine:  ssh -N -L {port}:localhost:{port} {environment.ssh_words()}\n"
        f"then open:            http://localhost:{port}",
        flush=True,
    )
    if args.dry_run:
        print("\n".join([f"{r.name}: {r.tensorboard}" for r in runs] + [shlex.join(command)]))
        return 0
    link(runs, where)
    os.execv(program, command)


if __name__ == "__main__":
    console.run_script(main)
