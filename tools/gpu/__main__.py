"""Checks, figures and a run of this project on one GPU, in stages that each leave their file and end in time.

    python -m tools.gpu --minutes 8 --out DIR            on a node with a GPU; no network is needed
    python -m tools.gpu --stages bench --minutes 5       one stage

checks   the tests in tests/gpu/: the same draws as on a CPU, every precision, overflows, stops and kills, no host waits
bench    python -m tools.bench: training, peers, sampling, features, checkpoints
run      configs/cifar10.yaml on images given as --data FOLDER_OR_ZIP, saved every 15 s, killed once and resumed; needs
         two minutes

Without a GPU the bench runs smaller and the checks say what they lack. Exit code: 0 if every stage that ran
passed; one that did not run is named.
"""

from __future__ import annotations

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from ddpm.data.packed import open_images
from ddpm.run.files import read_json
from launch.terminal import console
from tools.bench import PROJECT
from tools.bench.__main__ import ROWS
from tools.gpu import trial

STAGES = ("checks", "bench", "run")
FIRST = ("ranks", "jobs", "training", "compiled", "kernels", "sampling", "asides", "update")
"""Files of tests/gpu in the order in which they are begun: those that take longest, beside which the others fit, then
those that say most."""
SHARE = {"checks": 0.35, "bench": 0.55, "run": 1.0}
"""Of the time that is left when a stage begins."""
LEAVE_S = 10.0
"""That what is interrupted at the limit has to say what it found so far."""

GUARDED = (
    "/bin/sh",
    "-c",
    'exec 3<&0; { read -r _ <&3; kill -9 0; } >/dev/null 2>&1 & exec "$@" </dev/null 3<&-',
    "sh",
)
"""Before a command that leads a process group: all of the group is killed once its input, a pipe, is closed, as it is
when we are killed."""


def bounded(commands: dict[Path, list[str]], limit_s: float, at_once: int = 1, into: Path | None = None) -> int:
    """Run the commands in the project, so many at once, the output of each in its log and, when it is done, here.

    At the limit all that they started is killed. into: a file to which each log is added when its command is done.
    Returns the largest exit code; 124 if there was not enough time.
    """
    ends, waiting = time.monotonic() + limit_s, dict(commands)
    started: dict[Path, subprocess.Popen[bytes]] = {}
    running, codes = list[Path](), [0]
    try:
        while (waiting or running) and time.monotonic() < ends:
            for log, command in list(waiting.items())[: at_once - len(running)]:
                print(f"== {' '.join(command[2:])} (at most {ends - time.monotonic():.0f} s)", flush=True)
                with log.open("wb") as out:
                    started[log] = subprocess.Popen(
                        [*GUARDED, *command], cwd=PROJECT, stdout=out, stderr=subprocess.STDOUT,
                        stdin=subprocess.PIPE, start_new_session=True,
                    )  # fmt: skip
                running.append(log)
                del waiting[log]
            for log in [log for log in running if started[log].poll() is not None]:
                running.remove(log)
                codes.append(abs(started[log].returncode))
                tell(log, f"exit code {started[log].returncode}", into)
            time.sleep(0.05)
        for log in running:
            print(f"interrupted, no time left: {log.stem}", flush=True)
            started[log].send_signal(signal.SIGINT)  # pytest then says what failed so far
        killed_at = time.monotonic() + LEAVE_S
        for log in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[log].wait(max(0.0, killed_at - time.monotonic()))
        for log in waiting:
            print(f"no time left for {log.stem}")
        return max(codes + [124] * bool(waiting or running))
    finally:
        for process in started.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for log in running:
            tell(log, "interrupted", into)


def tell(log: Path, how: str, into: Path | None) -> None:
    """Print the end of a log, and add all of it to a file; a full disk ends nothing."""
    head, said = f"-- {log.stem}: {how}", log.read_text(errors="replace")
    print(head, said[-5000:], sep="\n", flush=True)
    if into is not None:
        try:
            with into.open("a") as f:
                f.write(f"{head}\n{said}\n")
        except OSError as e:
            print(f"{into}: {e.strerror}; it has what came before", flush=True)


