"""Counter-based randomness: a value is a pure function of (seed, purpose, attempt) and of (index, step, element).

Owns: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3) and every draw
made from it. Must not know: batches, ranks, datasets, configs, or any torch.Generator.

The normals use integer operations, float32 +, -, * and /, and sqrt only, each as a tensor operation of its own, so that
no compiler fuses two of them. IEEE 754 then leaves one possible result for each, wherever in a tensor and by whichever
thread or vector unit it is computed. torch.log and torch.cos make no such promise, nor does torch.sqrt: the vector
library that computes it on a CPU differs in the last bit from one kind of CPU to the next. In float64 it does too, but
no square root of a float32 lies within 4 ulps of float64 of where its rounding to float32 changes.

A key serves one kind of draw: give uniform_int, coin, normal and permutation different purposes.
"""

import hashlib
import json
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Key(NamedTuple):
    """The two uint32 words that key Philox."""

    word_0: int
    word_1: int


_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

_LIMIT_BITS = 48  # of step and of index: a counter word each, and half of the fourth word for what lies above it
_LAYER_BITS, _PLACE_BITS = 8, 24  # of the first counter word, in masks: layer and place within it
_CHUNK_CPU = 1 << 17  # counters worked on at once: on a CPU the temporaries should stay in the cache (measured),
_CHUNK_DEVICE = 1 << 22  # elsewhere this only bounds their memory

# Minimax polynomials, lowest power first, fitted in float64 by Lawson's iteration; in brackets their largest error.
# -4 atanh(s) / s in s**2, |s| <= 3 - sqrt(8) [relative 7e-10]; sin(pi v / 2) / v [relative 5e-9] and cos(pi v / 2)
# [absolute 5e-8] in v**2, |v| <= 1
_LOG_TERMS = (-3.9999999972426424, -1.3333363190169327, -0.7994958985193417, -0.5985130135743980)
_SIN_TERMS = (1.570796318447696, -0.6459637105998557, 0.0796896789479276, -0.0046737666125998, 0.0001514851308238)
_COS_TERMS = (0.999999953466668, -1.2336982146688147, 0.2536507446354323, -0.0208106275195004, 0.0008581906195411)
_SQRT_HALF_BITS = 0x3F3504F3
_MANTISSA_BITS = 23


def key(seed: int, purpose: str, attempt: int = 0) -> Key:
    """The key of one stream: the first 64 bits of the sha256 of (seed, purpose, attempt).

    A hash, because sums such as seed + offset make one stream's seed another one's neighbour: (0, offset 1) and
    (1, offset 0) would be the same numbers. Distinct triples share a key with probability 2**-64.
    """
    words = _digest("key", seed, purpose, attempt)
    return Key(int.from_bytes(words[:4], "little"), int.from_bytes(words[4:8], "little"))


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed in [0, 2**63) for generators that keep a state (torch.manual_seed), hashed like `key`."""
    return int.from_bytes(_digest("seed", seed, purpose, *numbers)[:8], "little") >> 1


def philox4x32(counter: Words, key: Key | tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four random words for each counter.

    key: or two int64 tensors that broadcast with the counter.

    counter: four int64 tensors of values in [0, 2**32) whose shapes broadcast; parts of the counter that are constant
    are best given with size 1, since the first rounds then cost next to nothing. Returns four such tensors.
    """
    c_0, c_1, c_2, c_3 = counter
    k_0: Any
    k_1: Any
    k_0, k_1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, which keeps all 64 bits. Low halves stay unmasked: what they are XORed into is masked.
        low_0, low_1 = c_0 * _MULTIPLIERS[0], c_2 * _MULTIPLIERS[1]
        c_0 = ((low_1 >> 32) ^ c_1).bitwise_xor_(k_0).bitwise_and_(_WORD)
        c_2 = ((low_0 >> 32) ^ c_3).bitwise_xor_(k_1).bitwise_and_(_WORD)
        c_1, c_3 = low_1, low_0
        k_0, k_1 = (k_0 + _KEY_STEPS[0]) & _WORD, (k_1 + _KEY_STEPS[1]) & _WORD
    return c_0, c_1 & _WORD, c_2, c_3 & _WORD


