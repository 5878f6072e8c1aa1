"""The draws of rng.py by tensor operations, on any device; kernels.py has the same, one kernel each.

The normals use integer operations, float32 +, -, * and /, and sqrt only, each as a tensor operation of its own, so that
no compiler fuses two of them. IEEE 754 then leaves one possible result for each, wherever in a tensor and by whichever
thread or vector unit it is computed. torch.log and torch.cos make no such promise, nor does torch.sqrt: the vector
library that computes it on a CPU differs in the last bit from one kind of CPU to the next. In float64 it does too, but
no square root of a float32 lies within 4 ulps of float64 of where its rounding to float32 changes.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm.diffusion.philox import Key, Step, counter, philox4x32, words

CHUNK_CPU = 1 << 17  # counters worked on at once: on a CPU the temporaries should stay in the cache (measured),
CHUNK_DEVICE = 1 << 22  # elsewhere this only bounds their memory

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
    quads = whole.view(num_rows, num_counters, 4)
    element = torch.arange(num_counters, device=index.device).unsqueeze(0)
    for rows in _chunks(num_rows, num_counters, index.device):
        w_0, w_1, w_2, w_3 = philox4x32(counter(element, index[rows, None], step), key)
        z = quads[rows]
        box_muller(w_0, w_1, z[..., 0], z[..., 1])
        box_muller(w_2, w_3, z[..., 2], z[..., 3])
    if whole is not out:
        out.copy_(whole[:, :num_elements])


def keep_mask(out: Tensor, places: Tensor, first_counter: int, bound: int) -> None:
    """Fills out, bool (n, elements): which 16-bit numbers are not below `bound`, read as signed; places: rng.places."""
    num_rows, num = out.shape
    num_counters = -(-num // 8)
    whole = out if num % 8 == 0 else out.new_empty((num_rows, num_counters * 8))
    element = torch.arange(num_counters, device=places.device).unsqueeze(0) + first_counter
    for rows in _chunks(num_rows, num_counters, places.device):
        index, step, high, key_0, key_1 = places[:, rows, None]
        w_0, w_1, w_2, w_3 = philox4x32((element, index, step[:1], high), (key_0[:1], key_1[:1]))
        # four 16-bit numbers in each int64, lowest first
        packed = torch.stack([w_0 | w_1 << 32, w_2 | w_3 << 32], -1)
        torch.ge(packed.view(torch.int16).flatten(1), bound, out=whole[rows])
    if whole is not out:
        out.copy_(whole[:, :num])


def first_word(out: Tensor, index: Tensor, key: Key, step: Step) -> None:
    """Fills out, int64 (n,), with the first word of each row's counter of element 0."""
    out.copy_(words(key, index, step)[0])


def _chunks(num_rows: int, num_counters: int, device: torch.device) -> Iterator[slice]:
    """Rows worked on at once. Equal chunks: a short last one would fall below what torch shares between threads."""
    limit = CHUNK_CPU if device.type == "cpu" else CHUNK_DEVICE
    num_chunks = max(1, -(-num_rows * num_counters // limit))
    chunk_rows = max(1, -(-num_rows // num_chunks))
    for first in range(0, num_rows, chunk_rows):
        yield slice(first, first + chunk_rows)


def box_muller(word_r: Tensor, word_theta: Tensor, out_cos: Tensor, out_sin: Tensor) -> None:
    """Two words to two independent normals: +-r cos(theta), +-r sin(theta), r = sqrt(-2 log u), |theta| <= pi / 2.

    u is the magnitude and the sign is the sign of the odd signed integer word_r | 1, whose values are symmetric.
    """
    signed_u = (word_r.to(torch.int32) | 1).to(torch.float32).mul_(2.0**-31)
    # log u = exponent * log 2 + log m with m in [sqrt(1/2), sqrt(2)): near u = 1 the exponent is 0, nothing cancels
    bits = signed_u.view(torch.int32) & 0x7FFFFFFF
    offset = bits - _SQRT_HALF_BITS
    m = bits.sub_(offset & -(1 << _MANTISSA_BITS)).view(torch.float32)
    s = (m - 1.0).div_(m + 1.0)  # log m = 2 atanh(s)
    exponent = offset.bitwise_right_shift_(_MANTISSA_BITS).to(torch.float32)
    r_squared = _polynomial(s * s, LOG_TERMS).mul_(s).add_(exponent.mul_(-LOG_4))
    signed_r = r_squared.double().sqrt_().float().copysign_(signed_u)

    v = word_theta.to(torch.int32).to(torch.float32).mul_(2.0**-31)  # theta in units of pi / 2
    v_squared = v * v
    torch.mul(_polynomial(v_squared, COS_TERMS), signed_r, out=out_cos)
    torch.mul(_polynomial(v_squared, SIN_TERMS).mul_(v), signed_r, out=out_sin)


def _polynomial(z: Tensor, terms: tuple[float, ...]) -> Tensor:
    """Horner's rule, lowest power first in `terms`."""
    value = z * terms[-1]
    for term in terms[-2:0:-1]:
        value.add_(term).mul_(z)
    return value.add_(terms[0])
