"""From the start of a job's process to its first step: of a run's first life, and of one that goes on with it.

Real jobs, as `launch/submit.py --prepare` leaves them. With a network that is compiled, the first life compiles it and
the second one finds that.
"""

from __future__ import annotations

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
from tools.bench import PROJECT
from tools.bench.figures import Figure, Result
from tools.bench.measure import Bench
from tools.bench.workloads import SMALL

LIMIT_S = 300
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


def life(run: RunDir) -> tuple[float, str]:
    """Until a step is logged, then stopped with a save. Its seconds, and what it said of compiled code."""
    known = len(read_jsonl(run.metrics))
    run.logs.mkdir(exist_ok=True)
    # torch, where it was loaded, has said where it compiles
    variables = {k: v for k, v in environment.for_jobs(PROJECT).items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    with (run.logs / "bench.out").open("w+") as out:
        began = time.monotonic()
        job = subprocess.Popen([sys.executable, "-m", "launch.jobs", "train", str(run.path)], cwd=PROJECT, stdout=out,
                               stderr=subprocess.STDOUT, env=variables)  # fmt: skip
        while len(read_jsonl(run.metrics)) <= known and job.poll() is None and time.monotonic() < began + LIMIT_S:
            time.sleep(0.01)
        took = time.monotonic() - began
        job.send_signal(signal.SIGTERM)
        try:
            job.wait(60)
        finally:
            job.kill()
        out.seek(0)
        said = out.read()
    if len(read_jsonl(run.metrics)) <= known:
        raise RuntimeError(f"no step in {took:.0f} s: {said[-1500:]}")
    told = re.search(r"compiled code.*", said)
    return took, told[0] if told else ""


def lives(bench: Bench, *overrides: str) -> tuple[tuple[float, str], tuple[float, str]]:
    with tempfile.TemporaryDirectory() as root:
        submit = [sys.executable, "launch/submit.py", "configs/cifar10.yaml", *RUN, *overrides, "--name", "start",
                  "--cluster", "local", "--prepare", "--root", root]  # fmt: skip
        submit += ["--gpus-per-node", "1"] if bench.gpu else []
        done = subprocess.run(submit, cwd=PROJECT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        run = RunDir(Path(root) / "start")
        return life(run), life(run)


def start(bench: Bench) -> Result:
    """As a GPU compiles the default network, and a CPU does not."""
    (first, said), (again, kept) = lives(bench, *(SMALL if bench.small else ()))
    return Result([Figure("a first life, until its first step", first, "s"),
                   Figure("the next, which reads a checkpoint", again, "s", at_most=bench.goal(cpu=5, gpu=10))],
                  [n for n in (said, kept) if n])  # fmt: skip


def compiling(bench: Bench) -> Result:
    (first, said), (again, kept) = lives(bench, *NETWORK, "train.compile=true")
    return Result([Figure("a small network compiled, until its first step", first, "s"),
                   Figure("the next life", again, "s", at_most=bench.goal(cpu=20, gpu=10))],
                  [n for n in (said, kept) if n])  # fmt: skip
