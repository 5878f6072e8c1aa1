"""Classifier-free guidance (Ho & Salimans 2022, "Classifier-free diffusion guidance", equation 6).

Owns: how a network with and without labels becomes one eps(x_t, t) that a sampler takes. Must not know: samplers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Guided:
    """eps(x_t, t) = (1 + weight) eps(x_t, t, labels) - weight eps(x_t, t, no label), like x_t.

    One call of the network on twice the rows computes both: first all rows with their labels, then all without.
    Samplers count it as two evaluations for each sample (`nfe_per_call`).
    """

    network: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x_t (2B, C, H, W), t int64 (2B,), labels int64 (2B,)) -> eps (2B, C, H, W), any floating type."""
    labels: Tensor
    """int64 (B,)"""
    null_label: int
    """The label that means "no label"; the network must have been trained with some of its labels dropped."""
    weight: float
    """0: the network with labels alone; the larger, the further away from its prediction without labels."""
    nfe_per_call: ClassVar[int] = 2

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        eps = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).to(x_t.dtype)
        with_label, without = eps.chunk(2)
        return (1.0 + self.weight) * with_label - self.weight * without
