"""From the start of a job's process to its first step: of a run's first life, and of one that goes on with it.

Real jobs, as `launch/submit.py --prepare` leaves them. What the first life compiles, the whole network or kernels for
it, the second one finds in the run's compiled.zip. On a GPU both lives of the default network end within two minutes
together, or the row fails.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir
from launch.cluster import environment
from tools.bench import PROJECT, die_with_parent
from tools.bench.figures import Figure, Result
from tools.bench.measure import Bench
from tools.bench.workloads import SMALL

Limits = tuple[tuple[float, float], tuple[float, float]]
"""Seconds of the first life and of the next: until its first step, and for its last save."""
OF_A_GPU: Limits = ((60.0, 12.0), (40.0, 0.0))
OTHERS: Limits = ((300.0, 60.0), (300.0, 60.0))
OWN_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Where torch, where it was loaded, has said that it compiles: a job chooses for itself."""
RUN = (
    "data.name=digits",
    "train.global_batch=2",
    "checkpoint.milestone_every_steps=null",
    "log.every_steps=1",
    "log.grid_every_steps=null",
)
NETWORK = (
    "model.base_channels=8",
    "model.channel_mults=[1]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
)
"""What a CPU compiles in half a minute."""


def life(run: RunDir, limit_s: float, end_limit_s: float) -> tuple[float, str]:
    """Until a step is logged, then stopped with a save, if there is time. Its seconds, and what it said."""
    known = len(read_jsonl(run.metrics))
    run.logs.mkdir(exist_ok=True)
    variables = {k: v for k, v in environment.for_jobs(PROJECT).items() if k not in OWN_FOLDERS}
    with (run.logs / "bench.out").open("w+") as out:
        began = time.monotonic()
        job = subprocess.Popen([sys.executable, "-m", "launch.jobs", "train", str(run.path)], cwd=PROJECT, stdout=out,
                               stderr=subprocess.STDOUT, env=variables, preexec_fn=die_with_parent)  # fmt: skip
        try:  # in this process's group: what ends that ends the job
            while len(read_jsonl(run.metrics)) <= known and job.poll() is None and time.monotonic() < began + limit_s:
                time.sleep(0.01)
            took = time.monotonic() - began
            job.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(end_limit_s)
        finally:
            job.kill()
            job.wait()
        out.seek(0)
        said = out.read()
    if len(read_jsonl(run.metrics)) <= known:
        raise RuntimeError(f"no step in {took:.0f} s: {said[-1500:]}")
    return took, said


def lives(bench: Bench, limits_s: Limits, *overrides: str) -> tuple[tuple[float, str], tuple[float, str]]:
    """Seconds of a run's first life and of the next, which goes on with it; and what they said of compiled code."""
    with tempfile.TemporaryDirectory() as root:
        submit = [sys.executable, "launch/submit.py", "configs/cifar10.yaml", *RUN, *overrides, "--name", "start",
                  "--cluster", "local", "--prepare", "--root", root]  # fmt: skip
        submit += ["--gpus-per-node", "1"] if bench.gpu else []
        done = subprocess.run(submit, cwd=PROJECT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              preexec_fn=die_with_parent)  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        run = RunDir(Path(root) / "start")
        first, next_one = (life(run, *of_this) for of_this in limits_s)
        if "resumed step=" not in next_one[1]:
            raise RuntimeError(f"the next life did not go on: {first[1][-700:]}{next_one[1][-700:]}")
        return (first[0], _of_code(first[1])), (next_one[0], _of_code(next_one[1]))


def _of_code(said: str) -> str:
    told = re.search(r"compiled code.*", said)
    return told[0] if told else ""


def start(bench: Bench) -> Result:
    """Two lives of the default network, for which a GPU compiles kernels and a CPU does not."""
    (first, said), (again, kept) = lives(bench, OF_A_GPU if bench.gpu else OTHERS, *(SMALL if bench.small else ()))
    return Result([Figure("a first life, until its first step", first, "s"),
                   Figure("the next, which reads a checkpoint", again, "s", at_most=bench.goal(cpu=5, gpu=10))],
                  [n for n in (said, kept) if n])  # fmt: skip


def compiling(bench: Bench) -> Result:
    (first, said), (again, kept) = lives(bench, OTHERS, *NETWORK, "train.compile=true")
    return Result([Figure("a small network compiled, until its first step", first, "s"),
                   Figure("the next life", again, "s", at_most=bench.goal(cpu=20, gpu=10))],
                  [n for n in (said, kept) if n])  # fmt: skip
