"""Compares scores: whether two of them are comparable, and their difference. Loads nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddpm.errors import RequestError
from ddpm.scoring.record import SCORE_NAMES, half_width, key_of


class Difference(NamedTuple):
    value: float
    """Second score minus first: negative if the second is better."""
    half_width: float | None
    """Half width of its 95 % interval; None if one of the scores has no interval."""

    @property
    def means_something(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half_width is not None and abs(self.value) > self.half_width


def check_comparable(scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise RequestError if two of the scores (by name) have other features or another reference."""
    (first, a), *others = scores.items()
    for name, b in others:
        for what, of_a, of_b in (
            ("score", SCORE_NAMES[key_of(a)], SCORE_NAMES[key_of(b)]),
            ("extractor", a["extractor"], b["extractor"]),
            ("reference", a["reference"].get("digest"), b["reference"].get("digest")),
        ):
            if of_a != of_b:
                raise RequestError(
                    f"{first} and {name} cannot be compared: their {what} differs ({_shown(a, what)}, and "
                    f"{_shown(b, what)}); score both alike, with --reference and --extractor"
                )


def _shown(record: Mapping[str, Any], what: str) -> str:
    if what == "score":
        return SCORE_NAMES[key_of(record)]
    of, key = record[what], "weights_sha256" if what == "extractor" else "digest"
    return " ".join(filter(None, [of["name"], of.get("split"), str(of.get(key) or "")[:12]]))


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """The difference of two comparable scores. Their samples are assumed to be independent; with equal seeds they are
    not, and the true interval is narrower."""
    halves = [half_width(a), half_width(b)]
    value = float(b[key_of(b)]) - float(a[key_of(a)])
    return Difference(value, None if None in halves else math.hypot(*(h for h in halves if h is not None)))
