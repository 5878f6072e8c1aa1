"""Axes: from values to positions in a drawing, and their ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` lie from `start` to `end` on paper."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= about + 2:
                    break
            if len(found) >= 2:
                return found[:: math.ceil(len(found) / (about + 2))]
        step = nice((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(step: float) -> float:
    """The next of 1, 2, 5, 10, … times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(d * power for d in (1, 2, 5, 10) if d * power >= step * (1 - 1e-9))


def scale(values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> Scale:
    """An axis on which all `values` find room; zero: from nought. log takes positive values alone."""
    low, high = _ends(values)
    if log:
        low, high = (low, high) if high > 1.2 * low else (low / 1.2, high * 1.2)
        room = 10 ** (0.03 * (math.log10(high) - math.log10(low)))
        return Scale(low / room, high * room, start, end, log=True)
    if zero and low >= 0:
        low = 0.0
    if high == low:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    room = 0.04 * (high - low)
    return Scale(low - (room if low else 0.0), high + room, start, end)


def across(values: Iterable[float], start: float, end: float) -> Scale:
    """The same without room at its ends: for steps."""
    low, high = _ends(values)
    return Scale(low, high if high > low else low + 1, start, end)


def _ends(values: Iterable[float]) -> tuple[float, float]:
    all_of_them = list(values)
    return min(all_of_them), max(all_of_them)
