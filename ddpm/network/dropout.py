"""Dropout whose masks are a pure function of where they are drawn: the same on any number of ranks and micro-batches.

Owns: which element of which layer is dropped (Srivastava et al. 2014, "Dropout"; kept values are scaled up). The masks
come from rng.keep_mask, behind an operator of its own, which a compiler calls as it is. Must not know: seeds, steps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.diffusion import rng


class Dropout(nn.Module):
    """(B, C, H, W) -> the same; acts in training mode alone. `layer` tells layers of one network apart."""

    def __init__(self, probability: float, layer: int = 0) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer

    def forward(self, h: Tensor, places: Tensor | None = None) -> Tensor:
        """places: of these samples in this step, from rng.places; None: masks from torch's global generator."""
        if not self.training or self.probability == 0.0:
            return h
        if places is None:
            return F.dropout(h, self.probability)
        batch, channels, height, width = h.shape
        # channels last, whatever the layout: where that is h's layout the product needs no copy
        keep_mask = _keep_mask if torch.compiler.is_compiling() else rng.keep_mask  # the operator loads a compiler
        mask = keep_mask(places, self.layer, channels * height * width, self.probability)
        mask = mask.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return h * (mask.to(h.dtype) * (1.0 / rng.keep_share(self.probability)))


@torch.library.custom_op("ddpm_hpc::keep_mask", mutates_args=())
def _keep_mask(places: Tensor, layer: int, num: int, probability: float) -> Tensor:
    return rng.keep_mask(places, layer, num, probability)


@_keep_mask.register_fake
def _(places: Tensor, layer: int, num: int, probability: float) -> Tensor:
    return places.new_empty((places.shape[1], num), dtype=torch.bool)


def number_layers(network: nn.Module) -> None:
    """Gives every Dropout of `network` its number, in the order of its modules."""
    for layer, module in enumerate(m for m in network.modules() if isinstance(m, Dropout)):
        module.layer = layer
