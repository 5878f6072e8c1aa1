"""Counter-based randomness: a value is a pure function of (seed, purpose, attempt) and of (index, step, element).

Owns: every draw made from Philox's words, and by what it is computed on a device: operation by operation, or on a GPU
by one kernel with the same bits. Must not know: batches, ranks, datasets, configs, or any torch.Generator.

A key serves one kind of draw: give uniform_int, coin, normal, places and permutation different purposes.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion import tensor_draws
from ddpm.diffusion.philox import WORD, Key, Step, check_index, checked_step, counter, derive_seed, key, words

__all__ = [
    "Key", "Step", "bernoulli", "coin", "derive_seed", "keep_mask", "keep_share", "key", "mask_counters", "normal",
    "permutation", "places", "uniform_int",
]  # fmt: skip

_LAYER_BITS, _PLACE_BITS = 8, 24  # of the first counter word of a mask: its layer, and the place within that


def normal(key: Key, index: Tensor, step: Step, shape: Sequence[int]) -> Tensor:
    """Standard normals, float32 (n, *shape) on index.device, by Box and Muller's transform (1958).

    index: int64 (n,) in [0, 2**48), one per sample; checked on a CPU only, since a check elsewhere would wait for the
    device. step: in [0, 2**48), or on the device. shape: of one sample, at most 2**34 elements. |values| <= 6.56.
    The value of element e of row i depends on (key, index[i], step, e) alone, bit for bit.
    """
    check_index(index)
    num_elements = math.prod(shape)
    if -(-num_elements // 4) > WORD + 1:
        raise ValueError(f"shape {tuple(shape)} has {num_elements} elements; at most 2**34 are allowed")
    out = torch.empty((len(index), num_elements), dtype=torch.float32, device=index.device)
    _draws_on(index.device).normal(out, index, key, checked_step(step))
    return out.view(len(index), *shape)


def uniform_int(key: Key, index: Tensor, step: Step, high: int) -> Tensor:
    """Integers in [0, high), int64 (n,) on index.device; index and step as in `normal`.

    high: in [1, 2**32]. The top 32 bits of word * high: the probability of a value is off by less than 2**-32 from
    1 / high, relatively high * 2**-32 (2.3e-7 for a thousand timesteps).
    """
    if not 1 <= high <= 1 << 32:
        raise ValueError(f"high is {high}; it must lie in [1, 2**32]")
    check_index(index)
    word = torch.empty_like(index)
    _draws_on(index.device).first_word(word, index, key, checked_step(step))
    return (word * high >> 32) & WORD


def bernoulli(key: Key, index: Tensor, step: Step, probability: float) -> Tensor:
    """True with `probability`, to a precision of 2**-24: bool (n,) on index.device; index and step as in `normal`."""
    return uniform_int(key, index, step, 1 << 24) < round(probability * (1 << 24))


def coin(key: Key, index: Tensor, step: Step) -> Tensor:
    """Fair coins, bool (n,) on index.device; index and step as in `normal`."""
    return uniform_int(key, index, step, 2) == 1


def places(key: Key, index: Tensor, step: Step) -> Tensor:
    """All that a draw depends on except its layer and element, as a tensor: int64 (5, n) on index.device.

    For compiled code, which would be compiled anew for every Python number that changes with the step. index, step: as
    in `normal`. Rows: the last three words of the counter, then the two of the key.
    """
    check_index(index)
    _, low, low_step, high = counter(index, index, step)
    rows = [low, low_step.expand_as(low), high]
    return torch.stack([*rows, *(torch.full_like(low, word) for word in key)])


def keep_mask(places: Tensor, layer: int, num: int, probability: float) -> Tensor:
    """Dropout's mask: False with `probability`, to a precision of 2**-16; bool (n, num) on places.device.

    layer: in [0, 256), num: at most 2**27. The value of element e depends on (places[:, i], layer, e) alone: it is
    the 16-bit number e % 8 of the four words of counter (layer * 2**24 + e // 8, …).
    """
    counters = mask_counters(layer, num, probability)
    out = torch.empty((places.shape[1], num), dtype=torch.bool, device=places.device)
    _draws_on(places.device).keep_mask(out, places, *counters)
    return out


def mask_counters(layer: int, num: int, probability: float) -> tuple[int, int]:
    """For kernels that draw the bits of `keep_mask` themselves: the layer's first counter, and the signed 16-bit number
    below which an element is dropped. ValueError for what `keep_mask` does not allow."""
    if not (0 <= layer < 1 << _LAYER_BITS and 0 < num <= 8 << _PLACE_BITS):
        raise ValueError(f"layer is {layer} and num is {num}; at most 255 and 2**27 are allowed")
    return layer << _PLACE_BITS, _dropped_of_65536(probability) - (1 << 15)


def keep_share(probability: float) -> float:
    """The exact probability with which `keep_mask` keeps an element: a multiple of 2**-16."""
    return 1.0 - _dropped_of_65536(probability) / (1 << 16)


def _dropped_of_65536(probability: float) -> int:
    return round(probability * (1 << 16))


def permutation(key: Key, epoch: int, n: int) -> Tensor:
    """A permutation of 0 .. n-1, int64 (n,) on the CPU: the order of n keyed 64-bit words.

    epoch: in [0, 2**48). Two words are equal with probability below n**2 / 2**65; they then keep their order.
    """
    high, low, _, _ = words(key, np.arange(n), epoch)
    return torch.argsort(torch.from_numpy(high << 32 | low), stable=True)


@functools.cache
def _draws_on(device: torch.device) -> ModuleType:
    """kernels.py on a GPU on which its draws have the right bits; tensor_draws.py elsewhere, on a GPU with a
    warning."""
    if device.type != "cuda":
        return tensor_draws
    try:
        from ddpm.diffusion import kernels

        index = torch.arange(3, device=device)
        if all(map(torch.equal, _some_draws(kernels, index), _some_draws(tensor_draws, index))):
            return kernels
        why = "they give other bits"
    except Exception as e:  # from Triton, which may be missing, from the compiler that it calls, or from a driver
        why = f"{type(e).__name__}: {e}"
    warnings.warn(f"draws on {device} take hundreds of operations instead of one kernel each: {why}", stacklevel=2)
    return tensor_draws


def _some_draws(draws: ModuleType, index: Tensor) -> list[Tensor]:
    one, shape = Key(0x9E3779B9, WORD), (len(index), 1025)
    normals, masks = torch.empty(shape, device=index.device), torch.empty(shape, device=index.device, dtype=torch.bool)
    first = torch.empty_like(index)
    draws.normal(normals, index, one, 7)
    draws.keep_mask(masks, places(one, index, 7), 5 << _PLACE_BITS, -1000)
    draws.first_word(first, index, one, 7)
    return [normals, masks, first]
