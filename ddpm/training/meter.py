"""The figures of a line of metrics: means since the last line, and the speed of this life."""

from __future__ import annotations

import time
from typing import Any

import torch

from ddpm.training.optimizer import learning_rate
from ddpm.training.state import TrainingState


class Meter:
    """num_images: of the dataset, by which epochs are counted. utilization: MFU of a GPU at one image a second, if
    known."""

    def __init__(self, num_images: int, utilization: float | None) -> None:
        self._num_images, self._utilization = num_images, utilization
        self._began, self._first = time.monotonic(), 0

    def restart(self, step: int) -> None:
        """Measure the speed from this step on."""
        self._began, self._first = time.monotonic(), step

    def read(self, state: TrainingState) -> dict[str, Any]:
        """The window's means over all ranks and the other figures, as one metrics record; starts the next window.
        Called on all ranks."""
        config, world, window = state.config, state.world, state.window
        sums = world.mean(torch.stack([window.loss, window.grad_norm])) / max(1, window.steps)
        loss, grad_norm = sums.tolist()
        seconds = time.monotonic() - self._began
        step, batch, gpu = state.at.step, config.train.global_batch, world.device.type == "cuda"
        speed = (step - self._first) * batch / max(seconds, 1e-9)
        record = {
            "step": step,
            "images": step * batch,
            "epoch": step * batch / self._num_images,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate(config, step - 1),
            "images_per_s": speed,
            "gpu_memory_gib": torch.cuda.max_memory_allocated(world.device) / 2**30 if gpu else None,
        }
        if self._utilization is not None:
            record["mfu"] = speed / world.world_size * self._utilization
        if state.scaler.is_enabled():
            record["skipped_steps"] = int(state.skipped)
        window.begin()
        state.at.early_stop_losses = [*state.at.early_stop_losses, loss][-config.train.early_stop_window :]
        self.restart(step)
        return record
