"""Self-attention by products of matrices and the kernels of softmax.py, with its gradient, for training.

Owns: how it is computed and differentiated, and for which shapes that is the faster way. Must not know: layers, blocks.
All of a head's probabilities lie in memory, in the activations' type; scores and gradients of probabilities are float32
until they are rounded once. Nothing is added in an order that varies, so the same input gives the same bits; torch's
scaled_dot_product_attention gives them at a price. Where no gradient is asked for, as in sampling, torch's is taken:
its forward pass keeps scores and probabilities on the chip, and so moves less than half the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.diffusion import rng

_WIDE = "dtype" in torch.ops.aten.bmm.overloads()
"""Whether torch multiplies matrices of 16 bits into one of 32, as it does from 2.8 on."""


def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(channels of a head)) v over the H W positions (Vaswani et al. 2017, equation 1).

    qkv: (B, 3 * width, H, W), channels last: queries, keys and values, each head by head. Returns (B, width, H, W),
    channels last, of the same type.
    """
    if qkv.requires_grad and serves(qkv.shape, heads):
        found: Tensor = Attention.apply(qkv, heads)
        return found
    return _torchs(qkv, heads)


def _torchs(qkv: Tensor, heads: int) -> Tensor:
    batch, channels, height, width = qkv.shape
    rows = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, heads, channels // (3 * heads))
    q, k, v = (part.transpose(1, 2) for part in rows.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out.reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)


def serves(shape: torch.Size, heads: int) -> bool:
    """Whether products of matrices are the faster way: where a head's probabilities are no larger than its queries.

    A rule of shapes and torch's version alone: a run has the same bits on all GPUs of a kind. cuBLAS reads whole words
    of eight channels.
    """
    _batch, channels, height, width = shape
    return _WIDE and height * width <= channels // (3 * heads) and height * width % 8 == 0


class Attention(torch.autograd.Function):
    """`attention` by products of matrices, with its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        from ddpm.network import softmax

        qkv = qkv.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = qkv.shape
        q, k, v = _by_head(qkv, heads, 3)
        ctx.heads, ctx.scale = heads, q.shape[-1] ** -0.5
        p = softmax.softmax(_wide(q, k.mT), ctx.scale, qkv.dtype)
        out = qkv.new_empty(batch, height, width, channels // 3).permute(0, 3, 1, 2)
        _products(_by_head(out, heads, 1)[0], p, v)
        ctx.save_for_backward(qkv, p)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        from ddpm.network import softmax

        qkv, p = ctx.saved_tensors
        q, k, v = _by_head(qkv, ctx.heads, 3)
        d_out = _by_head(d.contiguous(memory_format=torch.channels_last), ctx.heads, 1)[0]
        d_qkv = torch.empty_like(qkv)
        dq, dk, dv = _by_head(d_qkv, ctx.heads, 3)
        _products(dv, p.mT, d_out)
        d_scores = softmax.softmax_backward(p, _wide(d_out, v.mT), ctx.scale)
        _products(dq, d_scores, k)
        _products(dk, d_scores.mT, q)
        return d_qkv, None


def _by_head(x: Tensor, heads: int, parts: int) -> Tensor:
    """(B, parts * width, H, W), channels last -> a view of it (parts, heads, B, positions, channels of a head)."""
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).view(batch, height * width, parts, heads, channels // (parts * heads))
    return rows.permute(2, 3, 0, 1, 4)


def _products(out: Tensor, a: Tensor, b: Tensor) -> None:
    """a @ b, (heads, B, …, …), into the view `out`. Head by head, since one product takes one stride over samples and
    heads; so none of the three is copied."""
    for to, one, other in zip(out.unbind(), a.unbind(), b.unbind(), strict=True):
        torch.bmm(one, other, out=to)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (heads, B, …, …), not rounded from float32."""
    out = a.new_empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32)
    if a.dtype == out.dtype or not a.is_cuda:  # bmm has no out_dtype there
        _products(out, a.float(), b.float())
        return out
    for to, one, other in zip(out.unbind(), a.unbind(), b.unbind(), strict=True):
        torch.bmm(one, other, out_dtype=out.dtype, out=to)
    return out


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises AssertionError where attention or its gradient is not torch's, to the rounding of `dtype`."""
    if not _WIDE:
        return
    index = torch.arange(3, device=device)
    with torch.inference_mode(False), torch.enable_grad():
        qkv, given = (rng.normal(rng.key(0, name), index, 0, (c, 4, 4)) for name, c in (("qkv", 192), ("given", 64)))
        qkv = qkv.contiguous(memory_format=torch.channels_last).requires_grad_()
        found = [[y, *torch.autograd.grad((y.float() * given).sum(), qkv)]
                 for y in (Attention.apply(qkv.to(dtype), 2), _torchs(qkv, 2))]  # fmt: skip
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() <= 0.02 * other.norm(), f"attention, {tuple(one.shape)}: not torch's values"
