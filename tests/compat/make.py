"""Makes fixture/ with the scripts of a checkout: python -m tests.compat.make CHECKOUT

The fixture is what the commit in fixture/README.md left behind. Made with later code it would record what that does,
and show nothing; so this says how the fixture came to be, and is not to be run again. It works while the scripts have
the options that they had then. Make it where nothing else keeps the CPU busy: the kill has to fall between two saves.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.compat.harness import (
    FIXTURE,
    IMAGES,
    NOWHERE,
    RUNS,
    TEST_SPLIT_TOO,
    Machine,
    config_digests,
    environment,
    metrics,
    packed,
    results,
    score,
    shards,
    submit,
)
from tests.images import write_zip

SAVED, LONGER = 26, 30
"""The step of killed's checkpoint, and the length that sampled is extended to."""
CHANGES = [
    "seed=7",
    "train.total_steps=10 log.every_steps=7 sample.steps=3",
    "train.lr_schedule=cosine",
    "train.lr_schedule=cosine train.total_epochs=30",
    "train.lr=0.0001 train.grad_clip=null train.micro_batch=16",
    "train.optimizer=adamw train.weight_decay=0.01 train.ema_warmup=true train.ema_every_steps=10",
    "model.num_classes=10 train.label_dropout=0.1",
    "model.attention_in=decoder model.middle_attention=false model.downsample=pool model.upsample=transpose",
    "model.norm_groups=8 model.time_embed_channels=64 model.block=plain",
    "diffusion.schedule=dns diffusion.dns_offset=7.0 diffusion.loss=l1 diffusion.variance=fixed_small",
    "data.name=images data.path=/somewhere/images.zip data.image_size=64",
]
"""Overrides of configs/cifar10.yaml: keys that its digest covers and that it does not, of the first day and later."""


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen in a minute"


def kill_in_training(machine: Machine) -> None:
    """kill -9 after the checkpoint and at least one line of metrics beyond it, before the next save."""
    run = machine.root / "killed"
    while True:
        shutil.rmtree(run, ignore_errors=True)
        submit(machine, str(machine.home / "killed.yaml"))
        log = run / "metrics.jsonl"
        until(lambda: (run / "checkpoints" / f"step-{SAVED:09d}.json").exists() and metrics(run)[-1]["step"] > SAVED)
        (pid,) = (json.loads(p.read_text())["pid"] for p in (run / "events").glob("submit-*"))
        os.killpg(pid, signal.SIGKILL)
        time.sleep(1)
        saved = sorted(p.name for p in (run / "checkpoints").iterdir())
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        print("killed:", saved, steps)
        if len(saved) == 2 and steps[-1] < 48:
            return


def kill_in_sampling(machine: Machine) -> None:
    """Shards 0 and 1 of four are made, and one batch of shard 2."""
    run = machine.root / "sampled"
    where = run / "samples" / "half"
    machine("launch/sample.py", "sampled", "--set", "half", "--num-samples", "20", "--shards", "4", "--prepare")
    for shard in "01":
        machine("-m", "launch.jobs", "sample", str(run), "half", "--shard", shard)
    argv = [sys.executable, "-m", "launch.jobs", "sample", str(run), "half", "--shard", "2"]
    with subprocess.Popen(argv, cwd=machine.project, env=environment(machine.home)) as process:
        until(lambda: list((where / "part").glob("0*.npz")))
        process.kill()
    assert not (where / "shard-00002-of-00004.json").exists() and len(list((where / "part").glob("0*.npz"))) == 1


def compress(path: Path, data: bytes) -> None:
    """As .xz, which does best with 32-bit numbers where it knows of them."""
    words = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}
    path.write_bytes(lzma.compress(data, filters=[words]))


def keep(machine: Machine, name: str) -> None:
    """The run as a part of the fixture: its path taken out, what is large compressed."""
    there = FIXTURE / name
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(machine.root / name, there)
    for path in [p for p in there.rglob("*") if p.is_file()]:
        if path.suffix in (".pt", ".safetensors"):
            compress(path.with_name(f"{path.name}.xz"), path.read_bytes())
            path.unlink()
        elif path.suffix in (".yaml", ".json", ".jsonl", ".out"):
            path.write_text(path.read_text().replace(str(machine.home), str(NOWHERE)))


def configs_then(checkout: Path) -> dict[str, tuple[str, list[str]]]:
    """Every config there was, and some with changes: name -> file, overrides."""
    paths = [f"configs/{p.name}" for p in sorted((checkout / "configs").glob("*.yaml"))]
    asked: dict[str, tuple[str, list[str]]] = {path: (path, []) for path in paths}
    for word in CHANGES:
        asked[f"configs/cifar10.yaml {word}"] = ("configs/cifar10.yaml", word.split())
    return asked


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    with tempfile.TemporaryDirectory(prefix="ddpm-") as directory:
        machine, undisturbed = Machine(Path(directory) / "one", checkout), Machine(Path(directory) / "two", checkout)
        write_zip(IMAGES, num_images=48, size=8)
        for place in (machine, undisturbed):
            place.bring_inputs()
            (place.home / "bin" / "git").symlink_to(shutil.which("git") or "git")
        sampled_yaml, its_killed_yaml = str(machine.home / "sampled.yaml"), str(undisturbed.home / "killed.yaml")
        print(kind := machine.kind())

        kill_in_training(machine)
        sampled = submit(machine, sampled_yaml, "--wait")
        machine("launch/sample.py", "sampled", "--set", "small", "--wait")
        machine("launch/evaluate.py", "sampled", "--set", "small", "--wait")
        kill_in_sampling(machine)
        for name in RUNS:
            keep(machine, name)

        whole = submit(undisturbed, its_killed_yaml, "--wait")
        machine("launch/sample.py", "sampled", "--set", "half", "--wait")
        machine("launch/evaluate.py", "sampled", "--set", "half", "--wait")
        made = shards(sampled, "half")
        submit(undisturbed, its_killed_yaml, "--name", "other", *TEST_SPLIT_TOO)
        submit(undisturbed, "configs/quickstart.yaml", "--prepare")
        expected = {
            "commit": commit.stdout.strip(),
            "kind": kind,
            "killed": results(whole, 50),
            "sampled": results(submit(machine, sampled_yaml, f"train.total_steps={LONGER}", "--wait"), LONGER),
            "score": score(sampled, "half"),
            "packed": packed(undisturbed),
        }
        text = json.dumps(expected).replace(str(machine.home), str(NOWHERE))
        compress(FIXTURE / "expected.json.xz", text.encode())
        digests = config_digests(machine, configs_then(checkout))
        (FIXTURE / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
        np.savez_compressed(FIXTURE / "half.npz", **{name: shard["images"] for name, shard in made.items()})


if __name__ == "__main__":
    main()
