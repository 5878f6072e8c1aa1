"""Separate scores of fidelity and variety, by nearest neighbours among features.

Precision and recall: Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models"
(arXiv:1904.06991), k = 3, equal to torch-fidelity's. Density and coverage: Naeem et al. 2020, "Reliable fidelity and
diversity metrics for generative models" (arXiv:2002.09797), k = 5, equal to prdc's. A ball reaches to the k-th
neighbour of its centre; that its edge belongs to it in the first pair and not in the second is theirs.

Distances cost their number squared, so at most MOST features of each side are compared, chosen at random: 1.2e12
operations at 2048 dimensions, where 50,000 would take 25 times as many. Memory: both sides in float64 and a block of
distances, 400 MB. Must not know where features come from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

K_PRECISION, K_DENSITY = 3, 5
MOST = 10_000
SEED = 2020
_BLOCK = 1024


class Manifold(NamedTuple):
    precision: float
    """Share of samples within a reference's ball."""
    recall: float
    """Share of references within a sample's ball."""
    density: float
    """Number of references' balls that contain a sample, on average, divided by k; may exceed 1."""
    coverage: float
    """Share of references with a sample in their ball."""


def chosen(num: int) -> np.ndarray:
    """Indices of the features that are compared: all of `num`, or MOST of them, ascending."""
    if num <= MOST:
        return np.arange(num)
    return np.sort(np.random.RandomState(SEED).permutation(num)[:MOST])


def manifold_scores(samples: np.ndarray, reference: np.ndarray) -> Manifold | None:
    """The scores of features samples (n, d) against reference (m, d); None if a side has no fifth neighbour."""
    if min(len(samples), len(reference)) <= K_DENSITY:
        return None
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    x_radii, y_radii = _squared_radii(x), _squared_radii(y)
    precise = balls = 0
    recalled = np.zeros(len(y), dtype=bool)
    nearest = np.full(len(y), np.inf)
    for first in range(0, len(x), _BLOCK):
        squared = _squared_distances(x[first : first + _BLOCK], y)
        precise += int((squared <= y_radii[K_PRECISION]).any(axis=1).sum())
        balls += int((squared < y_radii[K_DENSITY]).sum())
        recalled |= (squared <= x_radii[K_PRECISION][first : first + _BLOCK, None]).any(axis=0)
        np.minimum(nearest, squared.min(axis=0), out=nearest)
    return Manifold(
        precision=precise / len(x),
        recall=float(recalled.mean()),
        density=balls / (K_DENSITY * len(x)),
        coverage=float((nearest < y_radii[K_DENSITY]).mean()),
    )


def _squared_radii(x: np.ndarray) -> dict[int, np.ndarray]:
    """k -> squared distance (n,) of each feature to its k-th neighbour."""
    radii = {k: np.empty(len(x)) for k in (K_PRECISION, K_DENSITY)}
    for first in range(0, len(x), _BLOCK):
        squared = _squared_distances(x[first : first + _BLOCK], x)
        rows = np.arange(len(squared))
        squared[rows, first + rows] = -1.0  # itself, before any other that lies on it
        squared.partition(list(radii), axis=1)
        for k, of in radii.items():
            of[first : first + _BLOCK] = squared[:, k]
    return radii


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = x @ y.T
    squared *= -2.0
    squared += np.square(x).sum(axis=1)[:, None]
    squared += np.square(y).sum(axis=1)
    return squared.clip(min=0.0, out=squared)
