"""Group normalisation with what surrounds it (a shift before; SiLU and dropout after), each way one kernel, for GPUs.

Owns: how these are computed from channels-last tensors, (N, H, W, C) in memory, and how the work is divided. Must not
know: layers, autograd. All is computed in float32 and rounded once; every sum has an order of its own, which follows
from the shape alone, so the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm.diffusion.kernels import of_part, parts

_SECTOR, _WIDEST = 16, 64
"""Channels of a program, where their groups allow: at least a memory's sector of them, and at most so many."""
_WHOLE, _PART, _LEAST = 16384, 4096, 512
"""Elements of a tile: at most, for one that is a program's whole work and kept between its passes; of one of many; and
at least. A warp has a thousand of them, up to sixteen warps."""
_MANY = 256
"""Programs that leave no multiprocessor of a large GPU idle."""
_ANY = ["size", "rows", "first_counter", "bound"]
"""Numbers of which no value has a kernel of its own."""


class Masks(NamedTuple):
    """Which elements dropout keeps, as of rng.keep_mask, and by what it multiplies them."""

    places: Tensor
    first_counter: int
    bound: int
    scale: float


@triton.jit
def _kept(places, rows, row, first, P: tl.constexpr, C: tl.constexpr, bound):
    """Whether elements are kept, bool (P, C); first: int64 (P,), the number of each position's first element."""
    index = tl.load(places + row).to(tl.uint32)
    step = tl.load(places + rows + row).to(tl.uint32)
    high = tl.load(places + 2 * rows + row).to(tl.uint32)
    key_0 = tl.load(places + 3 * rows + row).to(tl.uint32)
    key_1 = tl.load(places + 4 * rows + row).to(tl.uint32)
    counter = (first[:, None] + tl.arange(0, C // 8)[None, :]).to(tl.uint32)
    zero = counter * 0
    w_0, w_1, w_2, w_3 = tl.philox_impl(counter, zero + index, zero + step, zero + high, zero + key_0, zero + key_1, 10)
    w_0, w_1 = w_0.to(tl.int32, bitcast=True), w_1.to(tl.int32, bitcast=True)
    w_2, w_3 = w_2.to(tl.int32, bitcast=True), w_3.to(tl.int32, bitcast=True)
    low = tl.join(tl.join(w_0 << 16 >> 16, w_2 << 16 >> 16), tl.join(w_1 << 16 >> 16, w_3 << 16 >> 16))
    upper = tl.join(tl.join(w_0 >> 16, w_2 >> 16), tl.join(w_1 >> 16, w_3 >> 16))
    return tl.reshape(tl.join(low, upper), (P, C)) >= bound


@triton.jit
def _same_group(c, size, inside):
    """Which channels share a group, bool (C, C)."""
    return ((c // size)[:, None] == (c // size)[None, :]) & inside[None, :]


@triton.jit
def _of_groups(values, same):
    """The sum of each channel's group: float32 (C,) -> (C,)."""
    return tl.sum(tl.where(same, values[None, :], 0.0), 1)


@triton.jit
def _tile(begin, positions, channels, channel, inside, P: tl.constexpr):
    """P positions from `begin` on of a program's channels: where in a sample, and whether they are there: (P, C)."""
    p = begin + tl.arange(0, P)
    return p[:, None] * channels + channel[None, :], (p < positions)[:, None] & inside[None, :]


@triton.jit
def _keep(v, places, rows, row, begin, channels, width, first_counter, bound, scale, P: tl.constexpr, C: tl.constexpr):
    """Dropout of a tile."""
    p = (begin + tl.arange(0, P)).to(tl.int64)
    first = (p * channels + tl.program_id(0) * width) // 8 + first_counter
    return tl.where(_kept(places, rows, row, first, P, C, bound), v * scale, 0.0)


@triton.jit(do_not_specialize=_ANY)
def _norm_kernel(
    y, x, shift, weight, bias, means, rstds, places, rows, positions, first_counter, bound, scale, eps,
    channels, size, words, in_shift, C: tl.constexpr, P: tl.constexpr, WHOLE: tl.constexpr, SHIFT: tl.constexpr,
    SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """A sample's next `words` times eight channels, in groups of `size`, by one program. C: a power of two, as many or
    more.

    in_shift: from one sample's shift to the next one's.
    """
    row, width = tl.program_id(1).to(tl.int64), words * 8
    c = tl.arange(0, C)
    inside = c < width
    channel = tl.program_id(0) * width + c
    same = _same_group(c, size, inside)
    moved = tl.load(shift + row * in_shift + channel, mask=inside, other=0).to(tl.float32) if SHIFT else c * 0.0
    weight = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    bias = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    x += row * positions * channels
    y += row * positions * channels
    if WHOLE:
        at, valid = _tile(0, positions, channels, channel, inside, P)
        v = tl.load(x + at, mask=valid, other=0).to(tl.float32)
        of_group = _of_groups(tl.where(inside, tl.sum(v, 0) / positions + moved, 0.0), same) / size
        v = tl.where(valid, v + (moved - of_group)[None, :], 0.0)
        rstd = 1.0 / tl.sqrt(_of_groups(tl.sum(v * v, 0), same) / (size * positions) + eps)
        v = v * (rstd * weight)[None, :] + bias[None, :]
        if SILU:
            v = v * tl.sigmoid(v)
        if DROP:
            v = _keep(v, places, rows, row, 0, channels, width, first_counter, bound, scale, P, C)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=valid)
    else:
        mean, square = c * 0.0, c * 0.0
        for begin in range(0, positions, P):  # Chan's way to join what was seen with what comes
            at, valid = _tile(begin, positions, channels, channel, inside, P)
            v = tl.load(x + at, mask=valid, other=0).to(tl.float32)
            num = tl.minimum(P, positions - begin).to(tl.float32)
            of_tile = tl.sum(v, 0) / num
            from_it = tl.where(valid, v - of_tile[None, :], 0.0)
            delta = of_tile - mean
            mean += delta * (num / (begin + num))
            square += tl.sum(from_it * from_it, 0) + delta * delta * (begin * num / (begin + num))
        mean = tl.where(inside, mean + moved, 0.0)
        of_group = _of_groups(mean, same) / size
        delta = mean - of_group
        rstd = 1.0 / tl.sqrt(_of_groups(square + delta * delta * positions, same) / (size * positions) + eps)
        for begin in range(0, positions, P):
            at, valid = _tile(begin, positions, channels, channel, inside, P)
            v = tl.load(x + at, mask=valid, other=0).to(tl.float32) + (moved - of_group)[None, :]
            v = v * (rstd * weight)[None, :] + bias[None, :]
            if SILU:
                v = v * tl.sigmoid(v)
            if DROP:
                v = _keep(v, places, rows, row, begin, channels, width, first_counter, bound, scale, P, C)
            tl.store(y + at, v.to(y.dtype.element_ty), mask=valid)
    tl.store(means + row * channels + channel, of_group, mask=inside)
    tl.store(rstds + row * channels + channel, rstd, mask=inside)


@triton.jit
def _before(
    dy, x, at, valid, mean, rstd, weight, bias, places, rows, row, begin, channels, width, first_counter, bound, scale,
    P: tl.constexpr, C: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Of a tile: what was normalised, and the gradient of what weight and bias have made of it."""
    n = tl.load(x + at, mask=valid, other=0).to(tl.float32)
    n = tl.where(valid, (n - mean[None, :]) * rstd[None, :], 0.0)
    d = tl.load(dy + at, mask=valid, other=0).to(tl.float32)
    if DROP:
        d = _keep(d, places, rows, row, begin, channels, width, first_counter, bound, scale, P, C)
    if SILU:
        u = n * weight[None, :] + bias[None, :]
        s = tl.sigmoid(u)
        d = d * (s * (1.0 + u * (1.0 - s)))
    return n, d


@triton.jit
def _store_gradient(dx, more, at, valid, n, d, rstd, weight, of_d, of_dn, MORE: tl.constexpr):
    d = rstd[None, :] * (weight[None, :] * d - of_d[None, :] - n * of_dn[None, :])
    if MORE:
        d += tl.load(more + at, mask=valid, other=0).to(tl.float32)
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_ANY)
def _norm_backward_kernel(
    dx, of_weight, of_bias, of_shift, dy, more, x, shift, weight, bias, means, rstds, places, rows, positions,
    first_counter, bound, scale, channels, size, words, in_shift, C: tl.constexpr, P: tl.constexpr,
    WHOLE: tl.constexpr, MORE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """As above. more: with MORE what else the gradient of x is the sum of; of_…: (N, channels), of this sample."""
    row, width = tl.program_id(1).to(tl.int64), words * 8
    c = tl.arange(0, C)
    inside = c < width
    channel = tl.program_id(0) * width + c
    same = _same_group(c, size, inside)
    moved = tl.load(shift + row * in_shift + channel, mask=inside, other=0).to(tl.float32) if SHIFT else c * 0.0
    x += row * positions * channels
    dy += row * positions * channels
    dx += row * positions * channels
    more += row * positions * channels
    mean = tl.load(means + row * channels + channel, mask=inside, other=0) - moved
    rstd = tl.load(rstds + row * channels + channel, mask=inside, other=0)
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    if WHOLE:
        at, valid = _tile(0, positions, channels, channel, inside, P)
        n, d = _before(dy, x, at, valid, mean, rstd, w, b, places, rows, row, 0, channels, width, first_counter, bound,
                       scale, P, C, SILU, DROP)  # fmt: skip
        sum_d, sum_dn, sum_n = tl.sum(d, 0), tl.sum(d * n, 0), tl.sum(n, 0)
    else:
        sum_d, sum_dn, sum_n = c * 0.0, c * 0.0, c * 0.0
        for begin in range(0, positions, P):
            at, valid = _tile(begin, positions, channels, channel, inside, P)
            n, d = _before(dy, x, at, valid, mean, rstd, w, b, places, rows, row, begin, channels, width,
                           first_counter, bound, scale, P, C, SILU, DROP)  # fmt: skip
            sum_d += tl.sum(d, 0)
            sum_dn += tl.sum(d * n, 0)
            sum_n += tl.sum(n, 0)
    num = size * positions
    of_d = _of_groups(w * sum_d, same) / num
    of_dn = _of_groups(w * sum_dn, same) / num
    if WHOLE:
        _store_gradient(dx, more, at, valid, n, d, rstd, w, of_d, of_dn, MORE)
    else:
        for begin in range(0, positions, P):
            at, valid = _tile(begin, positions, channels, channel, inside, P)
            n, d = _before(dy, x, at, valid, mean, rstd, w, b, places, rows, row, begin, channels, width,
                           first_counter, bound, scale, P, C, SILU, DROP)  # fmt: skip
            _store_gradient(dx, more, at, valid, n, d, rstd, w, of_d, of_dn, MORE)
    tl.store(of_bias + row * channels + channel, sum_d, mask=inside)
    tl.store(of_weight + row * channels + channel, sum_dn, mask=inside)
    if SHIFT:
        sum_x = rstd * (w * sum_d - positions * of_d - of_dn * sum_n)
        tl.store(of_shift + row * channels + channel, sum_x.to(of_shift.dtype.element_ty), mask=inside)


class Division(NamedTuple):
    """How a normalisation is divided among programs: `width` channels each, in groups of `size`, all positions at once
    or `P` at a time."""

    size: int
    width: int
    C: int
    P: int
    whole: bool
    num_warps: int

    @classmethod
    def of(cls, channels: int, positions: int, groups: int) -> "Division":
        """The division of `channels` in `groups` groups, at `positions` pixels.

        Raises ValueError where no number of whole groups is a whole number of words of eight channels and fits a
        program, or where a group has one channel.
        """
        size = channels // groups
        widths = [n * size for n in range(1, groups + 1) if groups % n == 0 and n * size % 8 == 0]
        power = triton.next_power_of_2
        widths = [width for width in widths if width <= 4 * _WIDEST]
        if size < 2 or not widths:
            raise ValueError(f"{groups} groups of {size} channels")
        enough = min(max(_SECTOR, _LEAST // power(positions)), _WIDEST)
        width = min((width for width in widths if width >= enough), default=widths[-1])
        whole = power(positions) * power(width) <= _WHOLE
        P = power(positions) if whole else _PART // power(width)
        return cls(size, width, power(width), P, whole, min(16, max(1, P * power(width) // 1024)))


def norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    masks: Masks | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y = masks(silu(norm(x + shift))), and for the gradient the groups' means and inverse deviations.

    x: (N, C, H, W), channels last; shift: (N, C), its channels side by side; weight, bias: (C,). y is like x; means and
    inverse deviations are float32 (N, C). ValueError as `Division.of`.
    """
    y = torch.empty_like(x)
    means = x.new_empty(x.shape[:2], dtype=torch.float32)
    rstds = torch.empty_like(means)
    for part in parts(len(x)):
        at, moved = of_part(x, part), None if shift is None else of_part(shift, part)
        grid, options, drop = _launch(at, moved, groups, masks, part)
        many = options["WHOLE"] and options["P"] * options["C"] == _WHOLE and grid[0] * grid[1] >= _MANY
        if many and torch.version.hip is None:  # Triton has the second for NVIDIA's GPUs alone
            options |= {"num_warps": 8, "maxnreg": 128}  # two fit a multiprocessor: one reads meanwhile
        with torch.cuda.device_of(x):
            _norm_kernel[grid](
                of_part(y, part), at, _or(moved, at), weight, bias, of_part(means, part), of_part(rstds, part), *drop,
                eps, SILU=silu, **options,
            )  # fmt: skip
    return y, means, rstds


def norm_backward(
    dy: Tensor, more: Tensor | None, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, means: Tensor,
    rstds: Tensor, groups: int, silu: bool, masks: Masks | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, with `more` added, (N, C, H, W); of weight and bias by sample, float32 (N, C); of shift (N, C).

    dy: of y; more: (N, C, H, W), what else x's gradient is the sum of; the others: as `norm` had and returned them.
    """
    dx = torch.empty_like(x)
    of_weight = x.new_empty(x.shape[:2], dtype=torch.float32)
    of_bias = torch.empty_like(of_weight)
    of_shift = None if shift is None else torch.empty_like(of_weight, dtype=shift.dtype)
    for part in parts(len(x)):
        of = [None if t is None else of_part(t, part) for t in (dx, of_weight, of_bias, of_shift, dy, more, x, shift)]
        to, to_weight, to_bias, to_shift, given, and_more, at, moved = of
        assert at is not None
        grid, options, drop = _launch(at, moved, groups, masks, part)
        with torch.cuda.device_of(x):
            _norm_backward_kernel[grid](
                to, to_weight, to_bias, _or(to_shift, at), given, _or(and_more, at), at, _or(moved, at), weight, bias,
                of_part(means, part), of_part(rstds, part), *drop, MORE=more is not None, SILU=silu, **options,
            )  # fmt: skip
    return dx, of_weight, of_bias, of_shift


def _launch(
    x: Tensor, shift: Tensor | None, groups: int, masks: Masks | None, part: slice
) -> tuple[tuple[int, int], dict[str, Any], list[object]]:
    num, channels, height, width = x.shape
    by, drop = Division.of(channels, height * width, groups), masks or Masks(x, 0, 0, 1.0)
    rows, places = (num, x) if masks is None else (masks.places.shape[1], of_part(masks.places, part, 1))
    arguments = [places, rows, height * width, drop.first_counter, drop.bound, drop.scale]
    options: dict[str, Any] = {"channels": channels, "size": by.size, "words": by.width // 8, "C": by.C, "P": by.P}
    options |= {"WHOLE": by.whole, "num_warps": by.num_warps, "in_shift": _or(shift, x).stride(0)}
    options |= {"SHIFT": shift is not None, "DROP": masks is not None}
    return (channels // by.width, num), options, arguments


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor
