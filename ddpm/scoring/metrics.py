"""Moments of features, which merge, and the Fréchet distance between them.

Owns the arithmetic of the scores, in float64. Must not know: images, extractors, shards, files, or torch.
Heusel et al. 2017, "GANs trained by a two time-scale update rule …" (arXiv:1706.08500), equation 6; Dowson and Landau
1982, "The Fréchet distance between multivariate normal distributions".
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh, lapack

_CHOLESKY_SPREAD = 1e-5
"""Least ratio of smallest to largest diagonal element at which a Cholesky factor is exact enough."""
_EIGENVALUE_SPREAD = 1e-13
"""Least ratio of smallest to largest eigenvalue of the product: the smallest root then has three exact digits, and the
sum far more."""


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
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    return Moments(len(x), mean, x.T @ x)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets. Chan, Golub, LeVeque 1979, "Updating formulae … computing sample variances"."""
    num = a.num + b.num
    delta = b.mean - a.mean
    return Moments(num, a.mean + delta * (b.num / num), a.m2 + b.m2 + np.outer(delta, delta) * (a.num * b.num / num))


def covariance(moments: Moments) -> np.ndarray:
    """The unbiased covariance float64 (d, d), over num - 1 as np.cov does. Raises ValueError below two features."""
    if moments.num < 2:
        raise ValueError(f"a covariance needs at least 2 features, got {moments.num}")
    return moments.m2 / (moments.num - 1)


def root(cov: np.ndarray) -> np.ndarray:
    """L (d, r) with cov = L L': Cholesky's factor if it is well-conditioned, else with the rank that rounding
    leaves."""
    with contextlib.suppress(np.linalg.LinAlgError):
        L = np.linalg.cholesky(cov)
        diagonal = np.diagonal(L)
        if diagonal.min() > _CHOLESKY_SPREAD * diagonal.max():
            return L
    return _root_by_eigenvalues(cov)


def _root_by_eigenvalues(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    kept = values > noise(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def along(m: np.ndarray, L: np.ndarray) -> np.ndarray:
    """L' m L for a symmetric m (d, d) and a `root` L (d, r): only its lower triangle is valid.

    A triangular L, as Cholesky's, takes a quarter of the work (LAPACK's sygst). One of eigenvectors is square too where
    all of them are kept, and not triangular.
    """
    if L.shape == m.shape and not np.triu(L, 1).any():
        reduced, _ = lapack.dsygst(m, L, itype=2, lower=1)
        return np.asarray(reduced)
    return L.T @ m @ L


def noise(values: np.ndarray) -> float:
    """The bound below which an eigenvalue counts as a zero with rounding errors."""
    return len(values) * np.finfo(np.float64).eps * float(values.max(initial=0.0))


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Fréchet distance of two normal distributions: |mean1 - mean2|² + tr(cov1 + cov2 - 2 (cov1 cov2)^½).

    mean (d,), cov (d, d) symmetric and positive semidefinite, of any rank. Returns a number >= 0.

    With cov1 = L L', the eigenvalues of cov1 cov2 are those of the symmetric L' cov2 L, so that no square root of a
    non-symmetric matrix is needed. Where some are near zero, as with fewer images than dimensions, their own roots
    would keep half of the digits: the sum of all roots is then taken as that of the singular values of L' K with
    cov2 = K K', which are exact to rounding.
    """
    L = root(cov2)
    values = np.zeros(1)
    if L.shape == cov2.shape:
        values = eigvalsh(along(cov1, L), driver="evd", overwrite_a=True, check_finite=False)
    if values[0] > _EIGENVALUE_SPREAD * values[-1]:
        trace_of_root = np.sqrt(values).sum()
    else:
        trace_of_root = np.linalg.svd(L.T @ _root_by_eigenvalues(cov1), compute_uv=False).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2.0 * trace_of_root
    return max(float(distance), 0.0)
