"""Scoring a folder of PNGs from start to end beside pytorch-fid's command: whole processes, the same weights file.

    python -m tools.bench.commands --images 2000

Both read the same statistics of a reference. The weights are random, so that nothing is downloaded. Ours computes the
distance's interval besides.
"""

from __future__ import annotations

import launch.first  # noqa: F401

# isort: split
import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm.scoring.extractors import WEIGHTS_FILE, random_weights
from launch.terminal import console
from tools.bench import PROJECT, die_with_parent
from tools.bench.figures import Figure, Result, ratio
from tools.bench.measure import Bench

Times = dict[str, list[float]]
ROUNDS = 2
DIM = 2048
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def row(bench: Bench) -> Result:
    goals = {"at_least": bench.goal(cpu=1.5), "at_most": bench.goal(cpu=1e-4, gpu=1e-4)}
    return compare(bench.pick(gpu=2000, cpu=400, small=4), bench.device.type, **goals)


def compare(num: int, device: str, at_least: float | None = None, at_most: float | None = None) -> Result:
    """at_least: how many times as fast; at_most: by how much of itself the distance may differ."""
    with tempfile.TemporaryDirectory() as where:
        folder, reference, env = _prepared(Path(where), num)
        ours = [sys.executable, "launch/evaluate.py", "--images", str(folder), "--reference", str(reference)]
        theirs = [sys.executable, "-m", "pytorch_fid", str(folder), str(reference), "--device", device]
        works = {
            "ours": lambda: float(json.loads(_said(ours, env))["frechet_distance"]),
            "theirs": lambda: float(re.findall(r"FID: +(\S+)", _said(theirs, env))[0]),
        }
        wall, cpu, values = _in_turns(works)
    return Result([
        Figure(f"{num:,} PNGs against statistics, whole", min(wall["ours"]), "s"),
        Figure("its CPU time", min(cpu["ours"]), "s"),
        Figure("pytorch-fid's command", min(wall["theirs"]), "s"),
        Figure("its CPU time, pytorch-fid's", min(cpu["theirs"]), "s"),
        ratio("whole command against pytorch-fid's", wall["theirs"], wall["ours"], at_least=at_least),
        ratio("CPU time against pytorch-fid's", cpu["theirs"], cpu["ours"]),
        Figure("relative difference of the distance", abs(values["ours"] / values["theirs"] - 1), at_most=at_most),
    ])  # fmt: skip


def _prepared(where: Path, num: int) -> tuple[Path, Path, dict[str, str]]:
    """A folder of PNGs, statistics, and an environment in which both commands find the weights."""
    folder, reference = where / "images", where / "reference.npz"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(num):
        coarse = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
    mixed = draws.standard_normal((2 * DIM, DIM)) / np.sqrt(np.arange(1, DIM + 1))
    np.savez(reference, mu=mixed.mean(0) + 0.3, sigma=np.cov(mixed, rowvar=False))
    weights = where / "torch" / "hub" / "checkpoints" / WEIGHTS_FILE
    weights.parent.mkdir(parents=True)
    torch.save(random_weights()[0], weights)
    env = {key: value for key, value in os.environ.items() if key not in THREADS}
    return folder, reference, {**env, "TORCH_HOME": str(where / "torch")}


def _said(argv: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(argv, cwd=PROJECT, env=env, capture_output=True, text=True, preexec_fn=die_with_parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr[-1500:]}")
    return done.stdout


def _in_turns(works: dict[str, Callable[[], float]]) -> tuple[Times, Times, dict[str, float]]:
    """Seconds and seconds of CPU of each, round by round, and what it found."""
    wall: Times = {name: [] for name in works}
    cpu: Times = {name: [] for name in works}
    values = {}
    for i in range(ROUNDS):
        for name in list(works)[:: -1 if i % 2 else 1]:
            began, before = time.monotonic(), _cpu_s()
            values[name] = works[name]()
            wall[name].append(time.monotonic() - began)
            cpu[name].append(_cpu_s() - before)
    return wall, cpu, values


def _cpu_s() -> float:
    """CPU time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    if args.images < 2:
        parser.error(f"--images {args.images}: give 2 or more")
    for figure in compare(args.images, "cuda" if torch.cuda.is_available() else "cpu").figures:
        print(f"{figure.name:48}{figure.value:10.4g} {figure.unit}", flush=True)
    return 0


if __name__ == "__main__":
    console.run_script(main)