def normal(key: Key, index: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """Standard normals, float32 (n, *shape) on index.device, by Box and Muller's transform (1958).

    index: int64 (n,) in [0, 2**48), one per sample; checked on a CPU only, since a check elsewhere would wait for the
    device. step: in [0, 2**48). shape: of one sample, at most 2**34 elements. |values| <= 6.56.
    The value of element e of row i depends on (key, index[i], step, e) alone, bit for bit.
    """
    _check_index(index)
    num_elements, num_rows = math.prod(shape), len(index)
    num_counters = -(-num_elements // 4)
    if num_counters > _WORD + 1:
        raise ValueError(f"shape {tuple(shape)} has {num_elements} elements; at most 2**34 are allowed")
    out = torch.empty((num_rows, num_counters, 4), dtype=torch.float32, device=index.device)
    element = torch.arange(num_counters, device=index.device).unsqueeze(0)
    for rows in _chunks(num_rows, num_counters, index.device):
        w_0, w_1, w_2, w_3 = philox4x32(_counter(element, index[rows, None], step), key)
        z = out[rows]
        _box_muller(w_0, w_1, z[..., 0], z[..., 1])
        _box_muller(w_2, w_3, z[..., 2], z[..., 3])
    return out.flatten(1)[:, :num_elements].reshape(num_rows, *shape)


def uniform_int(key: Key, index: Tensor, step: int, high: int) -> Tensor:
    """Integers in [0, high), int64 (n,) on index.device; index and step as in `normal`.

    high: in [1, 2**32]. The top 32 bits of word * high: the probability of a value is off by less than 2**-32 from
    1 / high, relatively high * 2**-32 (2.3e-7 for a thousand timesteps).
    """
    if not 1 <= high <= 1 << 32:
        raise ValueError(f"high is {high}; it must lie in [1, 2**32]")
    return (_words(key, index, step)[0] * high >> 32) & _WORD


def bernoulli(key: Key, index: Tensor, step: int, probability: float) -> Tensor:
    """True with `probability`, to a precision of 2**-24: bool (B,)."""
    return uniform_int(key, index, step, 1 << 24) < round(probability * (1 << 24))


def coin(key: Key, index: Tensor, step: int) -> Tensor:
    """Fair coins, bool (n,) on index.device; index and step as in `normal`."""
    return uniform_int(key, index, step, 2) == 1


def places(key: Key, index: Tensor, step: int) -> Tensor:
    """All that a draw depends on but for its layer and element, as a tensor: int64 (5, n) on index.device.

    For what is compiled, where a number that changes with every step would be a new program. index, step: as in
    `normal`. Rows: the last three words of the counter, and the key's two.
    """
    _check_index(index)
    _, low, low_step, high = _counter(index, index, step)
    rows = [low, low_step.expand_as(low), high]
    return torch.stack([*rows, *(torch.full_like(low, word) for word in key)])


def keep_mask(places: Tensor, layer: int, num: int, probability: float) -> Tensor:
    """For dropout: False with `probability`, to a precision of 2**-16; bool (n, num) on places.device.

    layer: in [0, 256), num: at most 2**27. The value of element e depends on (places[:, i], layer, e) alone: it is
    the 16-bit number e % 8 of the four words of counter (layer * 2**24 + e // 8, …).
    """
    if not 0 <= layer < 1 << _LAYER_BITS or not 0 < num <= 8 << _PLACE_BITS:
        raise ValueError(f"layer is {layer} and num is {num}; at most 255 and 2**27 are allowed")
    bound = _dropped_of_65536(probability) - (1 << 15)  # of a signed number
    num_rows, num_counters = places.shape[1], -(-num // 8)
    out = torch.empty((num_rows, num_counters * 8), dtype=torch.bool, device=places.device)
    element = torch.arange(num_counters, device=places.device).unsqueeze(0) + (layer << _PLACE_BITS)
    for rows in _chunks(num_rows, num_counters, places.device):
        index, step, high, key_0, key_1 = places[:, rows, None]
        w_0, w_1, w_2, w_3 = philox4x32((element, index, step[:1], high), (key_0[:1], key_1[:1]))
        # four 16-bit numbers in each int64, lowest first
        packed = torch.stack([w_0 | w_1 << 32, w_2 | w_3 << 32], -1)
        torch.ge(packed.view(torch.int16).flatten(1), bound, out=out[rows])
    return out[:, :num].contiguous()


def keep_share(probability: float) -> float:
    """The share that `keep_mask` keeps."""
    return 1.0 - _dropped_of_65536(probability) / (1 << 16)


def _dropped_of_65536(probability: float) -> int:
    return round(probability * (1 << 16))


def permutation(key: Key, epoch: int, n: int) -> Tensor:
    """A permutation of 0 .. n-1, int64 (n,) on the CPU: the order of n keyed 64-bit words.

    epoch: in [0, 2**48). Two words are equal with probability below n**2 / 2**65; they then keep their order.
    """
    high, low, _, _ = _words(key, torch.arange(n), epoch)
    return torch.argsort(high << 32 | low, stable=True)


def _chunks(num_rows: int, num_counters: int, device: torch.device) -> Iterator[slice]:
    """Rows worked on at once. Equal chunks: a short last one would fall below what torch shares between threads."""
    limit = _CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE
    num_chunks = max(1, -(-num_rows * num_counters // limit))
    chunk_rows = max(1, -(-num_rows // num_chunks))
    for first in range(0, num_rows, chunk_rows):
        yield slice(first, first + chunk_rows)


def _digest(*parts: int | str) -> bytes:
    """sha256 of an unambiguous text of the parts; operator.index refuses floats, which would read differently."""
    return hashlib.sha256(json.dumps([p if isinstance(p, str) else operator.index(p) for p in parts]).encode()).digest()


def _words(key: Key, index: Tensor, step: int) -> Words:
    _check_index(index)
    return philox4x32(_counter(torch.zeros_like(index), index, step), key)


def _counter(element: Tensor, index: Tensor, step: int) -> Words:
    """(element // 4, low words of index and step, their high halves side by side): nothing wraps."""
    if not 0 <= step < 1 << _LIMIT_BITS:
        raise ValueError(f"step is {step}; it must lie in [0, 2**{_LIMIT_BITS})")
    # full_like, not torch.tensor: no copy from the host, so nothing waits for the device
    low_step = torch.full_like(index[:1], step & _WORD)
    return element, index & _WORD, low_step, (index >> 32 << 16) | (step >> 32)


def _check_index(index: Tensor) -> None:
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}; it must be int64 of shape (n,)")
    if index.device.type == "cpu" and len(index):
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= 1 << _LIMIT_BITS:
            raise ValueError(f"index runs from {low} to {high}; it must lie in [0, 2**{_LIMIT_BITS})")


def _box_muller(word_r: Tensor, word_theta: Tensor, out_cos: Tensor, out_sin: Tensor) -> None:
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
    r_squared = _polynomial(s * s, _LOG_TERMS).mul_(s).add_(exponent.mul_(-2.0 * math.log(2.0)))
    signed_r = r_squared.double().sqrt_().float().copysign_(signed_u)

    v = word_theta.to(torch.int32).to(torch.float32).mul_(2.0**-31)  # theta in units of pi / 2
    v_squared = v * v
    torch.mul(_polynomial(v_squared, _COS_TERMS), signed_r, out=out_cos)
    torch.mul(_polynomial(v_squared, _SIN_TERMS).mul_(v), signed_r, out=out_sin)


def _polynomial(z: Tensor, terms: tuple[float, ...]) -> Tensor:
    """Horner's rule, lowest power first in `terms`."""
    value = z * terms[-1]
    for term in terms[-2:0:-1]:
        value.add_(term).mul_(z)
    return value.add_(terms[0])
