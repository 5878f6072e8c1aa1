"""The kernel distance between features: with Inception's, the Kernel Inception Distance (KID).

Bińkowski, Sutherland, Arbel, Gretton 2018, "Demystifying MMD GANs" (arXiv:1801.01401), section 4: the unbiased
estimate of the squared maximum mean discrepancy with the kernel (x'y / d + 1)³, averaged over random subsets. The same
subsets as torch-fidelity's. Must not know where features come from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SUBSETS, SUBSET_SIZE = 100, 1000
SEED = 2020


class KernelDistance(NamedTuple):
    mean: float
    """Around 0 for the same distribution, so slightly negative at times."""
    std: float | None
    """Of the subsets' distances, not of the mean; None where the only subset is all there is."""
    subset_size: int


def kernel_distance(x: np.ndarray, y: np.ndarray) -> KernelDistance:
    """Of features x (n, d) and y (m, d), n and m at least 2. Subsets are of 1,000, or of all where there are fewer."""
    size = min(SUBSET_SIZE, len(x), len(y))
    whole = size == len(x) == len(y)
    draws = np.random.RandomState(SEED)
    distances = []
    for _ in range(1 if whole else SUBSETS):
        of_x, of_y = (z[draws.choice(len(z), size, replace=False)].astype(np.float64) for z in (x, y))
        distances.append(_squared_discrepancy(of_x, of_y))
    return KernelDistance(float(np.mean(distances)), None if whole else float(np.std(distances)), size)


def _squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """MMD², unbiased; equation 4 of Gretton et al. 2012, "A kernel two-sample test", equation 3."""
    num = len(x)
    within = sum(float(k.sum() - np.trace(k)) for k in (_kernel(x, x), _kernel(y, y)))
    return within / (num * (num - 1)) - 2.0 * float(_kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = x @ y.T / x.shape[1] + 1.0
    return k * k * k