def checks(out: Path, limit_s: float) -> int:
    """The files of tests/gpu side by side, where there are cores: most of their time is their compilers'. All they say
    is in one file."""
    names = sorted(file.stem.removeprefix("test_") for file in (PROJECT / "tests" / "gpu").glob("test_*.py"))
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=3"]
    (out / "checks.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="checks-", dir=out, ignore_cleanup_errors=True) as where:
        commands = {
            Path(where) / f"{name}.log": [*pytest, f"tests/gpu/test_{name}.py"]
            for name in sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
        }
        cores = len(os.sched_getaffinity(0))
        return bounded(commands, limit_s - LEAVE_S, at_once=max(1, cores // 4), into=out / "checks.log")


def bench(out: Path, limit_s: float, rows: list[str]) -> int:
    """Its rows on this GPU; a goal that is missed is no failure here, where all figures are wanted."""
    small = [] if torch.cuda.is_available() else ["--small"]
    command = [sys.executable, "-m", "tools.bench", *rows, *small, "--json", str(out / "bench.json")]
    (out / "bench.json").unlink(missing_ok=True)  # an earlier call's
    minutes = f"{max(0.0, limit_s - 40) / 60:.2f}"
    code = bounded({out / "bench.log": [*command, "--minutes", minutes]}, limit_s - LEAVE_S)
    record = read_json(out / "bench.json") or {}
    notes = [note for row in record.get("rows", {}).values() for note in row["notes"]]
    return int(code not in (0, 1) or not record.get("rows") or any(note.startswith("failed") for note in notes))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8, help="for all stages together (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=PROJECT / "runs" / "gpu", help="for their files (default: runs/gpu)"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="some of checks,bench,run")
    parser.add_argument("--rows", nargs="*", default=[], metavar="ROW", help="of the bench; quick: those that say most")
    parser.add_argument("--data", type=Path, help="images for the run: a folder or zip with train/CLASS/*")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    if unknown := [row for row in args.rows if row not in ("quick", *(known.name for known in ROWS))]:
        parser.error(f"--rows: no row {', '.join(unknown)}; python -m tools.bench --help lists them")
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes:g}: give a number above 0")
    if stages == ["run"] and args.data is None:
        parser.error("--stages run: needs images, as --data FOLDER_OR_ZIP")
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data}: does not exist; give a folder or a zip with train/CLASS/*")
    console.check_outside_runs(args.out, "--out")
    if "run" in stages and args.data is not None:
        open_images(args.data.absolute())  # raises what is wrong with it, before any minute is spent
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "stages.json").write_text("{}\n")
    except OSError as e:
        parser.error(f"--out {args.out}: {e.strerror}; give a folder that can be written")
    if "run" in stages and args.data is None:
        print("run: not run, there are no images: give --data")
        stages = [stage for stage in stages if stage != "run"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is then ended too
    ends = time.monotonic() + args.minutes * 60
    codes = {}
    for stage in stages:
        left = (ends - time.monotonic()) * (SHARE[stage] if stage != stages[-1] else 1.0)
        try:
            if stage == "checks":
                codes[stage] = checks(args.out, left)
            elif stage == "bench":
                codes[stage] = bench(args.out, left, args.rows)
            else:
                codes[stage] = trial.run(args.out, left, args.data.absolute())
        except AssertionError as e:
            print(f"{stage}: {e}")
            codes[stage] = 1
        except Exception:  # the next stage may fare better
            traceback.print_exc()
            codes[stage] = 1
        with contextlib.suppress(OSError):  # a full disk
            (args.out / "stages.json").write_text(json.dumps(codes) + "\n")
    print(f"stages: {codes}")
    return int(any(codes.values()))


if __name__ == "__main__":
    console.run_script(main)
