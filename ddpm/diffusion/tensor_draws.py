"""The draws of rng.py operation by operation, on any device; kernels.py has the same, one kernel each.

The normals use integer operations, float32 +, -, * and /, and sqrt only, each as an operation of its own, so that no
compiler fuses two of them. IEEE 754 then leaves one possible result for each, wherever in a tensor and by whichever
library, thread or vector unit it is computed. Logarithm and cosine make no such promise, nor does torch.sqrt: the
vector library that computes it on a CPU differs in the last bit from one kind of CPU to the next. In float64 it does
too, but no square root of a float32 lies within 4 ulps of float64 of where its rounding to float32 changes.

On a CPU NumPy computes them, in 0.4 to 0.7 of torch's time; torch does if there is enough work for several threads.
`xp` is the module that does: both have the functions used here under the same names.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion.philox import Key, Step, counter, philox4x32, words

# counters worked on at once: on a CPU the temporaries should stay in the cache (measured)
CHUNK_CPU = 1 << 15
CHUNK_THREADS = 1 << 17  # where torch shares them between threads
CHUNK_DEVICE = 1 << 22  # on a GPU this only bounds the memory of the temporaries
FEW_THREADS = 3
"""With up to this many threads torch is no faster than NumPy with one."""

# Minimax polynomials, lowest power first, fitted in float64 by Lawson's iteration; in brackets their largest error.
# -4 atanh(s) / s in s**2, |s| <= 3 - sqrt(8) [relative 7e-10]; sin(pi v / 2) / v [relative 5e-9] and cos(pi v / 2)
# [absolute 5e-8] in v**2, |v| <= 1
LOG_TERMS = (-3.9999999972426424, -1.3333363190169327, -0.7994958985193417, -0.5985130135743980)
SIN_TERMS = (1.570796318447696, -0.6459637105998557, 0.0796896789479276, -0.0046737666125998, 0.0001514851308238)
COS_TERMS = (0.999999953466668, -1.2336982146688147, 0.2536507446354323, -0.0208106275195004, 0.0008581906195411)
LOG_4 = 2.0 * math.log(2.0)
_SQRT_HALF_BITS = 0x3F3504F3
_MANTISSA_BITS = 23


def normal(out: Tensor, index: Tensor, key: Key, step: Step) -> None:
    """Fills out, float32 (n, elements); index: int64 (n,)."""
    num_rows, num_elements = out.shape
    num_counters = -(-num_elements // 4)
    whole = out if num_elements % 4 == 0 else out.new_empty((num_rows, num_counters * 4))
    xp, chunks = _how(num_rows, num_counters, index.device)
    element, rows_index, z = _as(
        xp, torch.arange(num_counters, device=index.device), index, whole.view(num_rows, num_counters, 4)
    )
    at = _number(xp, step)
    for rows in chunks:
        w_0, w_1, w_2, w_3 = philox4x32(counter(element[None], rows_index[rows, None], at), key)
        box_muller(w_0, w_1, z[rows, :, 0], z[rows, :, 1], xp)
        box_muller(w_2, w_3, z[rows, :, 2], z[rows, :, 3], xp)
    if whole is not out:
        out.copy_(whole[:, :num_elements])


def keep_mask(out: Tensor, places: Tensor, first_counter: int, bound: int) -> None:
    """Fills out, bool (n, elements): which 16-bit numbers, read as signed, are not below `bound`.

    places: int64 (5, n) of rng.places; first_counter, bound: of rng.mask_counters.
    """
    num_rows, num = out.shape
    num_counters = -(-num // 8)
    whole = out if num % 8 == 0 else out.new_empty((num_rows, num_counters * 8))
    xp, chunks = _how(num_rows, num_counters, places.device)
    element, numbers, kept = _as(xp, torch.arange(num_counters, device=places.device) + first_counter, places, whole)
    for rows in chunks:
        index, step, high, key_0, key_1 = numbers[:, rows, None]
        w_0, w_1, w_2, w_3 = philox4x32((element[None], index, step[:1], high), (key_0[:1], key_1[:1]))
        # four 16-bit numbers in each int64, lowest first
        packed = xp.stack([w_0 | w_1 << 32, w_2 | w_3 << 32], -1).view(xp.int16)
        xp.greater_equal(packed.reshape(len(packed), -1), bound, out=kept[rows])
    if whole is not out:
        out.copy_(whole[:, :num])


def first_word(out: Tensor, index: Tensor, key: Key, step: Step) -> None:
    """Fills out, int64 (n,), with the first word of each row's counter of element 0; index: int64 (n,)."""
    xp, _ = _how(len(index), 1, index.device)
    into, rows = _as(xp, out, index)
    into[:] = words(key, rows, _number(xp, step))[0]


