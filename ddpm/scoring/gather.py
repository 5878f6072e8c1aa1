"""One pass over features, in the order of their samples, for everything that scores need.

Owns what is kept of them, which does not grow with their number: moments by group and by class, the sums of the
Inception Score, and the features that are compared one with another. At 2048 dimensions 34 MB a group or class and
4 MB to gather rows for each, 82 MB of features: 0.8 GB for a set without classes, 1.2 GB with ten. Results do not
depend on how the features were cut into shards. Must not know files, images or references.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from ddpm.scoring import interval, manifold, metrics
from ddpm.scoring.inception_score import SPLITS, InceptionScore
from ddpm.scoring.metrics import Moments

CLASSES_AT_MOST = 32
"""With more classes there are no scores by class: their moments would not fit in memory."""
_ROWS = 512
"""Features that a group gathers before they become moments: one matrix product for many."""


@dataclass(frozen=True)
class Gathered:
    """What is kept of the features of a set, or of a reference."""

    moments: Moments
    groups: list[Moments]
    """Groups of the jackknife; [] if there are too few samples to leave some out, or none were wanted."""
    classes: list[Moments | None]
    """By label; None for a class with fewer than two samples. [] without classes."""
    chosen: np.ndarray
    """Features float32 (n, d), those of manifold.chosen."""
    inception_score: tuple[float, float] | None


def gather(
    features: Iterable[np.ndarray],
    num: int,
    *,
    labels: np.ndarray | None = None,
    num_classes: int = 0,
    grouped: bool = True,
    classifier: np.ndarray | None = None,
) -> Gathered:
    """Gather features (n, d) that come in parts, `num` rows in all, at least 2.

    labels: int (num,), each sample's class of num_classes. There are no scores by class if one is below 0 (no class) or
        if there are more than CLASSES_AT_MOST classes.
    grouped: whether to keep groups for an interval.
    classifier: (classes, d), for an Inception Score; None: none.
    """
    num_groups = interval.GROUPS if grouped and num >= 2 * interval.GROUPS else 1
    group_of = interval.groups_of(num) if num_groups > 1 else np.zeros(num, dtype=np.int64)
    groups = _Bins(num_groups)
    of_each = labels is not None and num_classes <= CLASSES_AT_MOST and labels.min() >= 0
    classes = _Bins(num_classes if of_each else 0)
    score = InceptionScore(num, classifier) if classifier is not None and num >= SPLITS else None
    wanted, kept, seen = manifold.chosen(num), [], 0
    for part in features:
        these = slice(seen, seen + len(part))
        groups.add(group_of[these], part)
        if classes.moments and labels is not None:
            classes.add(labels[these], part)
        if score:
            score.add(part)
        first, end = np.searchsorted(wanted, [these.start, these.stop])
        kept.append(part[wanted[first:end] - seen].astype(np.float32, copy=False))
        seen += len(part)
    if seen != num:
        raise ValueError(f"{seen} features came of {num}")
    of_groups, of_classes = groups.finished(), classes.finished()
    return Gathered(
        moments=reduce(metrics.merge, (m for m in of_groups if m is not None)),
        groups=[m for m in of_groups if m is not None] if num_groups > 1 else [],
        classes=[m if m is not None and m.num > 1 else None for m in of_classes],
        chosen=np.concatenate(kept),
        inception_score=score.result() if score else None,
    )


class _Bins:
    """Moments by group. Rows are collected until a group has _ROWS of them, or all have come."""

    def __init__(self, num: int) -> None:
        self.moments: list[Moments | None] = [None] * num
        self._waiting: list[list[np.ndarray]] = [[] for _ in range(num)]
        self._num_waiting = np.zeros(num, dtype=np.int64)

    def add(self, group_of: np.ndarray, features: np.ndarray) -> None:
        for group in np.unique(group_of):
            rows = features[group_of == group]
            while len(rows):  # exactly _ROWS at a time, so that rounding does not depend on the parts
                taken = rows[: _ROWS - self._num_waiting[group]]
                rows = rows[len(taken) :]
                self._waiting[group].append(taken)
                self._num_waiting[group] += len(taken)
                if self._num_waiting[group] == _ROWS:
                    self._flush(group)

    def _flush(self, group: int) -> None:
        moments = metrics.from_features(np.concatenate(self._waiting[group]))
        there = self.moments[group]
        self.moments[group] = moments if there is None else metrics.merge(there, moments)
        self._waiting[group], self._num_waiting[group] = [], 0

    def finished(self) -> Sequence[Moments | None]:
        for group in np.flatnonzero(self._num_waiting):
            self._flush(int(group))
        return self.moments
