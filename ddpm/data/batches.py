"""The batch of a step, from (seed, attempt, step) alone; knows no rank beyond the slice of it that it is asked for."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ddpm.data.packed import PackedImages
from ddpm.diffusion import rng

RESIDENT_SHARE = 8
"""A dataset lies on the GPU where it takes less than this part of its free memory: CIFAR-10's 150 MB do."""


class Resident:
    """A dataset on the device itself: a batch costs the host its indices."""

    def __init__(self, packed: PackedImages, device: torch.device) -> None:
        self._device = device
        self._images = torch.from_numpy(np.array(packed.images)).to(device)  # a mapped file is not writable
        self._labels = torch.from_numpy(np.array(packed.labels)).to(device)

    def take(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (n, H, W, 3) and labels int64 (n,) of those indices, on the device."""
        at = _to(torch.from_numpy(ids), self._device)
        return self._images[at], self._labels[at]


class Mapped:
    """A dataset in the host's memory or on its disk, from which each batch is gathered and sent."""

    def __init__(self, packed: PackedImages, device: torch.device) -> None:
        self._packed, self._device = packed, device

    def take(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As Resident's."""
        images, labels = torch.from_numpy(self._packed.images[ids]), torch.from_numpy(self._packed.labels[ids])
        return _to(images, self._device), _to(labels, self._device)


def _to(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def store(packed: PackedImages, device: torch.device) -> Resident | Mapped:
    """Where batches for `device` are taken from."""
    fits = device.type == "cuda" and packed.images.nbytes < torch.cuda.mem_get_info(device)[0] // RESIDENT_SHARE
    return (Resident if fits else Mapped)(packed, device)


class Batches:
    """The batch of step k as a function of (seed, attempt, k), whatever the ranks, accumulation or restarts.

    The data order is one stream, a keyed permutation per epoch, concatenated; step k takes positions kB … (k+1)B-1.
    """

    def __init__(self, packed: PackedImages, *, seed: int, attempt: int, global_batch: int, flip: bool) -> None:
        self.packed = packed
        self.global_batch = global_batch
        self.flip = flip
        self._order = rng.key(seed, "order", attempt)
        self._flip = rng.key(seed, "flip", attempt)
        self._permutations: dict[int, np.ndarray] = {}
        self._store = functools.cache(functools.partial(store, packed))  # by device

    def sample_ids(self, step: int, first: int, num: int) -> np.ndarray:
        """Dataset indices, int64 (num,), of rows first … first+num-1 of step `step`'s global batch."""
        n = len(self.packed)
        positions = step * self.global_batch + np.arange(first, first + num, dtype=np.int64)
        epochs = positions // n
        self._permutations = {e: order for e, order in self._permutations.items() if e >= epochs[0]}
        for epoch in range(epochs[0], epochs[-1] + 1):  # more than two where a batch is larger than the data
            if epoch not in self._permutations:
                self._permutations[epoch] = rng.permutation(self._order, epoch, n).numpy()
        return np.array([self._permutations[int(e)][p] for e, p in zip(epochs, positions % n, strict=True)], np.int64)

    def rows(self, step: int, first: int, num: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 float32 (num, 3, H, W) in [-1, 1], flipped, and labels int64 (num,), both on `device`."""
        raw, labels = self._store(device).take(self.sample_ids(step, first, num))
        raw = raw.permute(0, 3, 1, 2).contiguous()  # while they are bytes
        if self.flip:
            index = torch.arange(first, first + num, device=device)
            raw = torch.where(rng.coin(self._flip, index, step)[:, None, None, None], raw.flip(3), raw)
        return raw.float().div_(127.5).sub_(1), labels
