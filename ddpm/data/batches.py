"""The batch of a step, from (seed, attempt, step) alone; knows no rank beyond the slice of it that it is asked for."""

from __future__ import annotations

import numpy as np
import torch

from ddpm.data.packed import PackedImages
from ddpm.diffusion import rng


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
        ids = self.sample_ids(step, first, num)
        raw = torch.from_numpy(self.packed.images[ids])
        if device.type == "cuda":
            raw = raw.pin_memory()
        x = raw.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.flip:
            index = torch.arange(first, first + num, device=device)
            x = torch.where(rng.coin(self._flip, index, step)[:, None, None, None], x.flip(3), x)
        return x.contiguous(), torch.from_numpy(self.packed.labels[ids]).to(device, non_blocking=True)
