"""The layers between convolutions by the kernels of norm_kernels.py and kernels.py, with their gradients.

Owns: how these kernels are differentiated, and on what they can be used. Must not know: blocks, networks, steps. The
mathematics is that of torch's layers; what differs is where float32 is rounded to the type of the activations.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddpm.diffusion import rng
from ddpm.network import attention
from ddpm.network.dropout import Dropout

_WORD = 8
"""Channels of 16 bits that a GPU reads at a time: 16 bytes."""


@functools.cache
def work_on(device: torch.device) -> bool:
    """Whether the kernels work on this device: on a GPU they are tried once, and a warning says why they do not."""
    if device.type != "cuda":
        return False
    try:
        with torch.cuda.device(device):  # the next call asks about the current device
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        check(device, dtype)
        attention.check(device, dtype)
        return True
    except Exception as e:  # from Triton, which may be missing, from the compiler that it calls, or from a driver
        warnings.warn(f"layers on {device} take torch's kernels: {type(e).__name__}: {e}", stacklevel=2)
    return False


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
        h, again = norm_act(narrow, norm, silu=True, shift=shift, dropout=dropout, places=places)
        h, again = double(h), double(again)
        ours = add(concat(h, again), concat(again, h), bias)
        h = dropout(nn.functional.silu(norm(narrow.float() + shift[:, :, None, None])), places)
        h = nn.functional.interpolate(h + narrow, scale_factor=2.0)
        theirs = torch.cat([h, h], 1) + bias[:, None, None]
        of = [x, shift, bias, *norm.parameters()]
        found = [[y, *torch.autograd.grad((y.float() * given).sum(), of)] for y in (ours, theirs)]
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() <= 0.02 * other.norm(), f"{tuple(one.shape)}: other values than torch's"


def serve(model: nn.Module, device: torch.device) -> bool:
    """Whether these kernels work on the device, and can compute all layers of `model` for which they are meant."""
    if not all(getattr(m, "has_kernels", True) for m in model.modules()) or not work_on(device):
        return False
    from ddpm.network.norm_kernels import Division

    try:
        for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
            Division.of(norm.num_channels, 1, norm.num_groups)
    except ValueError:
        return False
    return True


def choose(model: nn.Module, own: bool) -> None:
    """Choose what computes the layers of `model` for which these kernels are meant: they (`own`), or torch."""
    for module in model.modules():
        if hasattr(module, "own_kernels"):
            cast(Any, module).own_kernels = own


def norm_act(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool, shift: Tensor | None = None, dropout: Dropout | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dropout(silu(norm(x + shift))), x). What else is to be done with x is done with the x that is returned: then one
    kernel adds up both gradients of it.

    x: (B, C, H, W), channels last; shift: (B, C). The results have x's shape and type. places: as in Dropout.forward.
    """
    masks = None
    if dropout is not None and dropout.training and dropout.probability and places is not None:
        masks = (places, dropout.layer, dropout.probability)
    y, x = _Norm.apply(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, masks)
    return y if dropout is None or masks is not None else dropout(y), x


def add(a: Tensor, b: Tensor | None, bias: Tensor, bias_2: Tensor | None = None) -> Tensor:
    """a + b + bias + bias_2, where b and bias_2 may be None. a, b: (B, C, H, W), channels last; biases: (C,)."""
    found: Tensor = _Add.apply(a, b, bias, bias_2)
    return found


def concat(a: Tensor, b: Tensor) -> Tensor:
    """torch.cat([a, b], 1) of (B, C, H, W) and (B, C', H, W), channels last."""
    found: Tensor = _Concat.apply(a, b)
    return found


