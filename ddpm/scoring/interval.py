"""The uncertainty of a Fréchet distance: an interval for its expectation at this number of samples, and its limit.

A sample's Fréchet distance is biased by about a constant over the number of samples (Chong and Forsyth 2020,
"Effectively unbiased FID and Inception Score and where to find them", arXiv:1911.07023), and a bootstrap doubles that
bias. So the samples are dealt into groups once, and each group left out in turn: the delete-group jackknife (Efron and
Stein 1981, "The jackknife estimate of variance"; Kott 2001, "The delete-a-group jackknife"). Its variance is, if
anything, too large. The reference is taken as it is. Must not know files, images or extractors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from ddpm.scoring import metrics
from ddpm.scoring.metrics import Moments

GROUPS = 20
"""More groups cost time and memory, fewer widen the interval: Student's factor is 2.09 here, 1.96 at best."""
SEED = 2020
LEVEL = 0.95


class Trust(NamedTuple):
    """The uncertainty of a distance."""

    half_width: float
    """Half width of the 95 % interval around it, for its expectation at this number of samples."""
    shift: float
    """What the extrapolation to infinitely many samples adds to the distance; mostly negative."""


def groups_of(num: int) -> np.ndarray:
    """The group of each of `num` samples, int64 (num,): dealt at random, as samples may be in the order of classes.

    RandomState's draws are frozen by numpy's policy: the same on every machine and in every version.
    """
    dealt = np.empty(num, dtype=np.int64)
    dealt[np.random.RandomState(SEED).permutation(num)] = np.arange(num) % GROUPS
    return dealt


def trust(groups: Sequence[Moments], mean: np.ndarray, cov: np.ndarray) -> Trust:
    """The uncertainty of the distance of all `groups` together to the normal distribution with `mean` (d,), `cov` (d,
    d).

    The extrapolation is Chong and Forsyth's line in 1 / num, through the distance of all samples and the average of
    those that leave a group out: of the lines that these moments allow it is the one with the least noise (measured by
    tools/bench/interval.py against lines through growing parts).
    """
    everything = reduce(metrics.merge, groups)
    L = _among(everything, metrics.root(cov))
    total = _projected(everything, L)
    parts = [_projected(group, L) for group in groups]
    distance = _distance(total, mean, cov, L)
    without = np.array([_distance(_leaving_out(total, part), mean, cov, L) for part in parts])
    num = len(groups)
    variance = (num - 1) / num * np.square(without - without.mean()).sum()
    quantile = float(stdtrit(num - 1, 0.5 + LEVEL / 2))
    return Trust(quantile * float(np.sqrt(variance)), (num - 1) * (distance - float(without.mean())))


def _among(everything: Moments, L: np.ndarray) -> np.ndarray:
    """L, or where samples are few what counts of it: the directions in which some of them differ.

    No group differs in another one, and eigenvalues of 400 dimensions take a hundredth of the time of those of 2048.
    """
    if 2 * everything.num > L.shape[1]:
        return L
    values, vectors = np.linalg.eigh(metrics.along(everything.m2, L))
    return L @ vectors[:, values > metrics.noise(values)]


class _Projected(NamedTuple):
    """Moments of which only the trace and L' m2 L are kept: leaving groups out is then subtraction."""

    num: int
    mean: np.ndarray
    along: np.ndarray
    """L' mean."""
    trace: float
    m2: np.ndarray
    """L' m2 L, its lower triangle."""


def _projected(moments: Moments, L: np.ndarray) -> _Projected:
    m2 = metrics.along(moments.m2, L)
    return _Projected(moments.num, moments.mean, L.T @ moments.mean, float(np.trace(moments.m2)), m2)


def _leaving_out(total: _Projected, part: _Projected) -> _Projected:
    num = total.num - part.num
    share = part.num * total.num / num

    def rest(of_all: np.ndarray, of_part: np.ndarray) -> np.ndarray:
        return of_all + (of_all - of_part) * (part.num / num)

    delta, along = part.mean - total.mean, part.along - total.along
    m2 = total.m2 - part.m2 - share * np.outer(along, along)
    trace = total.trace - part.trace - share * float(delta @ delta)
    return _Projected(num, rest(total.mean, part.mean), rest(total.along, part.along), trace, m2)


def _distance(of: _Projected, mean: np.ndarray, cov: np.ndarray, L: np.ndarray) -> float:
    """metrics.frechet_distance, up to the last digits if covariances are singular."""
    values = np.linalg.eigvalsh(of.m2 / (of.num - 1))
    trace_of_root = np.sqrt(values[values > metrics.noise(values)]).sum()
    traces = of.trace / (of.num - 1) + np.trace(cov)
    return float(np.square(of.mean - mean).sum() + traces - 2.0 * trace_of_root)
