"""A trainer killed with SIGKILL at random moments, without a scheduler: real lives, forked to start fast."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ddpm.rundir import RunDir, read_events, read_jsonl
from launch.environment import PROJECT
from tools.chaos.files import Result

TINY = [
    "data.name=digits", "data.image_size=8", "model.base_channels=8", "model.channel_mults=[1,2]",
    "model.blocks_per_level=1", "model.attention_resolutions=[4]", "train.global_batch=8", "train.warmup_steps=10",
    "train.ema_decay=0.9", "log.every_steps=3", "log.grid_every_steps=null", "log.grid_images=1",
    "checkpoint.milestone_every_steps=null",
]  # fmt: skip


def prepare(root: Path, name: str, *overrides: str) -> RunDir:
    """A run directory, made by the script that people use."""
    command = [sys.executable, str(PROJECT / "launch" / "submit.py"), "--cluster", "local", "--prepare", "--root",
               str(root), "--name", name, *TINY, *overrides]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return RunDir(root / name)


def life(run: RunDir) -> int:
    """Fork one life of training; returns its pid. This process has loaded everything but started no threads."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(run.logs / "chaos.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from launch import jobs

    jobs.main(["train", str(run.path)])  # ends the process
    os._exit(1)


def ended(pid: int) -> int:
    """Exit code of a forked life, negative for a signal."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def final(run: RunDir) -> dict[str, Any]:
    return torch.load(run.checkpoint(run.latest_step()), weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, structure included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def curve(run: RunDir) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_jsonl(run.metrics)]


def killed_at_random_moments(count: int) -> Result:
    """Runs of 150 steps that save every other one, killed `count` times in all; each ends as the undisturbed one."""
    import ddpm.trainer  # noqa: F401 - loaded once, before any fork

    chosen = random.Random(2)
    root = Path(tempfile.mkdtemp(prefix="ddpm-chaos-"))
    options = ("train.total_steps=150", "checkpoint.every_steps=2")
    unreadable = lost = kills = different = runs = 0
    try:
        calm = prepare(root, "calm", *options)
        if ended(life(calm)) != 0:
            return Result("kill -9 of the trainer", "", "the undisturbed run failed", False)
        while kills < count:
            runs += 1
            run = prepare(root, f"run{runs}", *options)
            while kills < count:
                pid = life(run)
                time.sleep(chosen.uniform(0.02, 1.2))
                acknowledged = max((e["step"] for e in read_events(run) if e["event"] == "checkpoint"), default=0)
                os.kill(pid, signal.SIGKILL)
                if (code := ended(pid)) == 0:
                    break  # it was done before the kill
                unreadable += code != -signal.SIGKILL
                kills += 1
                lost += run.latest_step() < acknowledged
            code = ended(life(run))
            unreadable += code != 0
            different += code != 0 or not same(final(run), final(calm)) or curve(run) != curve(calm)
            shutil.rmtree(run.path)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return Result(
        "kill -9 of the trainer at random moments",
        "0 unreadable resumes, 0 acknowledged steps lost, identical end",
        f"{kills} kills over {runs} runs: {unreadable} unreadable, {lost} lost, {different} ends differ",
        unreadable == lost == different == 0 and kills >= count,
    )


ROWS = {"kill-9": (killed_at_random_moments, 200, 5)}
