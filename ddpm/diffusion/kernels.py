"""The draws of rng.py as one kernel each, for GPUs: the bits of tensor_draws.py, whose functions these are.

Owns: how a draw is computed on a GPU. Must not know: what is drawn for what. Multiplications and additions are not
fused (`FUSE`), division and square root are correctly rounded: with IEEE 754 that leaves one possible result.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm.diffusion.philox import WORD, Key, Step
from ddpm.diffusion.tensor_draws import COS_TERMS, LOG_4, LOG_TERMS, SIN_TERMS

TERMS = {"LOG": LOG_TERMS, "SIN": SIN_TERMS, "COS": COS_TERMS, "LOG_4": LOG_4}
FUSE = {"enable_fp_fusion": False}
_BLOCK = 256
_SCALARS = ["key_0", "key_1", "step_low", "step_high"]
"""Numbers that change: no kernel of its own for a value that 16 divides. As signed 32-bit, so that the type is one."""


@triton.jit
def _words(element, index, key_0, key_1, step_low, step_high, AT: tl.constexpr):
    """Philox4x32-10 of rng.py's counter. element: uint32; index: int64; the others: int32, read as unsigned.

    AT: step_low is where the step lies, int64, and step_high is nothing.
    """
    if AT:
        step = tl.load(step_low)
        step_high = (step >> 32).to(tl.int32)
        step_low = step.to(tl.int32)
    high = ((index >> 32) << 16).to(tl.int32) | step_high
    zero = element * 0
    return tl.philox_impl(
        element,
        zero + index.to(tl.uint32),
        zero + step_low.to(tl.uint32, bitcast=True),
        zero + high.to(tl.uint32, bitcast=True),
        zero + key_0.to(tl.uint32, bitcast=True),
        zero + key_1.to(tl.uint32, bitcast=True),
        10,
    )


@triton.jit
def _box_muller(word_r, word_theta, LOG: tl.constexpr, SIN: tl.constexpr, COS: tl.constexpr, LOG_4: tl.constexpr):
    signed_u = (word_r.to(tl.int32, bitcast=True) | 1).to(tl.float32) * 2.0**-31
    bits = signed_u.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    offset = bits - 0x3F3504F3
    m = (bits - (offset & -8388608)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    log = (((z * LOG[3] + LOG[2]) * z + LOG[1]) * z + LOG[0]) * s
    r = tl.sqrt_rn(log + (offset >> 23).to(tl.float32) * -LOG_4)
    sign = signed_u.to(tl.int32, bitcast=True) & -2147483648
    signed_r = ((r.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | sign).to(tl.float32, bitcast=True)
    v = word_theta.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    z = v * v
    cos = (((z * COS[4] + COS[3]) * z + COS[2]) * z + COS[1]) * z + COS[0]
    sin = ((((z * SIN[4] + SIN[3]) * z + SIN[2]) * z + SIN[1]) * z + SIN[0]) * v
    return cos * signed_r, sin * signed_r


@triton.jit(do_not_specialize=_SCALARS)
def _normal_kernel(
    out, index, num_elements, key_0, key_1, step_low, step_high, AT: tl.constexpr,
    LOG: tl.constexpr, SIN: tl.constexpr, COS: tl.constexpr, LOG_4: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w_0, w_1, w_2, w_3 = _words(counter.to(tl.uint32), tl.load(index + row), key_0, key_1, step_low, step_high, AT)
    z_0, z_1 = _box_muller(w_0, w_1, LOG, SIN, COS, LOG_4)
    z_2, z_3 = _box_muller(w_2, w_3, LOG, SIN, COS, LOG_4)
    at, first = out + row * num_elements, counter * 4
    tl.store(at + first, z_0, mask=first < num_elements)
    tl.store(at + first + 1, z_1, mask=first + 1 < num_elements)
    tl.store(at + first + 2, z_2, mask=first + 2 < num_elements)
    tl.store(at + first + 3, z_3, mask=first + 3 < num_elements)


@triton.jit
def _mask_kernel(out, places, num_rows, num, first_counter, bound, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = (counter * 0).to(tl.uint32)
    index = tl.load(places + row).to(tl.uint32)
    step = tl.load(places + num_rows + row).to(tl.uint32)
    high = tl.load(places + 2 * num_rows + row).to(tl.uint32)
    key_0 = tl.load(places + 3 * num_rows + row).to(tl.uint32)
    key_1 = tl.load(places + 4 * num_rows + row).to(tl.uint32)
    element = (counter + first_counter).to(tl.uint32)
    w_0, w_1, w_2, w_3 = tl.philox_impl(element, zero + index, zero + step, zero + high, zero + key_0, zero + key_1, 10)
    at, first = out + row * num, counter * 8
    _store_two(at, first, w_0, num, bound)
    _store_two(at, first + 2, w_1, num, bound)
    _store_two(at, first + 4, w_2, num, bound)
    _store_two(at, first + 6, w_3, num, bound)


@triton.jit
def _store_two(at, first, word, num, bound):
    """Whether each 16-bit half of the word, lower one first, read as signed, is not below the bound."""
    signed = word.to(tl.int32, bitcast=True)
    tl.store(at + first, ((signed << 16) >> 16) >= bound, mask=first < num)
    tl.store(at + first + 1, (signed >> 16) >= bound, mask=first + 1 < num)


@triton.jit(do_not_specialize=_SCALARS)
def _first_word_kernel(out, index, num_rows, key_0, key_1, step_low, step_high, AT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    own = tl.load(index + row, mask=inside, other=0)
    word, _1, _2, _3 = _words((row * 0).to(tl.uint32), own, key_0, key_1, step_low, step_high, AT)
    tl.store(out + row, word.to(tl.int64), mask=inside)


# ---------------------------------------------------------------- launching

_MOST = 65_535
"""Programs along the second axis of a grid."""


def parts(num_rows: int) -> list[slice]:
    """The rows of each launch: a grid has at most _MOST programs along its second axis, one for each row."""
    return [slice(begin, begin + _MOST) for begin in range(0, num_rows, _MOST)]


def of_part(rows: Tensor, part: slice, axis: int = 0) -> Tensor:
    """A part of a tensor's rows; of all rows the tensor itself, which costs nothing."""
    num = rows.shape[axis] - part.start
    return rows if not part.start and num <= _MOST else rows.narrow(axis, part.start, min(num, _MOST))


