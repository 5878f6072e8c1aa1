"""What lies between convolutions and norms as one kernel each, for GPUs: sums, and copies from place to place.

Owns: how these are computed from channels-last tensors, (N, H, W, C) in memory. Must not know: layers, gradients' ways.
All is computed in float32 and rounded once; every sum has an order of its own, so the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm.diffusion.kernels import of_part, parts

_WIDTH = 64
"""Channels of a program."""
_SUMMED = 8192
"""Elements of a tile that is summed."""
_PROGRAMS = 256
"""So many keep a GPU busy."""


@triton.jit
def _add_kernel(
    out, a, b, bias, bias_2, rows, channels, B: tl.constexpr, BIAS_2: tl.constexpr, C: tl.constexpr, P: tl.constexpr
):
    """a + bias, and where they are there + b + bias_2."""
    at, valid, channel = _tile(rows, channels, channels, 0, C, P)
    v = tl.load(a + at, mask=valid, other=0).to(tl.float32)
    if B:
        v += tl.load(b + at, mask=valid, other=0).to(tl.float32)
    v += tl.load(bias + channel, mask=channel < channels, other=0).to(tl.float32)[None, :]
    if BIAS_2:
        v += tl.load(bias_2 + channel, mask=channel < channels, other=0).to(tl.float32)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _tile(rows, width, channels, first, C: tl.constexpr, P: tl.constexpr, AXIS: tl.constexpr = 0):
    """This program's P rows of C of the `width` channels from `first` on: where, whether they are there, channels.

    AXIS: of the grid, along which rows are divided.
    """
    row = tl.program_id(AXIS).to(tl.int64) * P + tl.arange(0, P)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    valid = (row < rows)[:, None] & (channel < width)[None, :]
    return row[:, None] * channels + (first + channel)[None, :], valid, channel


@triton.jit
def _sum_positions_kernel(out, a, positions, channels, C: tl.constexpr, P: tl.constexpr):
    """C channels of a sample. out: float32 (N, channels)."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * C + tl.arange(0, C)
    a += row * positions * channels
    total = tl.zeros((C,), tl.float32)
    for begin in range(0, positions, P):
        p = begin + tl.arange(0, P)
        valid = (p < positions)[:, None] & (channel < channels)[None, :]
        total += tl.sum(tl.load(a + p[:, None] * channels + channel[None, :], mask=valid, other=0).to(tl.float32), 0)
    tl.store(out + row * channels + channel, total, mask=channel < channels)


@triton.jit
def _concat_kernel(out, a, b, rows, width_a, width_b, C: tl.constexpr, P: tl.constexpr):
    """Rows of `width_a` and rows of `width_b` channels, side by side."""
    width = width_a + width_b
    to, valid, channel = _tile(rows, width, width, 0, C, P)
    of_a = valid & (channel < width_a)[None, :]
    at_a, _, _ = _tile(rows, width, width_a, 0, C, P)
    at_b, _, _ = _tile(rows, width, width_b, -width_a, C, P)
    v = tl.load(a + at_a, mask=of_a, other=0)
    tl.store(out + to, tl.where(of_a, v, tl.load(b + at_b, mask=valid & (~of_a), other=0)), mask=valid)


@triton.jit
def _split_kernel(a, b, both, rows, width_a, width_b, C: tl.constexpr, P: tl.constexpr):
    """What _concat_kernel has put side by side."""
    width = width_a + width_b
    at, valid, channel = _tile(rows, width, width, 0, C, P)
    of_a = valid & (channel < width_a)[None, :]
    to_a, _, _ = _tile(rows, width, width_a, 0, C, P)
    to_b, _, _ = _tile(rows, width, width_b, -width_a, C, P)
    v = tl.load(both + at, mask=valid, other=0)
    tl.store(a + to_a, v, mask=of_a)
    tl.store(b + to_b, v, mask=valid & (~of_a))


