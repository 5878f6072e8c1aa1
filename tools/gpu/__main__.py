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

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from ddpm.run.files import read_json
from tools.bench import PROJECT
from tools.gpu import trial

STAGES = ("checks", "bench", "run")
SHARE = {"checks": 0.35, "bench": 0.55, "run": 1.0}
"""Of the time that is left when a stage begins."""


def bounded(command: list[str], log: Path, limit_s: float) -> int:
    """Run `command` in the project, its output in `log` and here; killed at its limit, with all that it started."""
    print(f"== {' '.join(command[2:])} (at most {limit_s:.0f} s)", flush=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=PROJECT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 124
            process.send_signal(signal.SIGINT)  # pytest then says what failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    print(log.read_text(errors="replace")[-5000:], flush=True)
    return code


def checks(out: Path, limit_s: float) -> int:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--tb=short", "--durations=8"]
    return bounded(command, out / "checks.log", limit_s - 10)


def bench(out: Path, limit_s: float, rows: list[str]) -> int:
    """Its rows on this GPU; a goal that is missed is no failure here, where all figures are wanted."""
    small = [] if torch.cuda.is_available() else ["--small"]
    command = [sys.executable, "-m", "tools.bench", *rows, *small, "--json", str(out / "bench.json")]
    code = bounded([*command, "--minutes", f"{(limit_s - 40) / 60:.2f}"], out / "bench.log", limit_s)
    record = read_json(out / "bench.json") or {}
    notes = [note for row in record.get("rows", {}).values() for note in row["notes"]]
    return int(code not in (0, 1) or not record or any(note.startswith("failed") for note in notes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=PROJECT / "runs" / "gpu")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of checks,bench,run")
    parser.add_argument("--rows", nargs="*", default=[], metavar="ROW", help="of the bench; quick: those that say most")
    parser.add_argument("--data", type=Path, help="images for the run: a folder or zip with train/CLASS/*")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is then ended too
    args.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + args.minutes * 60
    codes = {}
    for stage in stages:
        left = (ends - time.monotonic()) * (SHARE[stage] if stage != stages[-1] else 1.0)
        try:
            if stage == "checks":
                codes[stage] = checks(args.out, left)
            elif stage == "bench":
                codes[stage] = bench(args.out, left, args.rows)
            elif args.data is None:
                print("run: not run, there are no images: give --data")
            else:
                codes[stage] = trial.run(args.out, left, args.data.absolute())
        except AssertionError as e:
            print(f"{stage}: {e}")
            codes[stage] = 1
        (args.out / "stages.json").write_text(json.dumps(codes) + "\n")
    print(f"stages: {codes}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
