"""Builds all Triton kernels of a training step and of sampling for GPUs that are not here; needs Triton alone.

    python -m tools.gpu.targets                            configs/cifar10.yaml, for every GPU in TARGETS: minutes
    python -m tools.gpu.targets sm_75 gfx90a --largest     of each kernel the one with the largest tile alone
    python -m tools.gpu.targets --config configs/celeba-64.yaml

The network and its update run on torch's meta device, where a launch is noted instead of made. Exit code: 1 if one is
not built, or needs more shared memory or threads than the GPU has.
"""

from __future__ import annotations

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.diffusion import kernels as draws
from ddpm.diffusion.philox import Key
from ddpm.network.prepared import Prepared
from ddpm.network.unet import UNet
from ddpm.training.progress import Window
from ddpm.training.update import Update
from launch.terminal import console
from tools.bench import PROJECT

TARGETS = {
    "sm_70": 96, "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
    "gfx90a": 64, "gfx942": 64,
}  # fmt: skip
"""Architecture -> KiB of shared memory that a program can have, by its maker's documents."""
MOST_THREADS = 1024
META = torch.device("meta")

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments, its options."""


class Elsewhere:
    """What Triton takes for the driver of a GPU."""

    def __init__(self, name: str) -> None:
        nvidia, arch = name.startswith("sm_"), name.removeprefix("sm_")
        self.target = GPUTarget("cuda", int(arch), 32) if nvidia else GPUTarget("hip", arch, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def launches(config: Config, precision: str, hip: str | None) -> list[Launch]:
    """Those of a training step, of an evaluation without gradients, and of the draws. hip: torch's ROCm, if it is for
    that."""
    found: list[Launch] = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((self, args, {"grid": grid, **options}))

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext()),
        mock.patch.object(torch.version, "hip", hip),
    ):
        _step(config, precision)
        _draws(config)
    return found


def _step(config: Config, precision: str) -> None:
    size, num = config.data.image_size, config.train.global_batch
    with META:
        model, average = (UNet(image_size=size, **config.model.model_dump()) for _ in range(2))
        x, t, number = torch.zeros(num, 3, size, size), torch.zeros(num, dtype=torch.int64), torch.zeros(())
        places = torch.zeros(5, num, dtype=torch.int64)
    labels = t if config.model.num_classes else None
    model.set_own_kernels(True)
    Prepared(model, precision)(x, t, labels, places).float().sum().backward()
    with torch.no_grad():
        model.eval()(x, t, labels)
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        update = Update(model, average, kind(model.parameters()), adam=True, max_norm=1.0)
        update(number, number, number, Window.empty(META))
    update.average(number)


def _draws(config: Config) -> None:
    num, elements = config.train.global_batch, 3 * config.data.image_size**2
    with META:
        index, out, places = torch.zeros(num, dtype=torch.int64), torch.zeros(num, elements), torch.zeros(5, num)
        at = torch.zeros((), dtype=torch.int64)
    for step in (7, at):
        draws.normal(out, index, Key(1, 2), step)
        draws.first_word(torch.zeros_like(index), index, Key(1, 2), step)
    draws.keep_mask(out.bool(), places.long(), 0, -1000)


def largest(found: list[Launch]) -> list[Launch]:
    """Of each kernel, and of each way in which it is divided, the launch with the largest tile."""
    chosen: dict[Any, tuple[int, Launch]] = {}
    for it in found:
        kernel, _, options = it
        way = (kernel.__name__, options.get("WHOLE"), "maxnreg" in options, options.get("ADAM"))
        tile = options.get("C", 1) * options.get("P", 1) * 16 + sum(v is True for v in options.values())
        chosen[way] = max(chosen.get(way, (-1, it)), (tile, it), key=lambda of: of[0])
    return [it for _, it in chosen.values()]


def build(found: list[Launch], target: str) -> tuple[int, int, list[str]]:
    """How many kernels they are, the most shared memory of one in bytes, and what is wrong with which."""
    driver.set_active(Elsewhere(target))
    warp, built, wrong = driver.active.get_current_target().warp_size, {}, dict[str, None]()
    for kernel, args, options in found:
        try:
            it = kernel.run(*args, warmup=True, **options)
        except Exception as e:  # whatever Triton and the compilers that it calls have to say
            wrong[f"{kernel.__name__}: {type(e).__name__}: {e}"] = None
            continue
        built[it.hash] = it.metadata.shared
        if it.metadata.shared > TARGETS[target] << 10 or it.metadata.num_warps * warp > MOST_THREADS:
            wrong[f"{kernel.__name__}: {it.metadata.shared} bytes shared, {it.metadata.num_warps} warps"] = None
    return len(built), max(built.values(), default=0), list(wrong)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.targets", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--config", type=Path, default=PROJECT / "configs" / "cifar10.yaml")
    parser.add_argument("--largest", action="store_true", help="of each kernel the one with the largest tile alone")
    args = parser.parse_args(argv)
    for target in args.targets:
        if target not in TARGETS:
            parser.error(f"TARGET {target}: one of {', '.join(TARGETS)}")
    config, failed = reading.load(args.config), False
    print(f"Triton {triton.__version__}, torch {torch.__version__}, {args.config.name}")
    for target in args.targets or TARGETS:
        precision = "fp16" if target in ("sm_70", "sm_75") else "bf16"
        found = launches(config, precision, "6.4" if target.startswith("gfx") else None)
        num, shared, wrong = build(largest(found) if args.largest else found, target)
        print(f"{target}, {precision}: {num} kernels, at most {shared} of {TARGETS[target] << 10} bytes shared")
        for why in wrong:
            print(f"  {why}")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    console.run_script(main)
