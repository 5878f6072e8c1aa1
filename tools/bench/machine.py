"""What this machine can do, and what the network could do on it: the roofline.

Without overlap: every convolution and product at the mean speed of the network's two main convolutions, every
normalisation once through memory (forward: read and written; backward: two reads and a write), and in training the
optimizer's state and the average once a step.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import nn

from ddpm.network.build import build_model
from tools.bench.figures import Figure, Result
from tools.bench.measure import Bench
from tools.bench.workloads import SHAPE, cifar10, flops

OPTIMIZER_BYTES = 9 * 4
"""A parameter's: itself, its moments and its average are read and written, its gradient is read."""


@dataclass(frozen=True)
class Peaks:
    convolution: dict[str, float]
    """TFLOP/s, of the network's two main ones."""
    product: float
    copy: float
    """GB/s, read and written."""

    @property
    def flops_per_s(self) -> float:
        return 1e12 * sum(self.convolution.values()) / len(self.convolution)


def measure(bench: Bench) -> Peaks:
    """Measure the peaks in the precision, and with the threads, with which the network is trained there."""
    torch.set_num_threads(bench.threads)
    dtype = torch.bfloat16 if bench.gpu else torch.float32
    batch = bench.pick(gpu=512, cpu=8, small=1)
    on = {"device": bench.device, "dtype": dtype}
    found = {}
    for channels, size in ((128, 32), (256, 16)):
        x = torch.randn(batch, channels, size, size, **on).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        w = torch.randn(channels, channels, 3, 3, **on).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        work = 2 * batch * size * size * channels * channels * 9
        convolve = functools.partial(nn.functional.conv2d, x, w, padding=1)
        with torch.no_grad():
            found[f"{channels} channels at {size}x{size}"] = work / bench.median(convolve, calls=5) / 1e12
    n = bench.pick(gpu=8192, cpu=1024, small=256)
    a = torch.randn(n, n, **on)  # type: ignore[call-overload]
    product = 2 * n**3 / bench.median(lambda: a @ a, calls=5) / 1e12
    b = torch.empty(bench.pick(gpu=2**30, cpu=2**27, small=2**22), dtype=torch.uint8, device=bench.device)
    c = torch.zeros_like(b)
    return Peaks(found, product, 2 * b.numel() / bench.median(lambda: c.copy_(b), calls=3) / 1e9)


@functools.cache
def _peaks(device: torch.device, small: bool) -> Peaks:
    return measure(Bench(device, small, time.monotonic() + 60))


def peaks(bench: Bench) -> Peaks:
    """Measured once in a process."""
    return _peaks(bench.device, bench.small)


@dataclass(frozen=True)
class Cost:
    """What the evaluation of one image costs."""

    flops: float
    normalised: int
    """Elements that its normalisations see."""
    parameters: int


@functools.cache
def _cost(small: bool) -> Cost:
    bench = Bench(torch.device("cpu"), small, 0)
    model = build_model(cifar10(bench), bench.device, "off").eval()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    work = flops(model, torch.zeros(1, *SHAPE), torch.zeros(1, dtype=torch.int64))
    return Cost(work, sum(seen), sum(p.numel() for p in model.parameters()))


def cost(bench: Bench) -> Cost:
    return _cost(bench.small)


def best_training(bench: Bench, batch: int) -> float:
    """Images/s."""
    own, at, size = cost(bench), peaks(bench), 2 if bench.gpu else 4
    moved = own.normalised * size * 5 + own.parameters * OPTIMIZER_BYTES / batch
    return 1 / (3 * own.flops / at.flops_per_s + moved / (at.copy * 1e9))


def best_evaluation(bench: Bench) -> float:
    """Network evaluations x images/s."""
    own, at, size = cost(bench), peaks(bench), 2 if bench.gpu else 4
    return 1 / (own.flops / at.flops_per_s + own.normalised * size * 2 / (at.copy * 1e9))


def row(bench: Bench) -> Result:
    found, batch = peaks(bench), bench.pick(gpu=128, cpu=4, small=2)
    unit = "TFLOP/s"
    figures = [Figure(f"convolution, {name}", value, unit) for name, value in found.convolution.items()]
    figures += [Figure("matrix product", found.product, unit), Figure("copy", found.copy, "GB/s")]
    figures += [Figure(f"roofline, training at batch {batch}", best_training(bench, batch), "images/s"),
                Figure("roofline, sampling", best_evaluation(bench), "evals/s")]  # fmt: skip
    return Result(figures, details={"flops": cost(bench).flops, "parameters": cost(bench).parameters})
