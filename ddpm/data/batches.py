"""The batch of a step, from (seed, attempt, step) alone; knows no rank beyond the slice of it that it is asked for."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ddpm.data.packed import PackedImages
from ddpm.diffusion import rng
from ddpm.diffusion.philox import Step

RESIDENT_SHARE = 8
"""A dataset lies on the GPU where it takes less than this part of its free memory: CIFAR-10's 150 MB do."""
PIECE_IMAGES = 1024
"""Number of images that are brought there at a time."""


Parts = tuple[torch.Tensor, ...]
"""What a batch costs to send to its device; a slice of each makes a slice of the batch."""


class Resident:
    """A dataset on the device itself: a batch costs the host its indices."""

    def __init__(self, packed: PackedImages, device: torch.device) -> None:
        images = packed.images
        self._images = torch.empty(images.shape, dtype=torch.uint8, device=device)
        for first in range(0, len(images), PIECE_IMAGES):  # every rank of a node does so: a whole copy would not fit
            piece = slice(first, first + PIECE_IMAGES)
            self._images[piece] = torch.from_numpy(np.array(images[piece]))  # a mapped file is not writable
        self._labels = torch.from_numpy(np.array(packed.labels)).to(device)

    def parts(self, ids: np.ndarray) -> Parts:
        """What `take` needs of those indices, on the host."""
        return (torch.from_numpy(ids),)

    def take(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (n, H, W, 3) and labels int64 (n,), of parts that were brought to the device."""
        return self._images[parts[0]], self._labels[parts[0]]


class Mapped:
    """A dataset in the host's memory or on its disk, from which each batch is gathered and sent."""

    def __init__(self, packed: PackedImages) -> None:
        self._packed = packed

    def parts(self, ids: np.ndarray) -> Parts:
        """As Resident's."""
        return torch.from_numpy(self._packed.images[ids]), torch.from_numpy(self._packed.labels[ids])

    def take(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """As Resident's."""
        images, labels = parts
        return images, labels


def store(packed: PackedImages, device: torch.device) -> Resident | Mapped:
    """Where batches for `device` are taken from."""
    if device.type != "cuda":
        return Mapped(packed)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, of steps rolled back
    fits = packed.images.nbytes < (torch.cuda.mem_get_info(device)[0] + kept) // RESIDENT_SHARE
    return Resident(packed, device) if fits else Mapped(packed)


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
        n, begin = len(self.packed), step * self.global_batch + first
        epochs = range(begin // n, (begin + num - 1) // n + 1)  # more than two where a batch is larger than the data
        self._permutations = {e: order for e, order in self._permutations.items() if e >= epochs[0]}
        for epoch in epochs:
            if epoch not in self._permutations:
                self._permutations[epoch] = rng.permutation(self._order, epoch, n).numpy()
        orders = [self._permutations[e][max(begin - e * n, 0) : begin + num - e * n] for e in epochs]
        return np.concatenate(orders)

    def parts(self, step: int, first: int, num: int, device: torch.device) -> Parts:
        """What `images` needs of rows first … first+num-1 of step `step`, on the host."""
        device = torch.empty(0, device=device).device  # with its number, if none was given: to have one store
        return self._store(device).parts(self.sample_ids(step, first, num))

    def images(self, parts: Parts, step: Step, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 float32 (n, 3, H, W) in [-1, 1], flipped, and labels int64 (n,), of parts brought to index's device.

        index: int64 (n,), the rows' places in the global batch.
        """
        raw, labels = self._store(index.device).take(parts)
        planes = _planes(raw, rng.coin(self._flip, index, step) if self.flip else None)  # while they are bytes
        return planes.float().div_(127.5).sub_(1), labels

    def rows(self, step: int, first: int, num: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 and labels of rows first … first+num-1 of step `step`, as `images` gives them."""
        index = torch.arange(first, first + num, device=device)
        return self.images(sent(self.parts(step, first, num, device), device), step, index)


def _planes(images: torch.Tensor, flips: torch.Tensor | None) -> torch.Tensor:
    """uint8 (n, H, W, C) -> (n, C, H, W), those of `flips` mirrored: on a CPU in the same copy."""
    planes = images.permute(0, 3, 1, 2)
    if flips is None:
        return planes.contiguous()
    if images.is_cuda:
        planes = planes.contiguous()
        return torch.where(flips[:, None, None, None], planes.flip(3), planes)
    ways, out = (planes.numpy(), planes.numpy()[..., ::-1]), np.empty(planes.shape, np.uint8)
    for i, flip in enumerate(flips.tolist()):
        out[i] = ways[flip][i]
    return torch.from_numpy(out)


class Ring:
    """Pinned memory that a GPU copies from, in turns: three of them, as no more than two steps are under way."""

    def __init__(self) -> None:
        self._slots: list[tuple[Parts, torch.cuda.Event]] = []
        self._next = 0

    def pinned(self, parts: Parts) -> Parts:
        """A copy of parts, of the same shapes at each call; waits for the use of what the third call before gave."""
        if len(self._slots) < 3:
            self._slots.append((tuple(part.pin_memory() for part in parts), torch.cuda.Event()))
            self._next = len(self._slots)
            return self._slots[-1][0]
        slot, used = self._slots[self._next % 3]
        self._next += 1
        used.synchronize()
        for its, part in zip(slot, parts, strict=True):
            its.copy_(part)
        return slot

    def used(self) -> None:
        """What the last call gave is on its way."""
        self._slots[(self._next - 1) % 3][1].record()


def sent(parts: Parts, device: torch.device) -> Parts:
    """On their way to the device; nothing waits for them."""
    return tuple(part.to(device, non_blocking=True) for part in parts)
