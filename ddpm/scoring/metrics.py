"""Features to scores: moments that merge, and the Fréchet distance between them.

Owns the arithmetic of the scores, in float64. Must not know: images, extractors, shards, files, or torch.
Heusel et al. 2017, "GANs trained by a two time-scale update rule …" (arXiv:1706.08500), equation 6; Dowson and Landau
1982, "The Fréchet distance between multivariate normal distributions".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Count, mean float64 (d,) and second central sum m2 = Σ (x - mean)(x - mean)' float64 (d, d) of features.

    Central sums rather than raw ones: merging loses 4e-15 instead of 1e-13, and nothing cancels where |mean| >> std.
    """

    num: int
    mean: np.ndarray
    m2: np.ndarray


def from_features(features: np.ndarray) -> Moments:
    """Moments of features (n, d), n >= 1, of any float type; the sums are float64."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features have shape {features.shape}; expected (n, d) with n >= 1")
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    return Moments(len(x), mean, x.T @ x)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets. Chan, Golub, LeVeque 1979, "Updating formulae … computing sample variances"."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.shape[0]} and of {b.mean.shape[0]} dimensions cannot be merged")
    num = a.num + b.num
    delta = b.mean - a.mean
    return Moments(num, a.mean + delta * (b.num / num), a.m2 + b.m2 + np.outer(delta, delta) * (a.num * b.num / num))


def covariance(moments: Moments) -> np.ndarray:
    """The unbiased covariance float64 (d, d), over num - 1 as np.cov does. Raises ValueError below two features."""
    if moments.num < 2:
        raise ValueError(f"a covariance needs at least 2 features, got {moments.num}")
    return moments.m2 / (moments.num - 1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Fréchet distance of two normal distributions: |mean1 - mean2|² + tr(cov1 + cov2 - 2 (cov1 cov2)^½).

    mean (d,), cov (d, d) symmetric and positive semidefinite, of any rank. Returns a number >= 0.

    With cov1 = L L', the eigenvalues of cov1 cov2 are those of the symmetric L' cov2 L, so that no square root of a
    non-symmetric matrix is needed. Where there are fewer images than dimensions both covariances are singular: rounding
    then makes some eigenvalues slightly negative, and they count as the zeros they are (relative error about 1e-8).
    """
    values, vectors = np.linalg.eigh(cov1)
    L = vectors * np.sqrt(values.clip(min=0.0))
    trace_of_root = np.sqrt(np.linalg.eigvalsh(L.T @ cov2 @ L).clip(min=0.0)).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2.0 * trace_of_root
    return max(float(distance), 0.0)
