"""A network's parameters prepared together for a training step, and what becomes of their gradients.

Owns: which parameters are cast together, to the bits to which autocast would cast them one by one; and which have
gradients that fused.py's kernels give sample by sample, to be summed together. Must not know: the layers' mathematics,
steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Prepared:
    """The model's forward pass with its parameters prepared: called as the model is. precision: bf16 | fp16 | off."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._model, self._parameters = model, dict(model.named_parameters())
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self._by_sample = by_sample(model)
        self._cast = [f"{name}.{of}" for name, m in model.named_modules()
                      if isinstance(m, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) and self._dtype is not None
                      for of, _ in m.named_parameters(recurse=False)]  # fmt: skip
        self._narrow: dict[nn.Parameter, Tensor] | None = None

    def __call__(self, x: Tensor, *others: Any) -> Any:
        together = self._by_sample if getattr(self._model, "own_kernels", False) else []
        apart = set(together)
        names = [name for name in self._cast if name not in apart]
        given: dict[str, Tensor] = {}
        if names:
            wide = [self._parameters[name] for name in names]
            given.update(zip(names, _Cast.apply(self._dtype, self._narrow, *wide), strict=True))
        if together:
            rows = _BySample.apply(x.shape[0], *(self._parameters[name] for name in together))
            given.update(zip(together, rows, strict=True))
        return torch.func.functional_call(self._model, given, (x, *others))

    @contextmanager
    def narrow_gradients(self) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Within: a backward pass leaves the gradients of cast parameters in the yielded dict, in the 16 bits in which
        they were computed, and not in the parameters' own .grad."""
        self._narrow = {}
        try:
            yield self._narrow
        finally:
            self._narrow = None


def by_sample(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients these layers give sample by sample."""
    there = {name for name, _ in model.named_parameters()}
    found = []
    for name, module in model.named_modules():
        of_it = ("weight", "bias") if isinstance(module, nn.GroupNorm) else getattr(module, "by_sample", ())
        found += [f"{name}.{of}" if name else of for of in of_it]
    return [name for name in found if name in there]


class _BySample(torch.autograd.Function):
    """Parameters (C,) -> (B, C) each, whose rows are all the same memory."""

    @staticmethod
    def forward(ctx: Any, num: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.detach().expand(num, -1) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sums = torch.cat(gradients, 1).sum(0)
        return None, *sums.split([g.shape[1] for g in gradients])


class _Cast(torch.autograd.Function):
    """Parameters -> the same in `dtype`. narrow: receives their gradients by parameter; None: the parameters do."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, narrow: dict[nn.Parameter, Tensor] | None, *weights: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.narrow, ctx.weights = narrow, weights if narrow is not None else ()
        return tuple(_cast(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.narrow is None:
            return None, None, *_cast(gradients, torch.float32)
        ctx.narrow.update(zip(ctx.weights, gradients, strict=True))
        return None, None, *[None] * len(gradients)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in `dtype`, each laid out as it is. They are copied as flat rows, which torch does together whatever
    their shapes are."""
    dense = [t if t.is_contiguous() or _is_channels_last(t) else t.contiguous() for t in tensors]
    out = [torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device) for t in dense]
    torch._foreach_copy_(_flat(out), _flat(dense))
    return out


def _is_channels_last(t: Tensor) -> bool:
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]