def double(a: Tensor) -> Tensor:
    """(B, C, H, W), channels last -> (B, C, 2H, 2W), by nearest neighbours."""
    found: Tensor = _Double.apply(a)
    return found


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution, as a product of matrices; the bias's gradient is summed by a kernel.

    x: (B, C, H, W), channels last; weight: (C', C, 1, 1); bias: (C',). Returns (B, C', H, W).
    """
    added = None if bias is None else (bias[0] if bias.ndim == 2 else bias).detach().to(weight.dtype)
    y = nn.functional.linear(x.permute(0, 2, 3, 1), weight.flatten(1), added).permute(0, 3, 1, 2)
    if bias is None:
        return y
    found: Tensor = _Biased.apply(y, bias)
    return found


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(x), its bias added by a kernel of ours. x: (B, C, H, W).

    Channels that do not fill a word, as the three of a picture, are filled up with zeros: matrix units read words.
    """
    assert layer.bias is not None
    weight, few = layer.weight, layer.in_channels
    if missing := -few % _WORD:
        weight = nn.functional.pad(weight, (0, 0, 0, 0, 0, missing))
        shape = (x.shape[0], few + missing, *x.shape[2:])
        wide = torch.empty(shape, dtype=weight.dtype, device=x.device, memory_format=torch.channels_last).zero_()
        wide[:, :few] = x
        x = wide
    return add(nn.functional.conv2d(x, weight, None, layer.stride, layer.padding), None, layer.bias)


def conv_to_few(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(x) for a layer whose output channels do not fill a word: it is computed with a word of them, of which the
    rest is dropped. x: (B, C, H, W)."""
    assert layer.bias is not None
    few = layer.out_channels
    weight = nn.functional.pad(layer.weight, (0, 0, 0, 0, 0, 0, 0, -few % _WORD))
    y = nn.functional.conv2d(x, weight, None, layer.stride, layer.padding)
    return y[:, :few] + layer.bias.to(y.dtype)[:, None, None]


def _masks(x: Tensor, masks: Any) -> Any:
    if masks is None:
        return None
    from ddpm.network.norm_kernels import Masks

    places, layer, probability = masks
    first, bound = rng.mask_counters(layer, x.shape[1:].numel(), probability)
    return Masks(places, first, bound, 1.0 / rng.keep_share(probability))


def _rows(x: Tensor) -> Tensor:
    """Channels last, as the kernels walk through memory."""
    return x.contiguous(memory_format=torch.channels_last)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
        masks: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from ddpm.network import norm_kernels

        x = _rows(x)
        y, means, rstds = norm_kernels.norm(x, shift, weight, bias, groups, eps, silu, _masks(x, masks))
        ctx.save_for_backward(x, shift, weight, bias, means, rstds)
        ctx.groups, ctx.silu, ctx.masks = groups, silu, masks
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, more: Tensor | None) -> tuple[Tensor | None, ...]:
        from ddpm.network import norm_kernels

        if dy is None:
            return more, *[None] * 7
        x, shift, weight, bias, means, rstds = ctx.saved_tensors
        more = None if more is None else _rows(more)
        dx, of_weight, of_bias, of_shift = norm_kernels.norm_backward(
            _rows(dy), more, x, shift, weight, bias, means, rstds, ctx.groups, ctx.silu, _masks(x, ctx.masks)
        )
        return dx, of_shift, _summed(of_weight, weight), _summed(of_bias, bias), None, None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, bias: Tensor, bias_2: Tensor | None) -> Tensor:
        from ddpm.network import kernels

        ctx.save_for_backward(bias, bias_2)
        ctx.both = b is not None
        return kernels.add(_rows(a), None if b is None else _rows(b), bias, bias_2)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        from ddpm.network import kernels

        d, (bias, bias_2) = _rows(d), ctx.saved_tensors
        of_samples = kernels.sum_positions(d)
        of_2 = None if bias_2 is None else _summed(of_samples, bias_2)
        return d, d if ctx.both else None, _summed(of_samples, bias), of_2


def _summed(of_samples: Tensor, parameter: Tensor) -> Tensor:
    """A parameter's gradient from those of the samples, (B, C). To a parameter that prepared.py has expanded to a row
    for each sample they go as they are."""
    return of_samples if parameter.ndim == 2 else of_samples.sum(0).to(parameter.dtype)


class _Biased(torch.autograd.Function):
    """Returns `a`, to which the bias was added already; only the bias's gradient is computed here."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        from ddpm.network import kernels

        d, (bias,) = _rows(d), ctx.saved_tensors
        return d, _summed(kernels.sum_positions(d), bias)


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
