"""A network as samplers take it, with all that its samples follow from but the request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.config.schema import Config
from ddpm.diffusion import schedule as schedules
from ddpm.diffusion.schedule import Schedule
from ddpm.network.device import autocast

LabelledEpsModel = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(x_t (B, C, H, W), t int64 (B,), labels int64 (B,) or None) -> eps (B, C, H, W) float32. Label num_classes stands for
none, which guidance asks for."""


@dataclass(frozen=True, eq=False)
class Denoiser:
    """What a shard is made with. Guidance wants one that takes the label num_classes for none."""

    eps: LabelledEpsModel
    """On `device`."""
    schedule: Schedule
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    variance: str
    """The ancestral sampler's; a request's own comes first."""
    num_classes: int
    """0 for a model without."""
    device: torch.device

    @classmethod
    def of(cls, config: Config, network: torch.nn.Module, precision: str) -> Denoiser:
        """The config's network where it lies, evaluated in fp32, bf16 or fp16."""
        size = config.data.image_size
        return cls(
            eps=eps_of(network, precision),
            schedule=schedules.build(config.diffusion),
            image_shape=(3, size, size),
            variance=config.diffusion.variance,
            num_classes=config.model.num_classes,
            device=next(network.parameters()).device,
        )


def eps_of(network: torch.nn.Module, precision: str) -> LabelledEpsModel:
    """The network's evaluation, without gradients."""

    def eps(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad(), autocast(precision, x_t.device):
            return network(x_t, t, labels).float()

    return eps
