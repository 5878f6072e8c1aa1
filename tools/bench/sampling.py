"""The network's evaluation and whole samplers beside diffusers', and what a sampler starts beside the network."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from ddpm.diffusion import rng, samplers, schedule
from ddpm.network.build import build_model
from ddpm.network.weights import cast_once
from ddpm.sampling.denoiser import Denoiser, LabelledEpsModel, eps_of
from ddpm.sampling.generate import sample_batch
from ddpm.sampling.request import CheckpointRef, Request
from tools.bench import workloads
from tools.bench.counting import operations
from tools.bench.figures import Figure, Result, ratio
from tools.bench.machine import best_evaluation
from tools.bench.measure import Bench
from tools.bench.workloads import SHAPE, cifar10

STEPS = 4


def _network(bench: Bench, precision: str) -> Any:
    model = build_model(cifar10(bench), bench.device, precision).eval()
    cast_once(model, precision)
    return model


def _ddim(bench: Bench, eps: LabelledEpsModel, x_T: torch.Tensor, steps: int) -> None:
    table = schedule.build(cifar10(bench).diffusion)
    samplers.sample(lambda x, t: eps(x, t, None), samplers.ddim(table, steps), x_T, noise=lambda t: x_T)


def _diffusers_ddim(unet: Any, x_T: torch.Tensor, steps: int) -> None:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample


def against_diffusers(bench: Bench) -> Result:
    """An evaluation and DDIM beside diffusers', both in fp32 on a CPU, in bf16 on a GPU; ours as in a sample job."""
    torch.set_num_threads(bench.threads)
    precision = "bf16" if bench.gpu else "fp32"
    batch = bench.pick(gpu=500, cpu=4, small=1)
    x_T = rng.normal(rng.key(0, "x_T"), torch.arange(batch, device=bench.device), 0, SHAPE)
    t = torch.full((batch,), 500, device=bench.device)
    eps = Denoiser.of(cifar10(bench), _network(bench, precision), precision).eps
    steps = bench.pick(gpu=10, cpu=STEPS, small=2)
    evaluation: dict[str, Callable[[], Any]] = {"ours": lambda: eps(x_T, t, None)}
    whole: dict[str, Callable[[], Any]] = {"ours": lambda: _ddim(bench, eps, x_T, steps)}
    result = Result()
    try:
        unet = workloads.diffusers_unet(bench).eval()
        unet = unet.to(torch.bfloat16) if bench.gpu else unet
        theirs_x = x_T.to(next(unet.parameters()).dtype)
        evaluation["diffusers"] = lambda: unet(theirs_x, t).sample
        whole["diffusers"] = lambda: _diffusers_ddim(unet, theirs_x, steps)
    except ImportError:
        result.notes.append(f"diffusers: {workloads.NOT_THERE}")
    with torch.inference_mode():
        warm_up = bench.pick(gpu=3, cpu=1, small=1)
        one, all_ = bench.in_turns(evaluation, warm_up=warm_up), bench.in_turns(whole, rounds=6)
    rate, best = batch / statistics.median(one["ours"]), best_evaluation(bench)
    result.figures = [
        Figure(f"network, batch {batch}, {precision}", rate, "evals/s", limit=best),
        Figure("share of the roofline", rate / best, at_least=bench.goal(cpu=0.75)),
        Figure(
            "DDIM, whole",
            batch * steps / statistics.median(all_["ours"]),
            "evals/s",
            at_least=bench.goal(gpu=25_000),
            limit=best,
        ),
    ]
    if "diffusers" in one:
        goal = bench.goal(cpu=1.2)
        result.figures.append(ratio("network against diffusers", one["diffusers"], one["ours"], at_least=goal))
        goal = bench.goal(cpu=1.15)
        result.figures.append(ratio("DDIM against diffusers", all_["diffusers"], all_["ours"], at_least=goal))
    return result


def compiled(bench: Bench) -> Result:
    """DDIM with the network compiled by torch, instead of our kernels."""
    torch.compiler.reset()
    precision = "bf16" if bench.gpu else "fp32"
    batch, steps = bench.pick(gpu=500, cpu=4, small=1), bench.pick(gpu=20, cpu=2, small=1)
    eps = eps_of(cast(Any, torch.compile(_network(bench, precision))), precision)
    x_T = rng.normal(rng.key(0, "x_T"), torch.arange(batch, device=bench.device), 0, SHAPE)
    with torch.inference_mode():
        first = bench.once(lambda: _ddim(bench, eps, x_T, 1))
        took = bench.median(lambda: _ddim(bench, eps, x_T, steps), rounds=3)
    return Result([Figure("DDIM, compiled", steps * batch / took, "evals/s", limit=best_evaluation(bench)),
                   Figure("the first call", first, "s")])  # fmt: skip


def beside_the_network(bench: Bench) -> Result:
    """Operations of a sampler's step in a sample job, noise included, where the network starts none."""
    batch = bench.pick(gpu=500, cpu=4, small=2)
    eps = torch.zeros(batch, *SHAPE, device=bench.device)
    denoiser = Denoiser(lambda x, t, labels: eps, schedule.build(cifar10(bench).diffusion), SHAPE, "fixed_large", 0,
                        bench.device)  # fmt: skip
    labels = np.full(batch, -1)

    def started(sampler: str, steps: int) -> int:
        request = Request(CheckpointRef(0, ""), "ema", sampler, steps, 0.0, None, 0, batch, 1, batch, "fp32", None)
        return operations(functools.partial(sample_batch, request, denoiser, 0, labels))

    goals = {"ancestral": bench.goal(cpu=30, gpu=30), "ddim": bench.goal(cpu=3, gpu=3), "dpmpp_2m": None}
    return Result([
        Figure(f"{sampler}: operations of a step", (started(sampler, 12) - started(sampler, 4)) / 8, at_most=goal)
        for sampler, goal in goals.items()
    ])  # fmt: skip
