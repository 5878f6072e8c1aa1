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
_BLOCK = 1024


class KernelDistance(NamedTuple):
    mean: float
    """Around 0 for equal distributions, so that it may be slightly negative."""
    std: float | None
    """Of the subsets' distances, not of the mean; None where the only subset is all there is."""
    subset_size: int


def kernel_distance(x: np.ndarray, y: np.ndarray) -> KernelDistance:
    """The kernel distance of features x (n, d) and y (m, d), n and m at least 2.

    A subset has SUBSET_SIZE features, or as many as the smaller set has. The kernel of each pair is computed
    once, for all subsets that have both: they overlap unless n is far above 10,000.
    """
    size = min(SUBSET_SIZE, len(x), len(y))
    whole = size == len(x) == len(y)
    of_x, of_y = (np.zeros((len(z), 1 if whole else SUBSETS)) for z in (x, y))
    draws = np.random.RandomState(SEED)
    for subset in range(of_x.shape[1]):
        for of in (of_x, of_y):
            of[draws.choice(len(of), size, replace=False), subset] = 1.0
    x, y = x.astype(np.float64), y.astype(np.float64)
    # MMD², unbiased; equation 4 of Gretton et al. 2012, "A kernel two-sample test", equation 3
    within = (_others(x, of_x) + _others(y, of_y)) / (size * (size - 1))
    distances = within - 2.0 * _sums(x, of_x, y, of_y) / size**2
    return KernelDistance(float(distances.mean()), None if whole else float(distances.std()), size)


def _sums(x: np.ndarray, of_x: np.ndarray, y: np.ndarray, of_y: np.ndarray) -> np.ndarray:
    """For each subset, the sum of the kernel over its pairs. of_x (n, subsets): 1 where it has that feature, else 0."""
    total = np.zeros(of_x.shape[1])
    for first in range(0, len(x), _BLOCK):
        rows = slice(first, first + _BLOCK)
        k = x[rows] @ y.T / x.shape[1] + 1.0
        total += np.einsum("ns,ns->s", of_x[rows], (k * k * k) @ of_y)
    return total


def _others(x: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The same of x with itself, without the pairs of a feature with itself. Those of two blocks are there twice."""
    total = np.zeros(of.shape[1])
    for first in range(0, len(x), _BLOCK):
        rows, rest = slice(first, first + _BLOCK), slice(first + _BLOCK, None)
        total += _sums(x[rows], of[rows], x[rows], of[rows]) + 2.0 * _sums(x[rows], of[rows], x[rest], of[rest])
    return total - (np.square(x).sum(axis=1) / x.shape[1] + 1.0) ** 3 @ of
