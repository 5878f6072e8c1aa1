"""A grid of samples during training, from the same noise each time, so that grids can be compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ddpm.config.schema import Config
from ddpm.diffusion import rng
from ddpm.diffusion import schedule as schedules
from ddpm.diffusion.samplers import ddim, sample, to_images
from ddpm.diffusion.schedule import Schedule
from ddpm.errors import Stopped, lacks_gpu_memory
from ddpm.run.images import tile
from ddpm.run.stopping import StopRequested
from ddpm.sampling.denoiser import eps_of
from ddpm.training import fitting
from ddpm.training.chronicle import Chronicle
from ddpm.training.state import TrainingState

GRID_STEPS = 50


def num_steps(config: Config) -> int:
    return min(GRID_STEPS, config.diffusion.timesteps)


def draw_and_publish(state: TrainingState, chronicle: Chronicle, stop_requested: StopRequested) -> str:
    """Draw `log.grid_images` samples with the weights of `sample.weights` on rank 0, and publish them.

    Called on all ranks, which agree at each step of the sampler on whether to go on: a stop may be requested of any
    rank, and none waits for another for as long as a grid takes. Returns the reason of a stop that left it undrawn, or
    "". A grid that does not fit beside the steps is left out; the next one is tried all the same.
    """
    config, world, step = state.config, state.world, state.at.step
    if world.broadcast(chronicle.has_grid(step, state.at.attempt)):
        chronicle.grid_again(step)
        return ""
    model = state.model if config.sample.weights == "model" else state.ema.model
    model.eval()

    polls, drawn, lacked = 0, None, ""

    def poll() -> str | None:
        nonlocal polls
        polls += 1
        return world.agreed_stop(stop_requested) or None

    try:
        if world.is_main:
            try:
                drawn = draw(config, model, schedules.build(config.diffusion), state.amp, poll)
            except RuntimeError as e:
                if not lacks_gpu_memory(e):
                    raise
                lacked = str(e).partition("\n")[0]
        if lacked:
            chronicle.say("no grid: it does not fit beside the steps", step=step, error=lacked)
            fitting.free(world.device)
        while polls < num_steps(config):  # the other ranks have to agree as often as rank 0
            _go_on(poll)
        if drawn is not None:
            chronicle.grid(step, drawn)
    except Stopped as e:
        chronicle.say("grid not drawn: a stop was requested", step=step)
        return e.reason
    finally:
        state.model.train()
    return ""


def _go_on(stop_requested: StopRequested) -> None:
    if reason := stop_requested():
        raise Stopped(reason)


def draw(
    config: Config, model: nn.Module, schedule: Schedule, precision: str, stop_requested: StopRequested
) -> np.ndarray:
    """`log.grid_images` samples by DDIM, classes in turn, tiled to uint8 (H, W, 3). Raises Stopped."""
    device = next(model.parameters()).device
    classes, size = config.model.num_classes, config.data.image_size
    index = torch.arange(config.log.grid_images, device=device)
    labels = index % classes if classes else None

    eps = eps_of(model, precision)
    x_T = rng.normal(rng.key(config.seed, "grid"), index, 0, (config.network.in_channels, size, size))
    result = sample(
        lambda x_t, t: eps(x_t, t, labels),
        ddim(schedule, num_steps(config)),
        x_T,
        noise=lambda t: torch.zeros_like(x_T),
        callback=lambda _: _go_on(stop_requested),
    )
    return tile(to_images(result.x_0))
