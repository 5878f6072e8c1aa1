"""What a checkpoint costs training, and what reading it takes.

Blocks of training steps alternate: without a save, with one that the writer does in the background, with one that
training waits for. The cost of a save is the block's time beyond that of its neighbour without one.
"""

from __future__ import annotations

import statistics
import time

from ddpm.run import generations
from ddpm.run.saving import HostCopy, num_bytes
from ddpm.training.trainer import Trainer
from tools.bench.figures import Figure, Result
from tools.bench.measure import Bench
from tools.bench.workloads import trainer_of

INTERVAL_S = 600
"""Between saves, by default."""


def block(bench: Bench, trainer: Trainer, steps: int, save: str) -> float:
    """Seconds of `steps` steps, the first after a save; a background save is over at the end of the block."""
    began = time.monotonic()
    if save:
        trainer.save(wait=save == "waiting")
    for _ in range(steps):
        trainer.step.take()
    trainer.chronicle.settle()
    bench.sync()
    return time.monotonic() - began


def row(bench: Bench) -> Result:
    batch = bench.pick(gpu=128, cpu=4, small=2)
    options = ["train.compile=false", "checkpoint.keep_last=1", "checkpoint.milestone_every_steps=null"]
    with trainer_of(bench, f"train.global_batch={batch}", *options) as trainer:
        trainer.step.take()
        state, copy = trainer.state.state_dict(), HostCopy()
        first = bench.median(lambda: copy.take(state), rounds=1, warm_up=0)
        blocked = bench.median(lambda: copy.take(state), rounds=7)
        trainer.save(wait=True)  # its own buffers are allocated once
        cost: dict[str, list[float]] = {"background": [], "waiting": []}
        for i in range(1 if bench.small else 5):
            if i and time.monotonic() > bench.ends:
                break
            for save, seconds in cost.items():
                without = block(bench, trainer, bench.pick(gpu=40, cpu=2, small=1), "")
                seconds.append(block(bench, trainer, bench.pick(gpu=40, cpu=2, small=1), save) - without)
        run, step = trainer.run, trainer.run.latest_step()
        load = bench.median(lambda: (generations.verify(run, step), generations.load(run, step)), rounds=3, warm_up=0)
        background = statistics.median(cost["background"])
        return Result([
            Figure(f"{num_bytes(state) / 1e6:.0f} MB: training waits", blocked * 1e3, "ms",
                   at_most=bench.goal(cpu=60, gpu=50)),
            Figure("for the first, which allocates its buffers", first * 1e3, "ms"),
            Figure("costs in the background", background, "s", limit=statistics.median(cost["waiting"])),
            Figure("of the time, at one every ten minutes", 100 * background / INTERVAL_S, "%",
                   at_most=bench.goal(cpu=1, gpu=1)),
            Figure("verifying and loading it", load, "s"),
        ])  # fmt: skip
