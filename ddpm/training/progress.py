"""Where a run is: the small state that a checkpoint holds beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ddpm.training.ranks import World


@dataclass
class Window:
    """Sums since the last log line, on the device; saved with a checkpoint so that a restart changes no line.

    The tensors stay where they are from line to line, since a recorded step adds to them.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    steps: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> Window:
        return cls(torch.zeros((), device=device), torch.zeros((), device=device))

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Add a step's loss, and the norm of its gradient if that is finite; the host counts the steps."""
        self.loss += loss
        self.grad_norm += grad_norm.masked_fill(~torch.isfinite(grad_norm), 0)

    def begin(self) -> None:
        """Start the next line's."""
        self.loss.zero_()
        self.grad_norm.zero_()
        self.steps = 0

    def state_dict(self, world: World) -> dict[str, Any]:
        """The sums, with every rank's sum of losses, (world_size,), as each has its own images. Called on all ranks."""
        return {"loss": world.gather(self.loss), "grad_norm": self.grad_norm, "steps": self.steps}

    @classmethod
    def restored(cls, state: dict[str, Any], world: World) -> Window:
        """The window of a checkpoint; at another world size each rank gets the mean of the ranks' sums."""
        own = state["loss"][world.rank] if len(state["loss"]) == world.world_size else state["loss"].mean()
        loss, grad_norm = (value.to(world.device, copy=True) for value in (own, state["grad_norm"]))
        return cls(loss, grad_norm, state["steps"])


@dataclass
class Progress:
    """Where a run is, as in a checkpoint's `step` and `extra`."""

    step: int = 0
    attempt: int = 0
    rollbacks: int = 0
    early_stop_losses: list[float] = field(default_factory=list)
    """The last logged losses, oldest first, as many as early stopping looks at."""
