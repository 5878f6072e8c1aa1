"""What lies between the convolutions as one kernel each, for GPUs: normalisation with what surrounds it, sums, copies.

Owns: how these are computed from channels-last tensors, (N, H, W, C) in memory. Must not know: layers, gradients' ways.
All is computed in float32 and rounded once; every sum has an order of its own, so the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 64
_TILE: dict[str, int] = {"C": _WIDTH, "P": 128, "num_warps": 8}
_PARTS = 128
"""Of the rows of a sum over all of them."""
_ANY = ["size", "parts", "first_counter", "bound"]
"""Numbers of which no value has a kernel of its own."""


class Masks(NamedTuple):
    """Which elements dropout keeps, as of rng.keep_mask, and by what it multiplies them."""

    places: Tensor
    first_counter: int
    bound: int
    scale: float


@triton.jit
def _sample(positions, channels, C: tl.constexpr, P: tl.constexpr):
    """Places of P positions and C channels of a sample, whether they are there, channels; in a grid of _of_samples."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    p = tl.program_id(1) * P + tl.arange(0, P)
    valid = (p < positions)[:, None] & (channel < channels)[None, :]
    first = tl.program_id(2).to(tl.int64) * positions * channels
    return first + p[:, None] * channels + channel[None, :], valid, channel


