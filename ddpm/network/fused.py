"""The layers between convolutions by the kernels of kernels.py, with their gradients.

Owns: how these kernels are differentiated, and on what they can be used. Must not know: blocks, networks, steps. The
mathematics is that of torch's layers; what differs is where float32 is rounded to the type of the activations.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.diffusion import rng
from ddpm.network import attention
from ddpm.network.dropout import Dropout


@functools.cache
def kernels_on(device: torch.device) -> ModuleType | None:
    """kernels.py on a GPU on which it was seen to work; None elsewhere, with a warning where it builds nothing, or what
    it builds computes something else."""
    if device.type != "cuda":
        return None
    try:
        from ddpm.network import kernels

        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        check(device, dtype)
        attention.check(device, dtype)
        return kernels
    except Exception as e:  # of Triton, which may be missing, of the compiler that it calls, or of a driver
        warnings.warn(f"layers on {device} take torch's kernels: {type(e).__name__}: {e}", stacklevel=2)
    return None


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises AssertionError where these layers or their gradients are not torch's, to the rounding of `dtype`."""
    index = torch.arange(3, device=device)

    def drawn(name: str, *shape: int) -> Tensor:
        return rng.normal(rng.key(0, name), index, 0, shape)

    with torch.inference_mode(False), torch.enable_grad():
        x = _rows(drawn("x", 64, 12, 12)).requires_grad_()
        shift, bias = drawn("shift", 64).requires_grad_(), drawn("bias", 128)[0].requires_grad_()
        norm, dropout = nn.GroupNorm(8, 64, device=device), Dropout(0.25, layer=1)
        places, given = rng.places(rng.key(0, "dropout"), index, 1), drawn("given", 128, 24, 24)

        narrow = x.to(dtype)
        h = double(norm_act(narrow, norm, silu=True, shift=shift, dropout=dropout, places=places))
        ours = add(concat(h, h), concat(h, h), bias)
        h = dropout(nn.functional.silu(norm(narrow.float() + shift[:, :, None, None])), places)
        h = nn.functional.interpolate(h, scale_factor=2.0)
        theirs = 2 * torch.cat([h, h], 1) + bias[:, None, None]
        of = [x, shift, bias, *norm.parameters()]
        found = [[y, *torch.autograd.grad((y.float() * given).sum(), of)] for y in (ours, theirs)]
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() <= 0.02 * other.norm(), f"{tuple(one.shape)}: other values than torch's"


def serve(model: nn.Module, device: torch.device) -> bool:
    """Whether there are kernels for all of the model's layers that ask for some."""
    if not all(getattr(m, "has_kernels", True) for m in model.modules()) or (kernels := kernels_on(device)) is None:
        return False
    try:
        for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
            kernels.Groups.of(norm.num_channels, norm.num_groups)
    except ValueError:
        return False
    return True


def norm_act(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool, shift: Tensor | None = None, dropout: Dropout | None = None,
    places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dropout(silu(norm(x + shift))); x: (B, C, H, W), channels last; shift: (B, C). The type is x's."""
    masks = None
    if dropout is not None and dropout.training and dropout.probability:
        if places is None:
            raise ValueError("dropout draws for places")
        masks = (places, dropout.layer, dropout.probability)
    found: Tensor = _Norm.apply(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, masks)
    return found


def add(a: Tensor, b: Tensor | None, bias: Tensor) -> Tensor:
    """a + b + bias, or a + bias; (B, C, H, W), channels last, and (C,)."""
    found: Tensor = _Add.apply(a, b, bias)
    return found


def concat(a: Tensor, b: Tensor) -> Tensor:
    """torch.cat([a, b], 1)"""
    found: Tensor = _Concat.apply(a, b)
    return found


def double(a: Tensor) -> Tensor:
    """Twice as high and wide, by nearest neighbours."""
    found: Tensor = _Double.apply(a)
    return found


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution, as a product of matrices; the bias's gradient is summed by a kernel. weight: (C', C, 1, 1)."""
    added = None if bias is None else bias.detach()
    y = nn.functional.linear(x.permute(0, 2, 3, 1), weight.flatten(1), added).permute(0, 3, 1, 2)
    if bias is None:
        return y
    found: Tensor = _Biased.apply(y, bias)
    return found


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(x), its bias added by a kernel of ours."""
    assert layer.bias is not None
    return add(nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding), None, layer.bias)


def _masks(masks: Any) -> Any:
    if masks is None:
        return None
    from ddpm.network.kernels import Masks

    places, layer, probability = masks
    first, bound = rng.mask_counters(layer, probability)
    return Masks(places, first, bound, 1.0 / rng.keep_share(probability))


def _rows(x: Tensor) -> Tensor:
    """Channels last, as the kernels walk through memory."""
    return x.contiguous(memory_format=torch.channels_last)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
        masks: Any,
    ) -> Tensor:  # fmt: skip
        from ddpm.network import kernels

        x = _rows(x)
        y, means, rstds = kernels.norm(x, shift, weight, bias, groups, eps, silu, _masks(masks))
        ctx.save_for_backward(x, shift, weight, bias, means, rstds)
        ctx.groups, ctx.silu, ctx.masks = groups, silu, masks
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from ddpm.network import kernels

        x, shift, weight, bias, means, rstds = ctx.saved_tensors
        dx, sums = kernels.norm_backward(
            _rows(dy), x, shift, weight, bias, means, rstds, ctx.groups, ctx.silu, _masks(ctx.masks)
        )
        of_bias, of_weight = sums[:2].sum(1)
        of_shift = None if shift is None else sums[2].to(shift.dtype)
        return dx, of_shift, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, bias: Tensor) -> Tensor:
        from ddpm.network import kernels

        ctx.both, ctx.dtype = b is not None, bias.dtype
        return kernels.add(_rows(a), None if b is None else _rows(b), bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        from ddpm.network import kernels

        d = _rows(d)
        return d, d if ctx.both else None, kernels.sum_rows(d).to(ctx.dtype)


class _Biased(torch.autograd.Function):
    """a, to which the bias was added already: its gradient alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        from ddpm.network import kernels

        d = _rows(d)
        return d, kernels.sum_rows(d).to(ctx.dtype)


class _Concat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        from ddpm.network import kernels

        ctx.first = a.shape[1]
        return kernels.concat(_rows(a), _rows(b))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        from ddpm.network import kernels

        return kernels.split(_rows(d), ctx.first)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        from ddpm.network import kernels

        return kernels.double(_rows(a))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        from ddpm.network import kernels

        return kernels.halve(_rows(d))


def once_cast(model: nn.Module, precision: str) -> Any:
    """The model's forward pass with all that autocast would cast, weight by weight, cast at once; the same bits."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None:
        return model
    of = [(name, p) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)
          for name, p in m.named_parameters(name, recurse=False)]  # fmt: skip
    names, weights = [name for name, _ in of], [weight for _, weight in of]

    def forward(*arguments: Any) -> Any:
        narrow = dict(zip(names, _Cast.apply(dtype, *weights), strict=True))
        return torch.func.functional_call(model, narrow, arguments)

    return forward


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(_cast(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast(gradients, torch.float32)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Laid out as they are; as flat rows, which torch copies together whatever their shapes."""
    dense = [t if t.is_contiguous() or _is_channels_last(t) else t.contiguous() for t in tensors]
    out = [torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device) for t in dense]
    torch._foreach_copy_(_flat(out), _flat(dense))
    return out


def _is_channels_last(t: Tensor) -> bool:
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]