def _how(num_rows: int, num_counters: int, device: torch.device) -> tuple[Any, Iterator[slice]]:
    """The module (torch or NumPy) that computes this many counters, and the slices of rows to work on at once."""
    if device.type != "cpu":
        return torch, _chunks(num_rows, num_counters, CHUNK_DEVICE)
    if num_rows * num_counters < CHUNK_THREADS or torch.get_num_threads() <= FEW_THREADS:
        return np, _chunks(num_rows, num_counters, CHUNK_CPU)
    return torch, _chunks(num_rows, num_counters, CHUNK_THREADS)


def _as(xp: Any, *tensors: Tensor) -> tuple[Any, ...]:
    """The tensors for torch; for NumPy arrays that share their memory."""
    return tensors if xp is torch else tuple(t.numpy() for t in tensors)


def _number(xp: Any, step: Step) -> Step:
    """The step as a number where it can be read without waiting for a device: NumPy needs it."""
    return step if xp is torch or not isinstance(step, Tensor) else int(step.numpy())


def _chunks(num_rows: int, num_counters: int, limit: int) -> Iterator[slice]:
    """Equal chunks: a short last one would fall below what torch shares between threads."""
    num_chunks = max(1, -(-num_rows * num_counters // limit))
    chunk_rows = max(1, -(-num_rows // num_chunks))
    for first in range(0, num_rows, chunk_rows):
        yield slice(first, first + chunk_rows)


def box_muller(word_r: Any, word_theta: Any, out_cos: Any, out_sin: Any, xp: Any = torch) -> None:
    """Two words to two independent normals: +-r cos(theta), +-r sin(theta), r = sqrt(-2 log u), |theta| <= pi / 2.

    u is the magnitude and the sign is the sign of the odd signed integer word_r | 1, whose values are symmetric. Words:
    int64 in [0, 2**32), of one shape; out_cos, out_sin: float32, which are filled. Box and Muller 1958.
    """
    signed_u = _cast(_cast(word_r, xp.int32) | 1, xp.float32)
    signed_u *= 2.0**-31
    # log u = exponent * log 2 + log m with m in [sqrt(1/2), sqrt(2)): near u = 1 the exponent is 0, nothing cancels
    bits = signed_u.view(xp.int32) & 0x7FFFFFFF
    offset = bits - _SQRT_HALF_BITS
    bits -= offset & -(1 << _MANTISSA_BITS)
    m = bits.view(xp.float32)
    s = m - 1.0
    s /= m + 1.0  # log m = 2 atanh(s)
    offset >>= _MANTISSA_BITS
    exponent = _cast(offset, xp.float32)
    exponent *= -LOG_4
    r_squared = _polynomial(s * s, LOG_TERMS)
    r_squared *= s
    r_squared += exponent
    signed_r = xp.copysign(_cast(xp.sqrt(_cast(r_squared, xp.float64)), xp.float32), signed_u)

    v = _cast(_cast(word_theta, xp.int32), xp.float32)
    v *= 2.0**-31  # theta in units of pi / 2
    v_squared = v * v
    xp.multiply(_polynomial(v_squared, COS_TERMS), signed_r, out=out_cos)
    sine = _polynomial(v_squared, SIN_TERMS)
    sine *= v
    xp.multiply(sine, signed_r, out=out_sin)


def _cast(values: Any, dtype: Any) -> Any:
    return values.to(dtype) if isinstance(values, Tensor) else values.astype(dtype)


def _polynomial(z: Any, terms: tuple[float, ...]) -> Any:
    """Horner's rule, lowest power first in `terms`."""
    value = z * terms[-1]
    for term in terms[-2:0:-1]:
        value += term
        value *= z
    value += terms[0]
    return value