@triton.jit
def _of_part(num: tl.constexpr):
    """The row of the first of `num` of this program's part of a sample."""
    return (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num


@triton.jit
def _of_sample(table, channels, channel, which: tl.constexpr):
    """Row `which` of a table (rows, N, channels), of this program's sample: (C,)."""
    at = (which * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * channels
    return tl.load(table + at + channel, mask=channel < channels, other=0)


@triton.jit
def _kept(places, channels, first_counter, bound, C: tl.constexpr, P: tl.constexpr):
    """Which elements of `_sample` dropout keeps: bool (P, C)."""
    row, rows = tl.program_id(2), tl.num_programs(2)
    index = tl.load(places + row).to(tl.uint32)
    step = tl.load(places + rows + row).to(tl.uint32)
    high = tl.load(places + 2 * rows + row).to(tl.uint32)
    key_0 = tl.load(places + 3 * rows + row).to(tl.uint32)
    key_1 = tl.load(places + 4 * rows + row).to(tl.uint32)
    p = (tl.program_id(1) * P + tl.arange(0, P)).to(tl.int64)
    first = (p * channels + tl.program_id(0) * C) // 8 + first_counter
    counter = (first[:, None] + tl.arange(0, C // 8)[None, :]).to(tl.uint32)
    zero = counter * 0
    w_0, w_1, w_2, w_3 = tl.philox_impl(counter, zero + index, zero + step, zero + high, zero + key_0, zero + key_1, 10)
    w_0, w_1 = w_0.to(tl.int32, bitcast=True), w_1.to(tl.int32, bitcast=True)
    w_2, w_3 = w_2.to(tl.int32, bitcast=True), w_3.to(tl.int32, bitcast=True)
    low = tl.join(tl.join(w_0 << 16 >> 16, w_2 << 16 >> 16), tl.join(w_1 << 16 >> 16, w_3 << 16 >> 16))
    upper = tl.join(tl.join(w_0 >> 16, w_2 >> 16), tl.join(w_1 >> 16, w_3 >> 16))
    return tl.reshape(tl.join(low, upper), (P, C)) >= bound


@triton.jit
def _groups(size, width, C: tl.constexpr):
    """C of a sample's channels, of which `width` are this program's: which are, which they are, which share a group."""
    c = tl.arange(0, C)
    inside = c < width
    same = ((c // size)[None, :] == tl.arange(0, C // 2)[:, None]) & inside[None, :]
    return c, inside, tl.program_id(0) * width + c, same


@triton.jit
def _of_groups(values, same):
    """The sum of each channel's group: float32 (C,) -> (C,)."""
    sums = tl.sum(tl.where(same, values[None, :], 0.0), 1)
    return tl.sum(tl.where(same, sums[:, None], 0.0), 0)


@triton.jit
def _moments_kernel(partial, x, positions, channels, C: tl.constexpr, P: tl.constexpr):
    """Each channel's mean at P positions of a sample, and squares about it. partial: (N, parts, 2, channels)."""
    at, valid, channel = _sample(positions, channels, C, P)
    v = tl.load(x + at, mask=valid, other=0).to(tl.float32)
    mean = tl.sum(v, 0) / tl.minimum(P, positions - tl.program_id(1) * P).to(tl.float32)
    from_it = tl.where(valid, v - mean[None, :], 0.0)
    out = partial + _of_part(2) * channels + channel
    tl.store(out, mean, mask=channel < channels)
    tl.store(out + channels, tl.sum(from_it * from_it, 0), mask=channel < channels)


@triton.jit(do_not_specialize=_ANY)
def _statistics_kernel(
    stats, partial, shift, weight, bias, eps, positions, channels, size, width, parts, in_shift, C: tl.constexpr,
    P: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Of a sample's next `width` channels, in whole groups of `size`. stats: (4, N, channels), as of `norm`."""
    row = tl.program_id(1).to(tl.int64)
    c, inside, channel, same = _groups(size, width, C)
    mean, square = c * 0.0, c * 0.0
    for i in range(parts):  # joined in Chan's way
        of_part = partial + (row * parts + i) * 2 * channels + channel
        num = tl.minimum(P, positions - i * P).to(tl.float32)
        delta = tl.load(of_part, mask=inside, other=0) - mean
        mean += delta * (num / (i * P + num))
        square += tl.load(of_part + channels, mask=inside, other=0) + delta * delta * (i * P * num / (i * P + num))
    moved = tl.load(shift + row * in_shift + channel, mask=inside, other=0).to(tl.float32) if SHIFT else c * 0.0
    mean = tl.where(inside, mean + moved, 0.0)
    of_group = _of_groups(mean, same) / size
    delta = mean - of_group
    rstd = 1.0 / tl.sqrt(_of_groups(square + delta * delta * positions, same) / (size * positions) + eps)
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32) * rstd
    b = tl.load(bias + channel, mask=inside, other=0).to(tl.float32) + (moved - of_group) * w
    out, num_rows = stats + row * channels + channel, tl.num_programs(1).to(tl.int64) * channels
    tl.store(out, w, mask=inside)
    tl.store(out + num_rows, b, mask=inside)
    tl.store(out + 2 * num_rows, of_group - moved, mask=inside)
    tl.store(out + 3 * num_rows, rstd, mask=inside)


@triton.jit(do_not_specialize=_ANY)
def _norm_kernel(
    y, x, stats, places, first_counter, bound, scale, positions, channels, C: tl.constexpr, P: tl.constexpr,
    SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """P positions of C channels of a sample."""
    at, valid, channel = _sample(positions, channels, C, P)
    w, b = _of_sample(stats, channels, channel, 0), _of_sample(stats, channels, channel, 1)
    v = tl.load(x + at, mask=valid, other=0).to(tl.float32) * w[None, :] + b[None, :]
    if SILU:
        v = v * tl.sigmoid(v)
    if DROP:
        v = tl.where(_kept(places, channels, first_counter, bound, C, P), v * scale, 0.0)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _before(
    dy, x, stats, places, first_counter, bound, scale, at, valid, channels, channel, C: tl.constexpr, P: tl.constexpr,
    SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """What was normalised, and the gradient of what weight and bias made of it."""
    v = tl.load(x + at, mask=valid, other=0).to(tl.float32)
    d = tl.load(dy + at, mask=valid, other=0).to(tl.float32)
    if SILU:
        w, b = _of_sample(stats, channels, channel, 0), _of_sample(stats, channels, channel, 1)
        u = v * w[None, :] + b[None, :]
        s = tl.sigmoid(u)
        d = d * (s * (1.0 + u * (1.0 - s)))
    if DROP:
        d = tl.where(_kept(places, channels, first_counter, bound, C, P), d * scale, 0.0)
    mean, rstd = _of_sample(stats, channels, channel, 2), _of_sample(stats, channels, channel, 3)
    return tl.where(valid, (v - mean[None, :]) * rstd[None, :], 0.0), d


@triton.jit(do_not_specialize=_ANY)
def _norm_sums_kernel(
    partial, dy, x, stats, places, first_counter, bound, scale, positions, channels, C: tl.constexpr, P: tl.constexpr,
    SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """partial: (N, parts, 3, channels), the sums over P positions of d, of d n and of n, which are as of _before."""
    at, valid, channel = _sample(positions, channels, C, P)
    n, d = _before(dy, x, stats, places, first_counter, bound, scale, at, valid, channels, channel, C, P, SILU, DROP)
    out = partial + _of_part(3) * channels + channel
    tl.store(out, tl.sum(d, 0), mask=channel < channels)
    tl.store(out + channels, tl.sum(d * n, 0), mask=channel < channels)
    tl.store(out + 2 * channels, tl.sum(n, 0), mask=channel < channels)


@triton.jit(do_not_specialize=_ANY)
def _norm_means_kernel(
    sums, means, partial, stats, weight, positions, channels, size, width, parts, C: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """sums: (3, N, channels), as of `norm_backward`; means: (2, N, channels), what _norm_dx_kernel takes away."""
    row = tl.program_id(1).to(tl.int64)
    c, inside, channel, same = _groups(size, width, C)
    sum_d, sum_dn, sum_n = c * 0.0, c * 0.0, c * 0.0
    for i in range(parts):
        of_part = partial + (row * parts + i) * 3 * channels + channel
        sum_d += tl.load(of_part, mask=inside, other=0)
        sum_dn += tl.load(of_part + channels, mask=inside, other=0)
        sum_n += tl.load(of_part + 2 * channels, mask=inside, other=0)
    num_rows = tl.num_programs(1).to(tl.int64) * channels
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    rstd = tl.load(stats + 3 * num_rows + row * channels + channel, mask=inside, other=0)
    of_d = rstd * _of_groups(w * sum_d, same) / (size * positions)
    of_dn = rstd * _of_groups(w * sum_dn, same) / (size * positions)
    out = sums + row * channels + channel
    tl.store(out, sum_d, mask=inside)
    tl.store(out + num_rows, sum_dn, mask=inside)
    if SHIFT:
        tl.store(out + 2 * num_rows, rstd * w * sum_d - positions * of_d - of_dn * sum_n, mask=inside)
    out = means + row * channels + channel
    tl.store(out, of_d, mask=inside)
    tl.store(out + num_rows, of_dn, mask=inside)


@triton.jit(do_not_specialize=_ANY)
def _norm_dx_kernel(
    dx, dy, x, stats, means, places, first_counter, bound, scale, positions, channels, C: tl.constexpr,
    P: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """P positions of C channels of a sample."""
    at, valid, channel = _sample(positions, channels, C, P)
    n, d = _before(dy, x, stats, places, first_counter, bound, scale, at, valid, channels, channel, C, P, SILU, DROP)
    w = _of_sample(stats, channels, channel, 0)
    of_d, of_dn = _of_sample(means, channels, channel, 0), _of_sample(means, channels, channel, 1)
    d = w[None, :] * d - of_d[None, :] - n * of_dn[None, :]
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def _add_kernel(out, a, b, bias, rows, channels, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """a + b + bias, or without B a + bias."""
    at, valid, channel = _tile(rows, channels, channels, 0, C, P)
    v = tl.load(a + at, mask=valid, other=0).to(tl.float32)
    if B:
        v += tl.load(b + at, mask=valid, other=0).to(tl.float32)
    v += tl.load(bias + channel, mask=channel < channels, other=0).to(tl.float32)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _tile(rows, width, channels, first, C: tl.constexpr, P: tl.constexpr):
    """This program's P rows of C of the `width` channels from `first` on: where, whether they are there, channels."""
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    valid = (row < rows)[:, None] & (channel < width)[None, :]
    return row[:, None] * channels + (first + channel)[None, :], valid, channel


@triton.jit
def _sum_rows_kernel(out, a, rows, channels, part, C: tl.constexpr, P: tl.constexpr):
    """out: float32 (parts, channels), the sum of `part` rows each."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.program_id(1).to(tl.int64) * part
    last = tl.minimum(first + part, rows)
    total = tl.zeros((C,), tl.float32)
    for begin in range(first, last, P):
        row = begin + tl.arange(0, P)
        valid = (row < last)[:, None] & (channel < channels)[None, :]
        total += tl.sum(tl.load(a + row[:, None] * channels + channel[None, :], mask=valid, other=0).to(tl.float32), 0)
    tl.store(out + tl.program_id(1) * channels + channel, total, mask=channel < channels)


@triton.jit
def _columns_kernel(out, a, rows, width, in_out, out_first, in_a, a_first, C: tl.constexpr, P: tl.constexpr):
    """`width` channels from one place in rows of in_a channels to another in rows of in_out."""
    to, valid, _ = _tile(rows, width, in_out, out_first, C, P)
    at, valid, _ = _tile(rows, width, in_a, a_first, C, P)
    tl.store(out + to, tl.load(a + at, mask=valid), mask=valid)


@triton.jit
def _double_kernel(out, a, width, channels, C: tl.constexpr, P: tl.constexpr):
    """Rows of 2 * width pixels, two from each of `width`; as many again below them."""
    row = tl.program_id(2).to(tl.int64)
    at, valid, channel = _tile(2 * width, channels, channels, 0, C, P)
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    source = ((row // 2) * width + pixel // 2)[:, None] * channels + channel[None, :]
    tl.store(out + row * 2 * width * channels + at, tl.load(a + source, mask=valid), mask=valid)


@triton.jit
def _halve_kernel(out, a, width, channels, C: tl.constexpr, P: tl.constexpr):
    """Rows of `width` pixels, each the sum of four: the gradient of the above."""
    row = tl.program_id(2).to(tl.int64)
    at, valid, channel = _tile(width, channels, channels, 0, C, P)
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    first = a + (row * 4 * width + pixel * 2)[:, None] * channels + channel[None, :]
    below = first + 2 * width * channels
    v = tl.load(first, mask=valid, other=0).to(tl.float32)
    v += tl.load(first + channels, mask=valid, other=0).to(tl.float32)
    v += tl.load(below, mask=valid, other=0).to(tl.float32)
    v += tl.load(below + channels, mask=valid, other=0).to(tl.float32)
    tl.store(out + row * width * channels + at, v.to(out.dtype.element_ty), mask=valid)


# ---------------------------------------------------------------- launching; tensors are (N, C, H, W), channels last


class Groups(NamedTuple):
    """How the channels of a normalisation are divided among programs: `width` at a time, in groups of `size`."""

    size: int
    width: int
    padded: int

    @classmethod
    def of(cls, channels: int, groups: int) -> "Groups":
        """Raises ValueError where dropout's words of eight channels would not be whole, or a group has one channel."""
        size = channels // groups
        if channels % 8 or size < 2:
            raise ValueError(f"{groups} groups of {size} channels")
        num = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * size <= _WIDTH))
        return cls(size, num * size, triton.next_power_of_2(num * size))


def norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    masks: Masks | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """SiLU of the group norm of x + shift, masked; and of each sample's channels, float32 (4, N, C), by what x is
    multiplied in it and what is added, the mean that x is taken from, the inverse of its deviation.

    shift: (N, C), the channels side by side.
    """
    num, channels, height, width = x.shape
    g, grid = Groups.of(channels, groups), _of_samples(x)
    y, stats = torch.empty_like(x), x.new_empty((4, num, channels), dtype=torch.float32)
    partial = x.new_empty((num, grid[1], 2, channels), dtype=torch.float32)
    positions, with_shift = height * width, shift is not None
    with torch.cuda.device_of(x):
        _moments_kernel[grid](partial, x, positions, channels, **_TILE)
        _statistics_kernel[(channels // g.width, num)](
            stats, partial, _or(shift, x), weight, bias, eps, positions, channels, g.size, g.width, grid[1],
            _or(shift, x).stride(0), C=g.padded, P=_TILE["P"], SHIFT=with_shift,
        )  # fmt: skip
        _norm_kernel[grid](y, x, stats, *_masks(masks, x), positions, channels, **_kinds(silu, masks))
    return y, stats


def norm_backward(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, groups: int, silu: bool, masks: Masks | None, shifted: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x; and a sample's of bias, weight and, where there is one, shift: float32 (3, N, C)."""
    num, channels, height, width = x.shape
    g, grid = Groups.of(channels, groups), _of_samples(x)
    dx, sums = torch.empty_like(x), x.new_empty((3, num, channels), dtype=torch.float32)
    partial = x.new_empty((num, grid[1], 3, channels), dtype=torch.float32)
    means, positions = torch.empty_like(sums[:2]), height * width
    with torch.cuda.device_of(x):
        given = *_masks(masks, x), positions, channels
        _norm_sums_kernel[grid](partial, dy, x, stats, *given, **_kinds(silu, masks))
        _norm_means_kernel[(channels // g.width, num)](
            sums, means, partial, stats, weight, positions, channels, g.size, g.width, grid[1], C=g.padded,
            SHIFT=shifted,
        )  # fmt: skip
        _norm_dx_kernel[grid](dx, dy, x, stats, means, *given, **_kinds(silu, masks))
    return dx, sums


def _of_samples(x: Tensor) -> tuple[int, int, int]:
    num, channels, height, width = x.shape
    return triton.cdiv(channels, _TILE["C"]), triton.cdiv(height * width, _TILE["P"]), num


def _masks(masks: Masks | None, x: Tensor) -> Masks:
    return masks or Masks(x, 0, 0, 1.0)


def _kinds(silu: bool, masks: Masks | None) -> dict[str, Any]:
    return {**_TILE, "SILU": silu, "DROP": masks is not None}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def add(a: Tensor, b: Tensor | None, bias: Tensor) -> Tensor:
    """a + b + bias, or a + bias; bias: (C,)."""
    out, channels = torch.empty_like(a), a.shape[1]
    rows = a.numel() // channels
    with torch.cuda.device_of(a):
        _add_kernel[_grid(rows, channels)](out, a, _or(b, a), bias, rows, channels, B=b is not None, **_SIZES)
    return out


def sum_rows(a: Tensor) -> Tensor:
    """Over all but the channels: float32 (C,)."""
    channels, rows = a.shape[1], a.numel() // a.shape[1]
    part = max(64, triton.cdiv(triton.cdiv(rows, _PARTS), 64) * 64)
    parts = triton.cdiv(rows, part)
    out = a.new_empty((parts, channels), dtype=torch.float32)
    with torch.cuda.device_of(a):
        _sum_rows_kernel[(triton.cdiv(channels, _WIDTH), parts)](out, a, rows, channels, part, C=_WIDTH, P=64)
    return out.sum(0)


def concat(a: Tensor, b: Tensor) -> Tensor:
    """Side by side in their channels."""
    out = _empty(a, a.shape[1] + b.shape[1], *a.shape[2:])
    _columns(out, a, a.shape[1], 0, 0)
    _columns(out, b, b.shape[1], a.shape[1], 0)
    return out


def split(both: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """What `concat` has joined; first: channels of the first one."""
    rest = both.shape[1] - first
    a, b = _empty(both, first, *both.shape[2:]), _empty(both, rest, *both.shape[2:])
    _columns(a, both, first, 0, 0)
    _columns(b, both, rest, 0, first)
    return a, b


def _columns(out: Tensor, a: Tensor, width: int, out_first: int, a_first: int) -> None:
    rows = a.numel() // a.shape[1]
    with torch.cuda.device_of(a):
        _columns_kernel[_grid(rows, width)](out, a, rows, width, out.shape[1], out_first, a.shape[1], a_first, **_SIZES)


def double(a: Tensor) -> Tensor:
    """Nearest neighbours: twice as high and wide."""
    _num, channels, height, width = a.shape
    return _resampled(_double_kernel, a, _empty(a, channels, 2 * height, 2 * width), width)


def halve(a: Tensor) -> Tensor:
    """The gradient of `double`."""
    _num, channels, height, width = a.shape
    return _resampled(_halve_kernel, a, _empty(a, channels, height // 2, width // 2), width // 2)


def _resampled(kernel, a: Tensor, out: Tensor, narrow: int) -> Tensor:
    num, channels, height, width = out.shape
    grid = (triton.cdiv(width, 32), triton.cdiv(channels, _WIDTH), num * height)
    with torch.cuda.device_of(a):
        kernel[grid](out, a, narrow, channels, C=_WIDTH, P=32)
    return out


_SIZES = {"C": _WIDTH, "P": 64}


def _grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, _SIZES["P"]), triton.cdiv(channels, _WIDTH)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
