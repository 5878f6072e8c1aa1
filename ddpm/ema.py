"""The exponential moving average of a model's weights (Ho et al. 2020, appendix B: decay 0.9999).

Owns: the averaged copy. Must not know: steps, optimizers, wrappers of the model (pass it unwrapped), files.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """`model`: a float32 copy of the given model, in eval mode and without gradients, that `update` moves.

    decay: in [0, 1), the share of the average kept at an update, else ValueError. No warm-up: the average starts at
    the weights of the model given.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * weights, in one operation; buffers are copied.

        model: the same structure as the one given at the start, float32 weights on the same device.
        """
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1.0 - self.decay)
        buffers = list(self.model.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(model.buffers()))

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors under the model's own names; not copies: the next update changes them."""
        return dict(self.model.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Every tensor of the model and no other, else RuntimeError."""
        self.model.load_state_dict(state)
