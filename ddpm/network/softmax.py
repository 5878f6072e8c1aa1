"""A softmax and its gradient as one kernel each, for GPUs: what attention.py has between its products of matrices.

Owns: how these are computed. Must not know: attention, layers. All is computed in float32 and rounded once; every sum
has an order of its own, so the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096


@triton.jit(do_not_specialize=["rows"])
def _softmax_kernel(p, scores, rows, width, scale, C: tl.constexpr, R: tl.constexpr):
    """softmax(scale * scores) of R rows of `width` by each program. C: a power of two, at least `width`."""
    at, valid, inside = _rows_of(rows, width, C, R)
    v = tl.where(inside, tl.load(scores + at, mask=valid, other=0) * scale, float("-inf"))
    v = tl.exp(v - tl.max(v, 1)[:, None])
    v = v / tl.sum(v, 1)[:, None]
    tl.store(p + at, v.to(p.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _softmax_backward_kernel(d_scores, p, dp, rows, width, scale, C: tl.constexpr, R: tl.constexpr):
    """scale * p * (dp - the row's sum of p * dp)"""
    at, valid, _ = _rows_of(rows, width, C, R)
    v = tl.load(p + at, mask=valid, other=0).to(tl.float32)
    d = tl.load(dp + at, mask=valid, other=0)
    v = scale * v * (d - tl.sum(v * d, 1)[:, None])
    tl.store(d_scores + at, v.to(d_scores.dtype.element_ty), mask=valid)


@triton.jit
def _rows_of(rows, width, C: tl.constexpr, R: tl.constexpr):
    """This program's rows: where, whether they are there, and which columns are."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    return row[:, None] * width + column, (row < rows)[:, None] & (column < width), column < width


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale * scores) over the last dimension, in `dtype`. scores: float32 (..., width), contiguous."""
    p = torch.empty_like(scores, dtype=dtype)
    grid, rows, options = _launch(scores)
    with torch.cuda.device_of(scores):
        _softmax_kernel[grid](p, scores, *rows, scale, **options)
    return p


def softmax_backward(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, of p's type, from p and its gradient. dp: float32; both contiguous."""
    d_scores = torch.empty_like(p)
    grid, rows, options = _launch(p)
    with torch.cuda.device_of(p):
        _softmax_backward_kernel[grid](d_scores, p, dp, *rows, scale, **options)
    return d_scores


def _launch(of: Tensor) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    width = of.shape[-1]
    rows, padded = of.numel() // width, triton.next_power_of_2(width)
    each = max(1, _TILE // padded)
    return (triton.cdiv(rows, each),), (rows, width), {"C": padded, "R": each, "num_warps": 4}
