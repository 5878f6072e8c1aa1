"""Checks, figures and a run of this project on one GPU, in stages that each leave their file and end in time.

    python -m tools.gpu --minutes 8 --out DIR            on a node with a GPU; no network is needed
    python -m tools.gpu --stages bench --minutes 5       one stage

checks   the tests in tests/gpu/: the same draws as on a CPU, every precision, overflows, stops and kills, no host waits
bench    python -m tools.bench: training, peers, sampling, features, checkpoints
run      configs/cifar10.yaml on images given as --data FOLDER_OR_ZIP, saved every 15 s, killed once and resumed

Without a GPU the bench runs smaller and the checks say what they lack. Exit code: 0 if every stage that ran
passed; one that did not run is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ddpm.run.events import read_events
from ddpm.run.files import read_json, read_jsonl
from ddpm.run.paths import RunDir
from tools.bench import PROJECT

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


def run(out: Path, limit_s: float, data: Path, root: Path) -> int:
    """`cifar10.yaml` for as long as there is time: kill -9 once, resumed, stopped with a save. Its curve, last grid."""
    ends = time.monotonic() + limit_s
    where = RunDir(root / "cifar10")
    submit(data, root)
    killed_at, saved = killed(where, limit_s, ends)
    began = time.monotonic()
    submit(data, root)
    while beat(where) <= killed_at and time.monotonic() < ends - 30:
        time.sleep(0.2)
    back_s = time.monotonic() - began if beat(where) > killed_at else None
    while time.monotonic() < ends - 25:
        time.sleep(0.5)
    where.stop_file.touch()
    while where.latest_step() < beat(where) and time.monotonic() < ends + 10:
        time.sleep(0.2)
    lines = told(where, out, {"killed_at": killed_at, "saved": saved, "back_at_that_step_after_s": back_s})
    print(f"run: {lines[-1] if lines else 'no line'}; at step {killed_at} again after {back_s} s", flush=True)
    assert where.latest_step() > killed_at, f"killed at step {killed_at}, it came no further than {where.latest_step()}"
    assert [m["step"] for m in lines] == list(range(100, 100 * len(lines) + 1, 100)), "steps missing or twice"
    return 0


def submit(data: Path, root: Path) -> None:
    words = [sys.executable, "launch/submit.py", "data.name=images", f"data.path={data}", "log.grid_every_steps=2000"]
    words += ["checkpoint.every_min=0.25", "--cluster", "local", "--gpus-per-node", "1"]
    words += ["--root", str(root), "--name", "cifar10"]
    if shutil.which("nvidia-smi") is None:  # a rehearsal
        words += ["model.base_channels=16", "train.global_batch=4", "log.grid_every_steps=null"]
    code = subprocess.run(words, cwd=PROJECT, stdin=subprocess.DEVNULL).returncode
    assert code == 0, f"submit.py left with {code}"


def beat(where: RunDir) -> int:
    """The step that the run tells of."""
    return int((read_json(where.heartbeat) or {}).get("step", 0))


def killed(where: RunDir, limit_s: float, ends: float) -> tuple[int, int]:
    """The steps that the run told of when it was killed, less than half through, and that it had saved."""

    def kill() -> None:
        job = [e["pid"] for e in read_events(where) if e["event"] == "submitted"][-1]
        os.killpg(int(job), signal.SIGKILL)

    while time.monotonic() < ends - limit_s * 0.55 or where.latest_step() == 0:
        time.sleep(0.5)
        if time.monotonic() > ends:
            kill()
            raise AssertionError("no checkpoint in time")
    killed_at = beat(where)
    kill()
    return killed_at, where.latest_step()


def told(where: RunDir, out: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Write down what was `found` and what the run says of itself; its metrics."""
    lines = read_jsonl(where.metrics)
    record = {
        **found,
        "last_step": where.latest_step(),
        "images_per_s": [round(m["images_per_s"]) for m in lines],
        "loss": [round(m["loss"], 5) for m in lines],
        "steps": [m["step"] for m in lines],
        "resolved": (read_json(where.run_json) or {})["resolved"],
        "events": [{k: e[k] for k in ("event", "time", "step") if k in e} for e in read_events(where)],
    }
    (out / "run.json").write_text(json.dumps(record) + "\n")
    for log in sorted(where.logs.glob("*.out"))[-1:]:
        print(log.read_text()[-2000:])
    for grid in sorted(where.grids.glob("*.png"))[-1:]:
        shutil.copy(grid, out / "grid.png")
    return lines


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
                codes[stage] = run(args.out, left, args.data.absolute(), args.out / "runs")
        except AssertionError as e:
            print(f"{stage}: {e}")
            codes[stage] = 1
        (args.out / "stages.json").write_text(json.dumps(codes) + "\n")
    print(f"stages: {codes}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
