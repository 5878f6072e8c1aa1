"""Histograms of the gradients, for TensorBoard: where they are asked for, since each takes a pass through the network.

Nothing of the training depends on them: the gradients are those of images that the next step will see, and go nowhere.
"""

from __future__ import annotations

import numpy as np
import torch

from ddpm.config.train import divisors
from ddpm.errors import lacks_gpu_memory
from ddpm.training import fitting
from ddpm.training.chronicle import Chronicle
from ddpm.training.step import Step

MOST_VALUES = 100_000
"""Values that are shown of a part of the network; of a larger part, so many evenly spaced ones."""


def show(step: Step, chronicle: Chronicle) -> None:
    """Show them at the step just taken; where not one image fits beside the steps, say so instead."""
    found = of_gradients(step)
    if not found:
        chronicle.say("no histograms: not one image fits beside the steps", step=step.state.at.step)
    chronicle.histograms(step.state.at.step, found)


def of_gradients(step: Step) -> dict[str, np.ndarray]:
    """The finite values by part of the network, from a micro-batch of this rank's next step, or from fewer images where
    it does not fit beside the recorded steps; {} if not one image does."""
    for num in divisors(step.micro)[::-1]:
        try:
            return _of_gradients(step, num)
        except RuntimeError as e:
            if not lacks_gpu_memory(e):
                raise
        fitting.free(step.world.device)
    return {}


def _of_gradients(step: Step, num: int) -> dict[str, np.ndarray]:
    found = {}
    with step.gradients_alone(num):
        scale = step.state.scaler.get_scale()
        for name, part in step.state.model.named_children():
            of_part = [p.grad.flatten() for p in part.parameters() if p.grad is not None]
            if of_part:
                flat = torch.cat(of_part)
                values = flat[:: -(-flat.numel() // MOST_VALUES)].float() / scale
                found[name] = values[torch.isfinite(values)].cpu().numpy()
    return found
