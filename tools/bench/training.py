"""A training step: beside those of others, and its parts; and the trainer's whole loop, on a GPU at several batches."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from ddpm.network.device import Later
from ddpm.training.step import Step
from tools.bench import workloads
from tools.bench.counting import Operations, launched, launches, parts_of, profiled
from tools.bench.figures import Figure, Result, ratio
from tools.bench.machine import best_training, cost
from tools.bench.measure import Bench
from tools.bench.workloads import own_step, trainer_of

EAGER = "train.compile=false"
OUTSIDE = ("data", "randomness", "clip", "optimizer", "average", "rest")


@contextlib.contextmanager
def kernel_by_kernel() -> Iterator[None]:
    """Within: no step is replayed."""
    with mock.patch.object(Step, "replays", False):
        yield


class Enough(Exception):
    """Raised out of a trainer's loop once it has been measured."""


def against_others(bench: Bench) -> Result:
    """The same work in turns: a few steps each, round by round."""
    batch = bench.pick(gpu=128, cpu=4, small=2)
    torch.compiler.reset()
    result = Result()
    with trainer_of(bench, f"train.global_batch={batch}") as trainer:
        amp = trainer.resolved.amp != "off"
        works = {"ours": own_step(trainer)}
        flops = {}
        try:
            works["diffusers' example"] = workloads.diffusers_step(bench, batch)
            if bench.gpu:
                works["diffusers, bf16"] = workloads.diffusers_step(bench, batch, amp=True)
                works["diffusers, bf16, compiled"] = workloads.diffusers_step(bench, batch, amp=True, compiled=True)
        except ImportError:
            result.notes.append(f"diffusers: {workloads.NOT_THERE}")
        try:
            work, flops["denoising-diffusion-pytorch"] = workloads.lucidrains_step(bench, batch, amp=amp)
            works["denoising-diffusion-pytorch"] = work
        except ImportError:
            result.notes.append(f"denoising-diffusion-pytorch: {workloads.NOT_THERE}")
        times = bench.in_turns(works, warm_up=bench.pick(gpu=8, cpu=1, small=1),
                               calls=bench.pick(gpu=10, cpu=1, small=1))  # fmt: skip
        own = times.pop("ours")
        rate = batch / sorted(own)[len(own) // 2]
        best = best_training(bench, batch)
        result.figures += [
            Figure(f"training step, batch {batch}, {trainer.resolved.amp}", rate, "images/s", limit=best),
            Figure("share of the roofline", rate / best, at_least=bench.goal(cpu=0.70)),
        ]
    goals = {"diffusers' example": bench.goal(cpu=1.03, gpu=3.0), "diffusers, bf16, compiled": bench.goal(gpu=1.3)}
    for name, took in times.items():
        if name in flops:  # another network: what is compared is arithmetic a second
            took, name = [t * cost(bench).flops / flops[name] for t in took], f"{name}, FLOP/s"
        result.figures.append(ratio(f"against {name}", took, own, at_least=goals.get(name)))
    return result


def parts(bench: Bench) -> Result:
    """Not compiled and not replayed, so that it has parts: time, operations, and waits of the host for a GPU."""
    batch, result = bench.pick(gpu=128, cpu=4, small=2), Result()
    with kernel_by_kernel(), trainer_of(bench, f"train.global_batch={batch}", EAGER) as trainer:
        step, counted = own_step(trainer), Operations()
        for _ in range(3):
            step()
        bench.sync()
        with parts_of(trainer, counted), counted:
            step()
            bench.sync()
        with profiled(bench.device) as prof, parts_of(trainer, Operations()):
            step()
            bench.sync()
        found = dict(launched(prof))
        timed, steps = Operations(), bench.pick(gpu=20, cpu=2, small=1)
        with parts_of(trainer, timed):
            for _ in range(steps):
                step()
    for part in sorted(counted.started, key=lambda p: -timed.seconds[p]):
        told = [f"{counted.started[part]} operations"]
        told += [f"{found[part]} launches"] if part in found else []
        told += [f"{counted.waits[part]} waits"] if counted.waits[part] else []
        result.figures.append(Figure(f"{part}: {', '.join(told)}", timed.seconds[part] / steps * 1e3, "ms"))
    outside = sum(counted.started[p] for p in OUTSIDE)
    waits = sum(counted.waits.values())
    result.figures += [
        Figure("operations outside network and backward", outside, at_most=bench.goal(cpu=120)),
        Figure("waits of the host in a step", waits, at_most=bench.goal(gpu=0)),
    ]
    result.details = {"operations": dict(counted.started), "waits": dict(counted.waits), "launches": found}
    return result


def loop(
    bench: Bench, batch: int, *overrides: str, profile: bool = False, replayed: bool = True, goal: float | None = None
) -> Result:
    """The trainer's own loop, whole: data, randomness, network, optimizer, average, agreement."""
    steps, warm_up = (60, 15) if bench.gpu else (2, 2)
    torch.compiler.reset()
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    details: dict[str, Any] = {"batch": batch, "overrides": list(overrides)}
    alone = contextlib.nullcontext() if replayed else kernel_by_kernel()
    with alone, trainer_of(bench, f"train.global_batch={batch}", *overrides) as trainer:
        details |= {"amp": trainer.resolved.amp, "compile": trainer.resolved.compile}
        began = time.perf_counter()
        trainer.warm_up(lambda: None)
        marks: list[float] = []
        host: list[float] = []
        prof: Any = None
        take = trainer.step.take

        def timed() -> Later:
            started = time.perf_counter()
            try:
                return take()
            finally:
                host.append(time.perf_counter() - started)

        trainer.step.take = timed  # type: ignore[method-assign]

        def stop_requested() -> None:
            nonlocal prof
            if trainer.at.step == 2:  # compiled, tried out, recorded
                bench.sync()
                details["first_steps_s"] = time.perf_counter() - began
            if trainer.at.step in (warm_up, warm_up + steps):
                bench.sync()
                marks.append(time.perf_counter())
            if len(marks) == 2 and not profile:
                raise Enough
            if profile and trainer.at.step == warm_up + steps + 2:
                prof = profiled(bench.device)
                prof.start()
            if profile and trainer.at.step == warm_up + steps + 4:
                bench.sync()
                prof.stop()
                raise Enough

        try:
            trainer.train(stop_requested)
        except Enough:
            pass
    rate = steps * batch / (marks[1] - marks[0])
    figures = [
        Figure(f"loop, batch {batch}", rate, "images/s", at_least=goal, limit=best_training(bench, batch)),
        Figure("a step", (marks[1] - marks[0]) / steps * 1e3, "ms"),
        Figure("the first two steps", details["first_steps_s"], "s"),
        Figure(
            "host's time of a step",
            statistics.median(host[warm_up:]) * 1e3,
            "ms",
            at_most=bench.goal(gpu=0.3) if batch == 16 else None,
        ),
    ]
    if prof is not None:
        details |= launches(prof, 2)
        figures.append(Figure("kernels of a step", details["kernels_per_step"]))
        figures.append(Figure("operators of a step", details["aten_ops_per_step"]))
    if bench.gpu:
        figures.append(Figure("memory", torch.cuda.max_memory_allocated() / 2**30, "GiB"))
        torch.cuda.empty_cache()
    return Result(figures, details=details)
