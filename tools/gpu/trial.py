"""The default recipe on a GPU for as long as there is time: saved often, killed once, resumed, stopped with a save.

What it leaves in a folder: trial.json, with the curve, the seconds from the kill to the next step, and the digest of
the last checkpoint as it was verified (the file is too large to be carried off); grid.png; the last life's output,
run.log.
The run itself is removed, and no process of it is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ddpm.run import generations
from ddpm.run.events import read_events
from ddpm.run.files import read_json, read_jsonl
from ddpm.run.paths import RunDir
from launch.queue import local
from tools.bench import PROJECT

STOP_S = 25.0
"""Before the end: the last step is saved by then, and the checkpoint verified."""
SAVE_EVERY_MIN = 0.25
AS_TRAINED = ("train.warmup_steps=500", "train.ema_warmup=true", "log.grid_every_steps=1000")
"""So that a grid of two minutes shows what was learned: an average over 10,000 steps would still be noise."""
REHEARSAL = ("model.base_channels=16", "train.global_batch=4", "log.grid_every_steps=100", "log.grid_images=4")
"""What a CPU does in two minutes."""


def run(out: Path, limit_s: float, data: Path) -> int:
    """Returns 0; raises AssertionError for a run that did not go on where it was saved. What was found until then is
    left all the same."""
    ends, found = time.monotonic() + limit_s, dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="ddpm-trial-", ignore_cleanup_errors=True) as root:
        where = RunDir(Path(root) / "trial")
        guard = subprocess.Popen(
            [sys.executable, "-m", "tools.gpu.trial", root], cwd=PROJECT, stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            lives(where, limit_s, ends, data, found)
        finally:
            end(where)
            guard.kill()
            guard.wait()
            lines = told(where, out, found)
    last, killed_at = found["last_step"], found["killed_at"]
    assert last > killed_at, f"killed at step {killed_at}, it came no further than {last}"
    assert [m["step"] for m in lines] == list(range(100, 100 * len(lines) + 1, 100)), "steps missing or twice"
    return 0


def lives(where: RunDir, limit_s: float, ends: float, data: Path, found: dict[str, Any]) -> None:
    """A life that is killed and one that is stopped: what is seen of them from outside is put into `found`."""
    began = time.monotonic()
    submit(data, where, ends)
    while not beat(where) and time.monotonic() < ends - STOP_S:
        assert local.at_work(where), "the first life has ended: run.log says why"
        time.sleep(0.05)
    found["first_step_after_s"] = round(time.monotonic() - began, 1)
    first_job, found["killed_at"], found["saved"] = killed(where, limit_s, ends)
    began = time.monotonic()
    submit(data, where, ends)
    found["submitted_again_after_s"] = round(time.monotonic() - began, 1)
    found["next_step_after_s"] = found["back_at_that_step_after_s"] = None
    while time.monotonic() < ends - STOP_S:
        took, step = round(time.monotonic() - began, 1), beat(where, but_of=first_job)
        if step and found["next_step_after_s"] is None:
            found["next_step_after_s"] = took
        if step > found["killed_at"] and found["back_at_that_step_after_s"] is None:
            found["back_at_that_step_after_s"] = took
        time.sleep(0.05)
    where.stop_file.touch()
    while local.at_work(where) and time.monotonic() < ends - 10:
        time.sleep(0.2)
    began = time.monotonic()
    last = generations.verify(where, where.latest_step())
    found |= {"last_step": last.step, "sha256": last.sha256, "bytes": last.manifest["bytes"]}
    found["verified_in_s"] = round(time.monotonic() - began, 1)


def submit(data: Path, where: RunDir, ends: float) -> None:
    words = [
        sys.executable,
        "launch/submit.py",
        "data.name=images",
        f"data.path={data}",
        f"checkpoint.every_min={SAVE_EVERY_MIN}",
    ]
    words += ["--cluster", "local", "--gpus-per-node", "1", "--root", str(where.path.parent), "--name", where.path.name]
    words += AS_TRAINED
    if not torch.cuda.is_available():
        words += REHEARSAL
    left = max(1.0, ends - STOP_S - time.monotonic())
    try:
        code = subprocess.run(words, cwd=PROJECT, stdin=subprocess.DEVNULL, timeout=left).returncode
    except subprocess.TimeoutExpired:
        raise AssertionError(f"submit.py was not done in {left:.0f} s") from None
    assert code == 0, f"submit.py left with {code}"


def beat(where: RunDir, but_of: str = "") -> int:
    """The step that the run tells of, every few seconds; 0 where it is told by job `but_of`."""
    sign = read_json(where.heartbeat) or {}
    return 0 if sign.get("job") == but_of else int(sign.get("step", 0))


def killed(where: RunDir, limit_s: float, ends: float) -> tuple[str, int, int]:
    """Less than half through: the job that was killed, and the steps that it told of and had saved."""
    while time.monotonic() < ends - limit_s * 0.55 or where.latest_step() == 0:
        time.sleep(0.2)
        assert local.at_work(where), "the first life has ended: run.log says why"
        assert time.monotonic() < ends - STOP_S, "no checkpoint in time"
    (job,) = local.at_work(where)
    end(where)
    saved = where.latest_step()
    return job, max(beat(where), saved), saved


def end(where: RunDir) -> None:
    """Kill what is left of the run's jobs, with all that they started."""
    for pid, _ in local.at_work(where).values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        for _ in range(500):  # it holds the run until it has let its memory go
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes():
                    time.sleep(0.02)
                    continue
            break


def told(where: RunDir, out: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Write down what was `found` and what the run says of itself, as far as it came; its metrics."""
    lines = read_jsonl(where.metrics)
    record = {
        **found,
        "images_per_s": [round(m["images_per_s"]) for m in lines],
        "loss": [round(m["loss"], 5) for m in lines],
        "steps": [m["step"] for m in lines],
        "resolved": (read_json(where.run_json) or {}).get("resolved"),
        "events": [{k: e[k] for k in ("event", "time", "step") if k in e} for e in read_events(where)],
    }
    kept = {"run.log": sorted(where.logs.glob("*.out")), "grid.png": sorted(where.grids.glob("*.png"))}
    said = "".join(log.read_text(errors="replace")[-2000:] for log in kept["run.log"][-1:])
    shown = {k: lines[-1][k] for k in ("step", "loss", "images_per_s")} if lines else "no line"
    print(said, f"run: {shown}; {found}", sep="\n", flush=True)
    try:
        (out / "trial.json").write_text(json.dumps(record) + "\n")
        for name, files in kept.items():
            for last in files[-1:]:
                shutil.copy(last, out / name)
    except OSError as e:
        print(f"{out}: {e.strerror}", flush=True)
    return lines


def main() -> None:
    """The guard of a trial: once its input is closed, as it is when the trial is killed, end the run and remove it."""
    sys.stdin.read()
    root = Path(sys.argv[1])
    end(RunDir(root / "trial"))
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
