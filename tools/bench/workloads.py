"""What is measured: this project's default recipe and its trainer, and the same network by others."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config import reading, schema
from ddpm.data import packed as data
from ddpm.network.device import Resolved, apply, resolve
from ddpm.run.events import EventLog
from ddpm.run.fence import Fence
from ddpm.run.paths import RunDir
from ddpm.training.chronicle import Chronicle, MainChronicle
from ddpm.training.ranks import World
from ddpm.training.trainer import Trainer
from tools.bench import PROJECT
from tools.bench.measure import Bench

SHAPE = (3, 32, 32)
SMALL = ("model.base_channels=32",)
CALM = ("log.every_steps=100000", "log.grid_every_steps=null", "checkpoint.every_min=null")
NOT_THERE = "not installed: pip install 'ddpm-hpc[bench]'"


def width(bench: Bench) -> int:
    return bench.pick(gpu=128, cpu=128, small=32)


def cifar10(bench: Bench, *overrides: str, recipe: str = "cifar10") -> schema.Config:
    """configs/cifar10.yaml, or another recipe there."""
    small = SMALL if bench.small else ()
    return reading.load(PROJECT / "configs" / f"{recipe}.yaml", [*small, *overrides])


def noise_images(num: int = 50_000, size: int = 32, num_classes: int = 1) -> data.PackedImages:
    images = np.random.default_rng(0).integers(0, 256, size=(num, size, size, 3), dtype=np.uint8)
    return data.PackedImages(images, np.arange(num) % num_classes, "noise", "train", data.images_digest(images))


@contextmanager
def trainer_of(
    bench: Bench, *overrides: str, world: World | None = None, threads: int = 0, recipe: str = "cifar10"
) -> Iterator[Trainer]:
    """A trainer of the recipe in a run of its own. It steps by torch's kernels until it is warmed up."""
    asked = cifar10(bench, *CALM, *overrides, recipe=recipe)
    world = world or World(0, 1, bench.device)
    resolved: Resolved = resolve(asked, bench.device, threads or bench.threads)
    apply(resolved)
    owner = {"job": "bench", "restart": 0, "host": "here"}
    with tempfile.TemporaryDirectory() as where:
        run = RunDir(Path(where))
        size, classes = asked.data.image_size, asked.model.num_classes or 1
        images = noise_images(bench.pick(gpu=50_000, cpu=5_000, small=500) * 32**2 // size**2, size, classes)
        fence, chronicle = None, Chronicle()
        if world.is_main:
            fence, events = Fence(run, owner), EventLog(run, "bench", 0, "here")
            chronicle = MainChronicle(
                asked, run, fence, events, owner=owner, world_size=world.world_size, num_images=len(images)
            )
        trainer = Trainer(asked, run, world, images, resolved, chronicle)
        trainer.resume()
        try:
            yield trainer
        finally:
            with contextlib.suppress(AssertionError):
                trainer.chronicle.settle()
            if fence is not None:
                fence.release()


def own_step(trainer: Trainer) -> Callable[[], None]:
    """A step as the loop takes it: whether the one before was finite is asked for after it."""
    last: Any = True

    def step() -> None:
        nonlocal last
        before, last = last, trainer.step.take()
        assert before, "a loss that is not finite"

    return step


def flops(network: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of one forward pass; a training step takes three times as many."""
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        network(*arguments)
    return float(counted.get_total_flops())


# ---------------------------------------------------------------- others


def diffusers_unet(bench: Bench) -> Any:
    from diffusers import UNet2DModel

    base = width(bench)
    network: Any = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(base, 2 * base, 2 * base, 2 * base),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        dropout=0.1,
        norm_eps=1e-6,
        norm_num_groups=32 if base == 128 else 8,
    )
    return network.to(bench.device)


def diffusers_step(bench: Bench, batch: int, *, amp: bool = False, compiled: bool = False) -> Callable[[], None]:
    """The step of diffusers' unconditional example: DDPMScheduler, mse, clip, AdamW, EMAModel."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    model = diffusers_unet(bench)
    ema = EMAModel(model.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
    network: Any = torch.compile(model) if compiled else model
    images = torch.rand(4, batch, *SHAPE) * 2 - 1
    at = 0

    def step() -> None:
        nonlocal at
        at += 1
        x_0 = images[at % 4].to(bench.device)
        eps = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (batch,), device=bench.device)
        x_t = scheduler.add_noise(x_0, eps, t)
        with plain(), torch.autocast(bench.device.type, torch.bfloat16, enabled=amp):
            loss = torch.nn.functional.mse_loss(network(x_t, t).sample.float(), eps)
        with plain():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        loss.item()  # logged at every step

    return step


@contextmanager
def plain() -> Iterator[None]:
    """Within: torch as it comes, with none of the trainer's switches."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)


def lucidrains_unet(bench: Bench) -> Any:
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=width(bench), dim_mults=(1, 2, 2, 2), dropout=0.1).to(bench.device)


def lucidrains_step(bench: Bench, batch: int, *, amp: bool) -> tuple[Callable[[], None], float]:
    """denoising-diffusion-pytorch's: its trainer's loss, clip, Adam and EMA; and its network's FLOPs for an image."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    model = lucidrains_unet(bench)
    one = flops(model, torch.zeros(1, *SHAPE, device=bench.device), torch.zeros(1, device=bench.device))
    diffusion = GaussianDiffusion(model, image_size=32, objective="pred_noise").to(bench.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10).to(bench.device)
    images = torch.rand(batch, *SHAPE, device=bench.device)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=amp):
            loss = diffusion(images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        loss.item()

    return step, one
