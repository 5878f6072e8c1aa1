"""The scripts as a user runs them: as processes, from another directory, on a machine without SLURM.

Everything is pinned to one CPU: with as many OpenMP threads as CPUs, a busy machine makes each step wait for a thread
that has no CPU, and a run of seconds takes minutes.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests import forked
from tests.conftest import PROJECT

TINY = """
name: tiny
data: {name: digits, image_size: 8, flip: false}
model: {base_channels: 8, channel_mults: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0.0}
diffusion: {timesteps: 50}
train: {total_steps: 400, global_batch: 8, lr: 1.0e-3, warmup_steps: 5, ema_decay: 0.9}
checkpoint: {every_min: null, every_steps: 200, milestone_every_steps: null}
log: {every_steps: 20, grid_every_steps: null, grid_images: 4}
sample: {num_samples: 25, steps: 4, batch: 8, shards: 2}
evaluate: {extractor: pixels, reference: train}
"""
TINY_SET = "ddim4-step400-seed0"


class Shell:
    """A working directory, a root for runs in it, and a PATH on which there is nothing but what a test puts there."""

    def __init__(self, where: Path) -> None:
        self.cwd = where / "elsewhere"
        self.root = where / "runs"
        self.bin = where / "bin"
        for path in (self.cwd, self.bin):
            path.mkdir(parents=True)
        (self.cwd / "tiny.yaml").write_text(TINY)

    def command(self, script: str, *args: str) -> tuple[list[str], dict[str, Any]]:
        """argv and the keywords of Popen."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "DDPM"))}
        env |= {"PATH": str(self.bin), "DDPM_RUNS": str(self.root)}
        cpu = min(os.sched_getaffinity(0))
        if script == "jobs":  # is a module
            return [sys.executable, "-m", "launch.jobs", *args], {**self.command("")[1], "cwd": PROJECT}
        argv = [sys.executable, str(PROJECT / "launch" / f"{script}.py"), *args]
        return argv, {"cwd": self.cwd, "env": env, "preexec_fn": lambda: os.sched_setaffinity(0, {cpu})}

    def __call__(self, script: str, *args: str) -> subprocess.CompletedProcess[str]:
        argv, options = self.command(script, *args)
        return forked.run(argv, options["cwd"], options["env"], timeout=240)

    def submit(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self("submit", "tiny.yaml", "--cluster", "local", *args)

    def refused(self, script: str, *args: str, code: int = 2) -> str:
        """Run it and expect a refusal: one message, no traceback, nothing written. Returns the message."""
        before = snapshot(self.root)
        done = self(script, *args)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stdout == "", done.stdout
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
        assert snapshot(self.root) == before
        return done.stderr

    def put(self, name: str, script: str) -> None:
        """A fake command on the PATH."""
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)


def as_a_user(shell: Shell, script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """As somebody whom the modes of files bind."""
    argv, options = shell.command(script, *args)
    return forked.run(argv, options["cwd"], options["env"], timeout=240, bound=True)


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below `root` with its time of change and content, and every directory."""
    return {
        str(p.relative_to(root)): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else (0, b"")
        for p in sorted(root.rglob("*"))
    }


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def events(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for p in sorted((run / "events").glob("*")) for line in p.read_text().splitlines()]
    return sorted(lines, key=lambda e: str(e["time"]))


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen in {timeout_s} s")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end(pid: int) -> None:
    """SIGTERM, and wait until the process is gone."""
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not is_alive(pid), f"the end of process {pid}")


def png(size: int = 16, seed: int = 0) -> bytes:
    """A picture that does not compress, so that half of its bytes are half of its pixels."""
    pixels = random.Random(seed).randbytes(size * size * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (size, size), pixels).save(out, "PNG")
    return out.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path
