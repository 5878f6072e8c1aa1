"""Philox4x32-10: keys, counters and words (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", 3.3).

Owns: the generator, how a key follows from (seed, purpose, attempt), and where index and step stand in a counter.
"""

import hashlib
import json
import operator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Values = Any
"""An int64 Tensor, or an int64 array of NumPy: operators of both are the same."""
Words = tuple[Values, Values, Values, Values]
Step = int | Tensor
"""The step of a run: an int in [0, 2**48), or an int64 () tensor on the device of the draws, which is not checked."""
StepT = TypeVar("StepT", int, Tensor, Step)
WORD = 0xFFFFFFFF
LIMIT_BITS = 48  # of step and index: the low 32 bits have a counter word each, the high 16 share the fourth

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class Key(NamedTuple):
    """The two uint32 words that key Philox."""

    word_0: int
    word_1: int


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


def philox4x32(counter: Words, key: Key | tuple[Values, Values]) -> Words:
    """Philox4x32-10: four random words for each counter.

    counter: four int64 tensors, or arrays, of values in [0, 2**32) whose shapes broadcast; constant parts are best
    given with size 1, since the first rounds then cost next to nothing. key: a Key, or two int64 tensors that broadcast
    with the counter. Returns four tensors, or arrays, of the broadcast shape.
    """
    c_0, c_1, c_2, c_3 = counter
    k_0, k_1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, which keeps all 64 bits. Low halves stay unmasked: what they are XORed into is masked.
        low_0, low_1 = c_0 * _MULTIPLIERS[0], c_2 * _MULTIPLIERS[1]
        c_0, c_2 = (low_1 >> 32) ^ c_1, (low_0 >> 32) ^ c_3
        c_0 ^= k_0
        c_0 &= WORD
        c_2 ^= k_1
        c_2 &= WORD
        c_1, c_3 = low_1, low_0
        k_0, k_1 = (k_0 + _KEY_STEPS[0]) & WORD, (k_1 + _KEY_STEPS[1]) & WORD
    return c_0, c_1 & WORD, c_2, c_3 & WORD


def counter(element: Values, index: Values, step: Step) -> Words:
    """(element, low words of index and step, their high halves side by side): nothing wraps.

    element: in [0, 2**32); index: int64 (n,) or what broadcasts with element, in [0, 2**48); step: as `Step` says, an
    int outside [0, 2**48) raises ValueError. Returns four words that broadcast to one shape.
    """
    if isinstance(step, Tensor):
        low_step = (step & WORD).expand_as(index[:1])
    else:  # from the index, not by torch.tensor: no copy from the host, so nothing waits for the device
        low_step = index[:1] * 0 + (checked_step(step) & WORD)
    return element, index & WORD, low_step, (index >> 32 << 16) | (step >> 32)


def words(key: Key, index: Values, step: Step) -> Words:
    """The four words of element 0 of each row: each int64 (n,), in [0, 2**32). index: int64 (n,)."""
    return philox4x32(counter(index * 0, index, step), key)


def checked_step(step: StepT) -> StepT:
    """The step itself. ValueError for an int outside [0, 2**48); a tensor is not read."""
    if isinstance(step, int) and not 0 <= step < 1 << LIMIT_BITS:
        raise ValueError(f"step is {step}; it must lie in [0, 2**{LIMIT_BITS})")
    return step


def check_index(index: Tensor) -> None:
    """Raise ValueError unless int64 (n,) in [0, 2**48). Values are checked on a CPU only: elsewhere that would wait."""
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}; it must be int64 of shape (n,)")
    if index.device.type == "cpu" and len(index):
        low, high = int(index.numpy().min()), int(index.numpy().max())
        if low < 0 or high >= 1 << LIMIT_BITS:
            raise ValueError(f"index runs from {low} to {high}; it must lie in [0, 2**{LIMIT_BITS})")


def _digest(*parts: int | str) -> bytes:
    """sha256 of an unambiguous text of the parts; operator.index refuses floats, which would read differently."""
    return hashlib.sha256(json.dumps([p if isinstance(p, str) else operator.index(p) for p in parts]).encode()).digest()
