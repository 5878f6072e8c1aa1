"""A grid of samples from a network in training: the same noise each time, so that grids can be compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ddpm import rng
from ddpm.config import Config
from ddpm.diffusion.samplers import ddim, sample, to_images
from ddpm.errors import Stopped
from ddpm.sampling.denoiser import eps_of
from ddpm.schedule import Schedule
from ddpm.telemetry import tile

GRID_STEPS = 50


def num_steps(config: Config) -> int:
    return min(GRID_STEPS, config.diffusion.timesteps)


def wait(config: Config, stop_requested: Callable[[], str | None]) -> None:
    """Asks as often as `draw` does, for a rank that draws nothing. Raises Stopped."""
    for _ in range(num_steps(config)):
        _poll(stop_requested)


def _poll(stop_requested: Callable[[], str | None]) -> None:
    if reason := stop_requested():
        raise Stopped(reason)


def draw(
    config: Config, model: nn.Module, schedule: Schedule, precision: str, stop_requested: Callable[[], str | None]
) -> np.ndarray:
    """`log.grid_images` samples by DDIM, classes in turn, tiled to uint8 (H, W, 3). Raises Stopped."""
    device = next(model.parameters()).device
    classes, size = config.model.num_classes, config.data.image_size
    index = torch.arange(config.log.grid_images, device=device)
    labels = index % classes if classes else None

    eps = eps_of(model, precision)
    x_T = rng.normal(rng.key(config.seed, "grid"), index, 0, (3, size, size))
    result = sample(
        lambda x_t, t: eps(x_t, t, labels),
        ddim(schedule, num_steps(config)),
        x_T,
        noise=lambda t: torch.zeros_like(x_T),
        callback=lambda _: _poll(stop_requested),
    )
    return tile(to_images(result.x_0))
