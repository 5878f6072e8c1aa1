"""The exponential moving average of a model's weights (Ho et al. 2020, appendix B: decay 0.9999).

Owns: the averaged copy, and at which steps it moves by how much. Must not know: optimizers, wrappers of the model
(pass it unwrapped), files.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """`model`: a float32 copy of the given model, in eval mode and without gradients, that `update` moves.

    decay: in [0, 1), the share of the average kept at an update. start_step: before this step the average is a copy of
    the weights. every_steps: an update at every step that this divides, from start_step on. warmup: the n-th update
    keeps min(decay, (1 + n) / (10 + n)), so that the first weights are forgotten soon. ValueError for other values.

    All follows from the number of the step: a resumed run goes on exactly, with nothing more to save than the average.

    The average starts at the initial weights, which it then holds decay ** n of after n updates. diffusers' EMAModel
    forgets them: its first update copies the weights as they are after the first step. To average as it does by
    default: start_step=2 and warmup=True. To have it average as this does by default: EMAModel(parameters, decay,
    min_decay=decay), made before the first step, and `optimization_step = 1` set on it.
    """

    def __init__(
        self, model: nn.Module, decay: float, *, start_step: int = 0, every_steps: int = 1, warmup: bool = False
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay = {decay}: must lie in [0, 1)")
        if start_step < 0 or every_steps < 1:
            raise ValueError(f"start_step = {start_step}, every_steps = {every_steps}: at least 0 and at least 1")
        self.decay, self.warmup = decay, warmup
        self.start_step, self.every_steps = start_step, every_steps
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._of: nn.Module | None = None  # the model whose parameters are in `_given`

    def decay_at(self, step: int) -> float | None:
        """The share of the average kept at the end of step `step`, which counts from 1; None: no update there."""
        if step < self.start_step:
            return 0.0
        if step % self.every_steps:
            return None
        if not self.warmup:
            return self.decay
        num_updates = step // self.every_steps - max(self.start_step - 1, 0) // self.every_steps
        return min(self.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """average <- decay * average + (1 - decay) * weights, in one operation; buffers are copied.

        model: the same structure as the one given at the start, float32 weights on the same device, as they are after
        the `step`-th update of the optimizer (1, 2, …).
        """
        decay = self.decay_at(step)
        if decay is None:
            return
        if self._of is not model:
            self._of = model
            self._own: list[Tensor] = list(self.model.parameters())
            self._given: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(self._own, self._given, 1.0 - decay)
        buffers = list(self.model.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(model.buffers()))

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors under the model's own names; not copies: the next update changes them."""
        return dict(self.model.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Every tensor of the model and no other, else RuntimeError."""
        self.model.load_state_dict(state)
