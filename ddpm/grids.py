"""A grid of samples from a network in training: the same noise each time, so that grids can be compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ddpm import rng, runtime
from ddpm.config import Config
from ddpm.errors import Stopped
from ddpm.samplers import SAMPLERS
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


@torch.no_grad()
def draw(
    config: Config, model: nn.Module, schedule: Schedule, precision: str, stop_requested: Callable[[], str | None]
) -> np.ndarray:
    """`log.grid_images` samples by DDIM, classes in turn, tiled to uint8 (H, W, 3). Raises Stopped."""
    device = next(model.parameters()).device
    classes, size = config.model.num_classes, config.data.image_size
    index = torch.arange(config.log.grid_images, device=device)
    labels = index % classes if classes else None

    def eps_model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with runtime.autocast(precision, device):
            return model(x_t, t, labels).float()

    x_T = rng.normal(rng.key(config.seed, "grid"), index, 0, (3, size, size))
    result = SAMPLERS["ddim"](
        eps_model,
        schedule,
        x_T,
        noise=lambda t: torch.zeros_like(x_T),
        steps=num_steps(config),
        callback=lambda _: _poll(stop_requested),
    )
    x = ((result.x_0 + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return tile(x.permute(0, 2, 3, 1).cpu().numpy())
