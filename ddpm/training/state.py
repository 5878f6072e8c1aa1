"""The state of training that a checkpoint holds: weights, their average, the optimizer's moments, and where the run is.

A new state is that of step 0, from the seed; any other comes from `load_state_dict` or `begin_with`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm.config.schema import Config
from ddpm.network import build
from ddpm.network.ema import EMA
from ddpm.run.state import is_last, settled
from ddpm.training import optimizer
from ddpm.training.progress import Progress, Window
from ddpm.training.ranks import World


class TrainingState:
    """The state on one rank; only the window's sum of losses differs between ranks. amp: bf16 | fp16 | off."""

    def __init__(self, config: Config, world: World, amp: str) -> None:
        self.config, self.world, self.amp = config, world, amp
        self.model = build.build_model(config, world.device, amp)
        self.ema = EMA(
            self.model,
            config.train.ema_decay,
            start_step=config.train.ema_start_step,
            every_steps=config.train.ema_every_steps,
            warmup=config.train.ema_warmup,
        )
        self.optimizer = optimizer.build(config, self.model.parameters())
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=amp == "fp16")
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        """Updates that were skipped because fp16 gradients overflowed, int64 ()."""
        self.window = Window.empty(world.device)
        self.at = Progress()

    def start_over(self) -> None:
        """Go back to the state of step 0; called on all ranks."""
        self.load_state_dict(TrainingState(self.config, self.world, self.amp).state_dict())

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """At step 0: take these weights, for the average too, instead of those from the seed."""
        self.model.load_state_dict(weights)
        self.ema.load_state_dict(weights)

    def begin_as_rank_0(self) -> None:
        """At step 0: take rank 0's weights, since a CPU of another kind may draw others by the last bit, and ranks only
        ever exchange gradients. Called on all ranks."""
        if self.world.world_size > 1:
            weights = self.model.state_dict()
            flat = self.world.of_rank_0(torch.cat([w.flatten() for w in weights.values()]))
            parts = flat.split([w.numel() for w in weights.values()])
            self.begin_with({name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)})

    @property
    def settled(self) -> float | None:
        """The mean change of the last logged losses if training ends early by it, else None; the same on all ranks.

        Only decided right after a line is logged: a run that was saved between two lines goes on to the next one.
        """
        return None if self.window.steps else settled(self.at.early_stop_losses, self.config)

    @property
    def is_last(self) -> bool:
        """Whether training ends here."""
        return is_last(self.at.step, self.settled, self.config)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: plain tensors and numbers, loadable with weights_only=True.

        Called on all ranks.
        """
        moments = self.optimizer.state_dict()
        for group in moments["param_groups"]:  # on a GPU lr is a tensor on the device
            group["lr"] = optimizer.learning_rate(self.config, self.at.step - 1) if self.at.step else group["lr"]
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": moments,
            "scaler": self.scaler.state_dict(),
            "step": self.at.step,
            "images": self.at.step * self.config.train.global_batch,
            "config_digest": self.config.digest(),
            "extra": {
                "attempt": self.at.attempt,
                "rollbacks": self.at.rollbacks,
                "skipped_steps": int(self.skipped),
                "early_stop_losses": self.at.early_stop_losses,
                "early_stopped": self.settled,
                "window": self.window.state_dict(self.world),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` returned, under the same config digest, on any number of ranks: a copy of it, as it
        may lie in a file."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():  # the fused kernels walk memory: moments must lie as their weights do
                if isinstance(value, Tensor):  # some optimizers count in Python's numbers
                    like = parameter if value.shape == parameter.shape else value
                    moments[key] = torch.empty_like(like).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        extra = state["extra"]
        self.skipped.fill_(extra["skipped_steps"])
        self.window = Window.restored(extra["window"], self.world)
        self.at = Progress(state["step"], extra["attempt"], extra["rollbacks"], extra.get("early_stop_losses", []))
