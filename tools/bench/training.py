"""A training step: beside those of others, and its parts; and the trainer's whole loop, on a GPU at several batches."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from ddpm.network.device import Later, resolve
from ddpm.training.step import Step
from ddpm.training.trainer import Trainer
from tools.bench import PROJECT, workloads
from tools.bench.counting import Operations, launched, launches, parts_of, profiled
from tools.bench.figures import Figure, Result, ratio, short
from tools.bench.machine import best_training, cost
from tools.bench.measure import Bench
from tools.bench.workloads import own_step, trainer_of

EAGER = "train.compile=false"
COMPILES_S = 90.0
"""What a recipe takes on a GPU until torch has compiled it."""
OUTSIDE = ("data", "randomness", "clip", "optimizer", "average", "update", "rest")


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
        trainer.warm_up(lambda: None)
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
        rate = batch / statistics.median(own)
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
        trainer.warm_up(lambda: None)
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


class Watch:
    """A trainer's loop while it is measured, as its `stop_requested`: `steps` of it after `warm_up`, and where asked
    two more under the profiler. Raises Enough once that is done."""

    def __init__(self, bench: Bench, trainer: Trainer, warm_up: int, steps: int, *, profile: bool) -> None:
        self._bench, self._trainer, self._ends = bench, trainer, (warm_up, warm_up + steps)
        self._profile, self._began = profile, time.perf_counter()
        self.marks: list[float] = []
        """When the measured steps began, and when they were done."""
        self.host: list[float] = []
        """The host's time of each step."""
        self.first_steps_s = 0.0
        self.prof: Any = None
        self._take = trainer.step.take
        trainer.step.take = self._timed  # type: ignore[method-assign]

    def _timed(self) -> Later:
        started = time.perf_counter()
        try:
            return self._take()
        finally:
            self.host.append(time.perf_counter() - started)

    def __call__(self) -> None:
        at, last = self._trainer.at.step, self._ends[1]
        if at == 2:  # compiled, tried out, recorded
            self._bench.sync()
            self.first_steps_s = time.perf_counter() - self._began
        if at in self._ends:
            self._bench.sync()
            self.marks.append(time.perf_counter())
        if len(self.marks) == 2 and not self._profile:
            raise Enough
        if self._profile and at == last + 2:
            self.prof = profiled(self._bench.device)
            self.prof.start()
        if self._profile and at == last + 4:
            self._bench.sync()
            self.prof.stop()
            raise Enough


def determinism(bench: Bench) -> Result:
    """What `train.deterministic` costs the loop: both ways in turns."""
    rates: dict[str, list[float]] = {"false": [], "true": []}
    for way in list(rates) * bench.pick(gpu=2, cpu=1, small=1):
        eager = () if bench.gpu else (EAGER,)
        batch = bench.pick(gpu=128, cpu=4, small=2)
        rates[way].append(loop(bench, batch, *eager, f"train.deterministic={way}").figures[0].value)
    without, with_it = (statistics.median(found) for found in rates.values())
    return Result([
        Figure("with train.deterministic", with_it, "images/s"),
        Figure("without", without, "images/s"),
        Figure("share lost", 1 - with_it / without, at_most=bench.goal(gpu=0.03)),
    ])  # fmt: skip


def recipes(bench: Bench) -> Result:
    """The loop of every other recipe as it is, on a GPU; elsewhere a rehearsal. Those that torch compiles come last;
    one that fails takes no other's figure away."""
    elsewhere = () if bench.gpu else (EAGER, "train.amp=off", "train.global_batch=4", "train.micro_batch=null")
    result, compiled = Result(), dict[str, bool]()
    for name in sorted({path.stem for path in (PROJECT / "configs").glob("*.yaml")} - {"cifar10", "quickstart"}):
        config = workloads.cifar10(bench, *elsewhere, recipe=name)
        compiled[name] = bool(resolve(config, bench.device, bench.threads).compile)
    for name in sorted(compiled, key=lambda name: (compiled[name], name)):
        if time.monotonic() + compiled[name] * COMPILES_S > bench.ends:
            result.notes.append(f"no time left for {name}")
            continue
        torch.compiler.reset()
        gc.collect()  # of the memory of the one before, too
        try:
            result.figures.append(_recipe(bench, name, *elsewhere))
            print(f"{result.figures[-1].name}: {short(result.figures[-1].value)} images/s", flush=True)  # if cut short
        except Exception as e:
            traceback.print_exc()
            result.notes.append(f"failed: {name}: {type(e).__name__}: {e}")
    return result


def _recipe(bench: Bench, name: str, *overrides: str) -> Figure:
    warm_up, steps = (10, 30) if bench.gpu else (2, 1)
    with trainer_of(bench, *overrides, "train.total_epochs=null", "train.total_steps=1000", recipe=name) as trainer:
        watch = Watch(bench, trainer, warm_up, steps, profile=False)
        trainer.warm_up(lambda: None)
        with contextlib.suppress(Enough):
            trainer.train(watch)
        rate = steps * trainer.config.train.global_batch / (watch.marks[1] - watch.marks[0])
        return Figure(f"{name}, {trainer.resolved.amp}, kernels: {trainer.resolved.kernels}", rate, "images/s")


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
        watch = Watch(bench, trainer, warm_up, steps, profile=profile)
        trainer.warm_up(lambda: None)
        with contextlib.suppress(Enough):
            trainer.train(watch)
    details["first_steps_s"] = watch.first_steps_s
    took = watch.marks[1] - watch.marks[0]
    rate = steps * batch / took
    figures = [
        Figure(f"loop, batch {batch}", rate, "images/s", at_least=goal, limit=best_training(bench, batch)),
        Figure("a step", took / steps * 1e3, "ms"),
        Figure("the first two steps", details["first_steps_s"], "s"),
        Figure(
            "host's time of a step",
            statistics.median(watch.host[warm_up:]) * 1e3,
            "ms",
            at_most=bench.goal(gpu=0.3) if batch == 16 else None,
        ),
    ]
    if watch.prof is not None:
        details |= launches(watch.prof, 2)
        figures += [Figure("kernels of a step", details["kernels_per_step"])] if bench.gpu else []
        figures.append(Figure("operators of a step", details["aten_ops_per_step"]))
    if bench.gpu:
        figures.append(Figure("memory", torch.cuda.max_memory_allocated() / 2**30, "GiB"))
        torch.cuda.empty_cache()
    return Result(figures, details=details)