def normal(out: Tensor, index: Tensor, key: Key, step: Step) -> None:
    """As in tensor_draws.py; out: contiguous."""
    num_rows, num_elements = out.shape
    if not num_rows or not num_elements:
        return
    blocks = triton.cdiv(triton.cdiv(num_elements, 4), _BLOCK)
    with torch.cuda.device_of(out):
        for part in parts(num_rows):
            rows, indices = of_part(out, part), of_part(index, part).contiguous()
            _normal_kernel[blocks, len(rows)](
                rows, indices, num_elements, *_scalars(key, step), **TERMS, BLOCK=_BLOCK, **FUSE
            )


def keep_mask(out: Tensor, places: Tensor, first_counter: int, bound: int) -> None:
    """As in tensor_draws.py; out: contiguous."""
    num_rows, num = out.shape
    if not num_rows:
        return
    blocks = triton.cdiv(triton.cdiv(num, 8), _BLOCK)
    with torch.cuda.device_of(out):
        for part in parts(num_rows):
            rows, there = of_part(out, part), of_part(places, part, 1).contiguous()
            _mask_kernel[blocks, len(rows)](rows, there, len(rows), num, first_counter, bound, BLOCK=_BLOCK)


def first_word(out: Tensor, index: Tensor, key: Key, step: Step) -> None:
    """As in tensor_draws.py."""
    if not len(out):
        return
    grid = (triton.cdiv(len(out), _BLOCK),)
    with torch.cuda.device_of(out):
        _first_word_kernel[grid](out, index.contiguous(), len(out), *_scalars(key, step), BLOCK=_BLOCK)


def _scalars(key: Key, step: Step) -> list[int | Tensor]:
    """Key and step as signed numbers of 32 bits, and whether the step is where it lies."""
    at = (step, 0) if isinstance(step, Tensor) else (_signed(step & WORD), step >> 32)
    return [*map(_signed, key), *at, isinstance(step, Tensor)]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
