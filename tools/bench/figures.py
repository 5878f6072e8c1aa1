"""What a row of the bench says: figures with goals and limits, and how they are shown.

A ratio is that of pairs: both works one after the other, again and again; its median, and the 95 % interval of that
median that order statistics give (any distribution; at least six pairs).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    at_least: float | None = None
    """The goal, or …"""
    at_most: float | None = None
    limit: float | None = None
    """What the hardware allows."""

    @property
    def missed(self) -> bool:
        too_low = self.at_least is not None and not self.value >= self.at_least
        return too_low or (self.at_most is not None and not self.value <= self.at_most)

    @property
    def goal(self) -> str:
        goals = [(">=", self.at_least), ("<=", self.at_most)]
        return " ".join(f"{sign} {short(value)}" for sign, value in goals if value is not None)


@dataclass
class Result:
    """notes: what could not be measured, and why. details: for the JSON alone."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(note.startswith("failed") for note in self.notes)

    def as_record(self) -> dict[str, Any]:
        figures = {f.name: {k: v for k, v in asdict(f).items() if k != "name" and v not in (None, "")}
                   for f in self.figures}  # fmt: skip
        return {"figures": figures, "notes": self.notes, "details": self.details}


def ratio(name: str, above: Sequence[float], below: Sequence[float], **more: Any) -> Figure:
    """above / below, pair by pair."""
    values = sorted(a / b for a, b in zip(above, below, strict=True))
    low, high = interval(values)
    return Figure(name, statistics.median(values), "x", low, high, **more)


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """An interval for the median, of at least 95 %; None below six values."""
    n, outside, k = len(values), 0.0, 0
    while k < n // 2 and (outside := outside + math.comb(n, k) * 0.5 ** (n - 1)) <= 0.05:
        k += 1
    ordered = sorted(values)
    return (ordered[k - 1], ordered[n - k]) if k else (None, None)


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def lines(row: str, result: Result, before: dict[str, Any] | None) -> list[str]:
    """The row's part of the table. before: the figures of the row in an earlier JSON."""
    out = []
    for f in result.figures:
        spread = f"{short(f.low)}..{short(f.high)}" if f.low is not None and f.high is not None else ""
        verdict = "" if not f.goal else "MISSED" if f.missed else "ok"
        limit = "" if f.limit is None else short(f.limit)
        cells = f"{short(f.value) + ' ' + f.unit:>18}{spread:>16}{f.goal:>12}{limit:>10}  {verdict}"
        was = (before or {}).get(f.name, {}).get("value")
        out.append(f"{f.name:52}{cells}" + (f"  (before {short(was)}, now {f.value / was:.2f}x)" if was else ""))
    return [f"-- {row}", *out, *(f"   {note}" for note in result.notes)]


HEAD = f"{'':52}{'figure':>18}{'95 %':>16}{'goal':>12}{'limit':>10}"
