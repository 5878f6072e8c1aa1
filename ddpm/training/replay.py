"""Replays a training step on a GPU: its kernels are recorded once, as CUDA graphs, and then launched together.

Owns: what is recorded, what changes from step to step (the images, and the step's numbers), and how the gradients of
several ranks meet between two recordings. Must not know: the mathematics, which is the step's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm.data.batches import Parts
from ddpm.network.device import recorded
from ddpm.training.ranks import World

if TYPE_CHECKING:
    from ddpm.training.step import Step

Moved = tuple[Tensor, Tensor, Tensor]
"""Loss float32 (), the gradient's norm float32 (), whether both are finite bool ()."""
_PIECE = 4
"""A gradient begins at a multiple of so many elements of the buffer: a GPU reads 16 bytes at a time."""


class Exchange:
    """The mean of gradients over ranks, through one buffer: `gather`, then a call, then `scatter`."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], world: World) -> None:
        self._parameters, self._world = list(parameters), world
        sizes = [-(-p.numel() // _PIECE) * _PIECE for p in self._parameters]
        self._flat = torch.zeros(sum(sizes), device=world.device)
        pieces = [f[: p.numel()] for f, p in zip(self._flat.split(sizes), self._parameters, strict=True)]
        self._views = [torch.as_strided(f, p.shape, p.stride()) if p.is_contiguous(memory_format=torch.channels_last)
                       else f.view_as(p) for f, p in zip(pieces, self._parameters, strict=True)]  # fmt: skip

    def gather(self) -> None:
        """Copy gradients into the buffer."""
        torch._foreach_copy_(self._views, [p.grad for p in self._parameters if p.grad is not None])

    def __call__(self) -> None:
        """Sum the buffer over all ranks."""
        dist.all_reduce(self._flat)

    def scatter(self) -> None:
        """Make the buffer's mean the parameters' gradients."""
        self._flat /= self._world.world_size
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view


class Replay:
    """A recorded step: two graphs, before and after the exchange between ranks, or one graph for a single rank."""

    def __init__(self, step: Step, pinned: Parts) -> None:
        self._static = tuple(part.to(step.world.device) for part in pinned)
        self._exchange = step.exchange
        self._first, self._second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        groups = step.state.optimizer.param_groups
        for group in groups:
            group["capturable"] = True
        try:
            if self._exchange is None:
                with recorded(self._first):
                    self._moved = step.compute(step.unpacked(self._static))
            else:
                with recorded(self._first):
                    given = step.unpacked(self._static)
                    loss = step.gradients(given)
                with recorded(self._second, self._first.pool()):
                    self._moved = step.move(given, loss)
        finally:
            for group in groups:
                group["capturable"] = False
        step.recorded()

    @classmethod
    def of(cls, step: Step, pinned: Parts) -> Replay | None:
        """Record the step; None, with a warning, if that fails: steps then launch kernel by kernel, as the first
        did."""
        try:
            torch.cuda.empty_cache()
            return cls(step, pinned)
        except RuntimeError as e:  # not enough memory for a second copy, or an operation that cannot be recorded
            warnings.warn(f"steps are not replayed: {type(e).__name__}: {e}".partition("\n")[0], stacklevel=2)
            step.state.optimizer.zero_grad(set_to_none=True)
            scaler = step.state.scaler
            scaler.update(scaler.get_scale())  # the same, but it may unscale gradients again
            return None

    def __call__(self, pinned: Parts) -> Moved:
        for static, part in zip(self._static, pinned, strict=True):
            static.copy_(part, non_blocking=True)
        self._first.replay()
        if self._exchange is not None:
            self._exchange()
            self._second.replay()
        return self._moved
