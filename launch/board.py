#!/usr/bin/env python
"""TensorBoard for runs, on the login node: bound to localhost, on a free port, with the ssh line that reaches it."""

from __future__ import annotations

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import getpass
import os
import shutil
import socket
from pathlib import Path

from ddpm.errors import EnvironmentLacks, RequestError
from launch.cluster import environment
from launch.terminal import console

EXAMPLES = """examples:
  python launch/board.py                   all runs
  python launch/board.py cifar10 low-lr    these
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or directories (default: all)")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
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


def main() -> int:
    args = parse()
    root = environment.runs_root(args.root)
    runs = [console.find_run(word, args.root) for word in args.runs]
    if not runs and not console.all_runs(root):
        raise RequestError(f"no runs in {root}; start one with python launch/submit.py, or look elsewhere with --root")
    port = free_port(args.port)
    runs = runs or console.all_runs(root)
    # their tb/ alone: TensorBoard would look again and again through all that lies beside it
    where = ["--logdir_spec", ",".join(f"{r.name}:{r.tensorboard}" for r in runs)]
    if len(runs) == 1:
        where = ["--logdir", str(runs[0].tensorboard)]
    elif odd := [r.tensorboard for r in runs if "," in str(r.tensorboard)]:
        raise RequestError(f"{odd[0]}: TensorBoard takes a comma for the end of a path; give one RUN")
    beside = Path(sys.executable).with_name("tensorboard")
    program = str(beside) if beside.exists() else shutil.which("tensorboard")
    if program is None:
        raise EnvironmentLacks("tensorboard is not installed: pip install tensorboard")
    command = [program, "--host", "127.0.0.1", "--port", str(port), *where]
    print(
        f"on your own machine:  ssh -N -L {port}:localhost:{port} {getpass.getuser()}@{socket.getfqdn()}\n"
        f"then open:            http://localhost:{port}",
        flush=True,
    )
    if args.dry_run:
        print(" ".join(command))
        return 0
    os.execv(program, command)


if __name__ == "__main__":
    console.run_script(main)
