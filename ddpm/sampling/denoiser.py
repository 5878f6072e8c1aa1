"""A network in the form that samplers call, with all that samples depend on except the request."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.config.schema import Config
from ddpm.diffusion import schedule as schedules
from ddpm.diffusion.schedule import Schedule
from ddpm.network import fused
from ddpm.network.device import autocast, recorded
from ddpm.network.unet import UNet

LabelledEpsModel = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(x_t (B, C, H, W), t int64 (B,), labels int64 (B,) or None) -> eps (B, C, H, W) float32. Label num_classes means "no
label", which guidance needs."""


@dataclass(frozen=True, eq=False)
class Denoiser:
    """What a shard is computed with. For guidance its `eps` must accept the label num_classes as "no label"."""

    eps: LabelledEpsModel
    """Evaluates the network, on `device`."""
    schedule: Schedule
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    variance: str
    """Variance of the ancestral sampler, unless the request has one."""
    num_classes: int
    """0 for a model without classes."""
    device: torch.device

    @classmethod
    def of(cls, config: Config, network: UNet, precision: str) -> Denoiser:
        """A denoiser of the config's network on its present device. precision: fp32 | bf16 | fp16. On a GPU it uses
        fused.py's kernels where they can, and replays evaluations."""
        size = config.data.image_size
        device = next(network.parameters()).device
        fused.choose(network, fused.serve(network, device))
        eps = eps_of(network, precision)
        return cls(
            eps=Replays(eps) if device.type == "cuda" else eps,
            schedule=schedules.build(config.diffusion),
            image_shape=(config.network.in_channels, size, size),
            variance=config.diffusion.variance,
            num_classes=config.model.num_classes,
            device=device,
        )


def eps_of(network: torch.nn.Module, precision: str) -> LabelledEpsModel:
    """The network as a function without gradients. precision: bf16 | fp16: autocast to it; anything else: none."""

    def eps(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad(), autocast(precision, x_t.device):
            return network(x_t, t, labels).float()

    return eps


@functools.cache
def _stream_of(device: torch.device, thread: int) -> torch.cuda.Stream:
    """The stream on which a thread's evaluations are recorded. No two threads have one, since with a graph torch drops
    what matrix products on its stream work in, of other graphs too (https://github.com/pytorch/pytorch/issues/193402).
    """
    return torch.cuda.Stream(device)


class Replays:
    """`eps` on a GPU: from the third call with the same shapes on, its kernels are launched together, as a CUDA graph.

    The network's tensors must stay where they are in memory; changes of their values are seen.
    """

    def __init__(self, eps: LabelledEpsModel) -> None:
        self._eps = eps
        self._seen: Counter[Any] = Counter()
        self._recorded: dict[Any, Callable[..., Tensor] | None] = {}

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        given = (x_t, t) if labels is None else (x_t, t, labels)
        kind = (len(given), x_t.shape, x_t.dtype)
        self._seen[kind] += 1
        if self._seen[kind] == 3:
            self._recorded[kind] = self._record(given)
        replay = self._recorded.get(kind)
        return replay(*given) if replay else self._eps(x_t, t, labels)

    def _record(self, given: tuple[Tensor, ...]) -> Callable[..., Tensor] | None:
        """Record an evaluation of these shapes, to be replayed; None, with a warning, if that fails."""
        graph, device = torch.cuda.CUDAGraph(), given[0].device
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():  # graphs are of the current GPU
            static = [tensor.clone() for tensor in given]
            try:
                with recorded(graph, stream=_stream_of(device, threading.get_ident())):
                    out = self._eps(static[0], static[1], static[2] if len(static) > 2 else None)
            except RuntimeError as e:  # it does not fit in memory twice, or may not be recorded
                why = f"{type(e).__name__}: {e}".partition("\n")[0]
                warnings.warn(f"evaluations are not replayed: {why}", stacklevel=4)
                return None

        def replay(*arguments: Tensor) -> Tensor:
            for its, argument in zip(static, arguments, strict=True):
                its.copy_(argument)
            with torch.cuda.device(device):
                graph.replay()
            return out.clone()

        return replay