@triton.jit
def _double_kernel(out, a, width, channels, C: tl.constexpr, P: tl.constexpr):
    """Rows of 2 * width pixels, two from each of `width`; as many again below them."""
    row = tl.program_id(0).to(tl.int64)
    at, valid, channel = _tile(2 * width, channels, channels, 0, C, P, 2)
    pixel = tl.program_id(2) * P + tl.arange(0, P)
    source = ((row // 2) * width + pixel // 2)[:, None] * channels + channel[None, :]
    tl.store(out + row * 2 * width * channels + at, tl.load(a + source, mask=valid), mask=valid)


@triton.jit
def _halve_kernel(out, a, width, channels, C: tl.constexpr, P: tl.constexpr):
    """Rows of `width` pixels, each the sum of four: the gradient of the above."""
    row = tl.program_id(0).to(tl.int64)
    at, valid, channel = _tile(width, channels, channels, 0, C, P, 2)
    pixel = tl.program_id(2) * P + tl.arange(0, P)
    first = a + (row * 4 * width + pixel * 2)[:, None] * channels + channel[None, :]
    below = first + 2 * width * channels
    v = tl.load(first, mask=valid, other=0).to(tl.float32)
    v += tl.load(first + channels, mask=valid, other=0).to(tl.float32)
    v += tl.load(below, mask=valid, other=0).to(tl.float32)
    v += tl.load(below + channels, mask=valid, other=0).to(tl.float32)
    tl.store(out + row * width * channels + at, v.to(out.dtype.element_ty), mask=valid)


# ---------------------------------------------------------------- launching; tensors are (N, C, H, W), channels last


def add(a: Tensor, b: Tensor | None, bias: Tensor, bias_2: Tensor | None) -> Tensor:
    """a + b + bias + bias_2, where b and bias_2 may be None. Biases: (C,), or (N, C) of equal rows, C contiguous."""
    out, channels = torch.empty_like(a), a.shape[1]
    rows = a.numel() // channels
    with torch.cuda.device_of(a):
        _add_kernel[_grid(rows, channels)](
            out, a, a if b is None else b, bias, bias if bias_2 is None else bias_2, rows, channels,
            B=b is not None, BIAS_2=bias_2 is not None, **_SIZES,
        )  # fmt: skip
    return out


def sum_positions(a: Tensor) -> Tensor:
    """The sum over height and width: float32 (N, C)."""
    num, channels, height, width = a.shape
    out = a.new_empty((num, channels), dtype=torch.float32)
    C = _WIDTH
    while C > 16 and num * triton.cdiv(channels, C) < _PROGRAMS:
        C //= 2
    P = min(triton.next_power_of_2(height * width), _SUMMED // C)
    with torch.cuda.device_of(a):
        for part in parts(num):
            of, sums = of_part(a, part), of_part(out, part)
            _sum_positions_kernel[triton.cdiv(channels, C), len(of)](
                sums, of, height * width, channels, C=C, P=P, num_warps=max(1, min(8, P * C // 1024))
            )
    return out


def concat(a: Tensor, b: Tensor) -> Tensor:
    """torch.cat([a, b], 1)."""
    out = _empty(a, a.shape[1] + b.shape[1], *a.shape[2:])
    rows = out.numel() // out.shape[1]
    with torch.cuda.device_of(a):
        _concat_kernel[_grid(rows, out.shape[1])](out, a, b, rows, a.shape[1], b.shape[1], **_SIZES)
    return out


def split(both: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The two that `concat` has joined; first: channels of the first."""
    a, b = _empty(both, first, *both.shape[2:]), _empty(both, both.shape[1] - first, *both.shape[2:])
    rows = both.numel() // both.shape[1]
    with torch.cuda.device_of(both):
        _split_kernel[_grid(rows, both.shape[1])](a, b, both, rows, first, b.shape[1], **_SIZES)
    return a, b


def double(a: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W), by nearest neighbours."""
    _num, channels, height, width = a.shape
    return _resampled(_double_kernel, a, _empty(a, channels, 2 * height, 2 * width), width)


def halve(a: Tensor) -> Tensor:
    """The gradient of `double`: (N, C, 2H, 2W) -> (N, C, H, W), sums of four."""
    _num, channels, height, width = a.shape
    return _resampled(_halve_kernel, a, _empty(a, channels, height // 2, width // 2), width // 2)


def _resampled(kernel, a: Tensor, out: Tensor, narrow: int) -> Tensor:
    num, channels, height, width = out.shape
    grid = (num * height, triton.cdiv(channels, _WIDTH), triton.cdiv(width, 32))  # the first may exceed 65,535
    with torch.cuda.device_of(a):
        kernel[grid](out, a, narrow, channels, C=_WIDTH, P=32)
    return out


_SIZES = {"C": _WIDTH, "P": 64}


def _grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, _SIZES["P"]), triton.cdiv(channels, _WIDTH)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
