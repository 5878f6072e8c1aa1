"""Jobs on a GPU, in real processes: killed, stopped and gone on with; samples however they are divided."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm.run import generations
from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from tests.conftest import PROJECT
from tests.gpu.test_training import column
from tests.training import differences

TOTAL = 2400
"""Steps: replayed they take about a millisecond each, and a signal must come before the last of them."""
OPTIONS = [
    "data.name=digits",
    "data.image_size=8",
    "model.base_channels=32",
    "model.channel_mults=[1,2]",
    "model.attention_resolutions=[4]",
    "diffusion.timesteps=50",
    f"train.total_steps={TOTAL}",
    "train.global_batch=32",
    "train.deterministic=true",
    "train.compile=false",
    "checkpoint.every_steps=100",
    "checkpoint.milestone_every_steps=null",
    "log.every_steps=50",
    "log.grid_every_steps=null",
    "sample.num_samples=96",
    "sample.batch=32",
    "sample.shards=1",
    "sample.sampler=ancestral",
    "sample.steps=50",
    "evaluate.extractor=pixels",
]


def script(root: Path, name: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, f"launch/{name}.py", *arguments, "--root", str(root)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def submit(root: Path, name: str, *arguments: str) -> None:
    script(root, "submit", *OPTIONS, "--name", name, "--cluster", "local", "--gpus-per-node", "1", *arguments)


def wait_for(run: RunDir, step: int) -> None:
    deadline = time.monotonic() + 120
    while run.latest_step() < step:
        assert time.monotonic() < deadline, run.path
        time.sleep(0.05)


def signal_job(run: RunDir, signum: signal.Signals) -> None:
    pid = [e["pid"] for e in read_events(run) if e["event"] == "submitted"][-1]
    if signum == signal.SIGKILL:
        os.killpg(pid, signum)
    else:
        os.kill(pid, signum)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def calm(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    submit(root, "calm", "--wait")
    return root


def test_a_run_that_was_killed_and_stopped_in_real_processes_ends_with_the_bits_of_a_calm_one(
    device: torch.device, calm: Path
) -> None:
    run = RunDir(calm / "disturbed")
    submit(calm, "disturbed")
    wait_for(run, 200)
    signal_job(run, signal.SIGKILL)
    submit(calm, "disturbed")
    wait_for(run, 400)
    signal_job(run, signal.SIGTERM)
    assert run.latest_step() < TOTAL and read_events(run)[-1]["event"] in ("checkpoint", "stop_requested")
    submit(calm, "disturbed", "--wait")
    assert differences(generations.load(RunDir(calm / "calm"), TOTAL), generations.load(run, TOTAL)) == []
    assert column(RunDir(calm / "calm")) == column(run)


def test_samples_have_the_same_bytes_under_every_sharding(device: torch.device, calm: Path) -> None:
    import numpy as np

    images = []
    for shards in ("1", "5"):  # of which the batches lie otherwise, and the last one of each is a part
        script(calm, "sample", "calm", "--set", f"in-{shards}", "--shards", shards, "--wait")
        files = sorted((calm / "calm" / "samples" / f"in-{shards}").glob("shard-*.npz"))
        assert len(files) == int(shards)
        images.append(np.concatenate([np.load(f)["images"] for f in files]))
    assert images[0].shape == (96, 8, 8, 3) and np.array_equal(images[0], images[1])
