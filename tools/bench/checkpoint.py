"""What a checkpoint costs training, at the default interval: background writer against a synchronous save.

python -m tools.bench.checkpoint                           Ho et al.'s network on this device
python -m tools.bench.checkpoint --dir /scratch/me         on another disk

Blocks of training steps alternate: without a save, with one that the writer does in the background, with one that
training waits for. The cost of a save is the block's time beyond that of its neighbour without one; the table gives
medians over the rounds, and their share of `checkpoint.every_min`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ddpm.config import reading
from ddpm.data import packed as data
from ddpm.network.device import apply, resolve
from ddpm.run.events import EventLog
from ddpm.run.fence import Fence
from ddpm.run.paths import RunDir
from ddpm.run.saving import num_bytes
from ddpm.training.ranks import World
from ddpm.training.trainer import Trainer
from launch.cluster.environment import PROJECT


def make_trainer(run: RunDir, device: torch.device, batch: int, cores: int) -> Trainer:
    options = [f"train.global_batch={batch}", "checkpoint.keep_last=1", "checkpoint.milestone_every_steps=null"]
    asked = reading.load(PROJECT / "configs" / "cifar10.yaml", options)
    images = np.random.default_rng(0).integers(0, 256, size=(1000, 32, 32, 3), dtype=np.uint8)
    packed = data.PackedImages(images, np.zeros(1000, np.int64), "noise", "train", data.images_digest(images))
    resolved = resolve(asked, device, cores)
    apply(resolved)
    fence = Fence(run, {"job": "bench", "restart": 0, "host": "here"})
    events = EventLog(run, "bench", 0, "here")
    trainer = Trainer(asked, run, World(0, 1, device), packed, resolved, fence=fence, events=events, owner={})
    trainer.resume()
    trainer.warm_up(lambda: None)
    return trainer


def block(trainer: Trainer, steps: int, save: str, device: torch.device) -> float:
    """Seconds of `steps` steps, the first after a save; a background save is over at the end of the block."""
    began = time.monotonic()
    if save:
        trainer.save(wait=save == "waiting")
    for _ in range(steps):
        trainer.step.take()
    trainer.chronicle.settle()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.checkpoint", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--dir", type=Path, help="where to save (default: the directory for temporary files)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block-s", type=float, default=6.0, help="seconds of training in a block")
    parser.add_argument("--batch", type=int, default=None, help="default: 128 on a GPU, 8 on a CPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        run = RunDir(Path(folder) / "run")
        run.path.mkdir()
        trainer = make_trainer(run, device, args.batch or (128 if device.type == "cuda" else 8), args.threads)
        trainer.save(wait=True)  # buffers are allocated once
        step_s = min(block(trainer, 3, "", device) for _ in range(2)) / 3
        steps = max(2, round(args.block_s / step_s))
        cost: dict[str, list[float]] = {"background": [], "waiting": []}
        for _ in range(args.rounds):
            for save, seconds in cost.items():
                without = block(trainer, steps, "", device)
                seconds.append(block(trainer, steps, save, device) - without)
        interval_s = (trainer.config.checkpoint.every_min or 0) * 60
        size = num_bytes(trainer.state.state_dict()) / 1e6
        print(f"{device}, {torch.get_num_threads()} threads; a checkpoint has {size:.0f} MB; "
              f"{steps} steps of {step_s:.3f} s a block, {args.rounds} rounds")  # fmt: skip
        for save, seconds in cost.items():
            middle = statistics.median(seconds)
            print(f"{save:11} {middle:7.3f} s a save (from {min(seconds):.3f} to {max(seconds):.3f}): "
                  f"{middle / interval_s:.3%} of the time at one every {interval_s / 60:g} min")  # fmt: skip


if __name__ == "__main__":
    main()
