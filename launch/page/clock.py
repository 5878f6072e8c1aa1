"""A time axis on which long breaks, in which nobody worked, are cut short."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

LONGEST_BREAK = 0.1
"""Longest break that is drawn, as a part of the time in which something was going on; a longer one is cut."""
CUT_TO = 0.03
STEPS_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800, 2592000)

Span = tuple[float, float]


@dataclass(frozen=True)
class Clock:
    """pieces: stretches of time without the breaks; starts: where each begins, as a share of the whole."""

    pieces: tuple[Span, ...]
    starts: tuple[float, ...]
    per_s: float

    def __call__(self, unix: float) -> float:
        """Where it lies, from 0 to 1; in a break, at its beginning."""
        place = 0.0
        for (begin, end), start in zip(self.pieces, self.starts, strict=True):
            if unix >= begin:
                place = start + (min(unix, end) - begin) * self.per_s
        return place

    def breaks(self) -> list[tuple[float, float]]:
        """Where each was cut, and how many seconds it took."""
        pairs = zip(self.pieces, self.pieces[1:], self.starts[1:], strict=False)
        return [(start - CUT_TO / self._whole() / 2, after[0] - before[1]) for before, after, start in pairs]

    def _whole(self) -> float:
        return 1 + CUT_TO * (len(self.pieces) - 1)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """Round times with what to call each: the day, where it is another than the last one's."""
        shown_s = 1 / self.per_s / about
        step = next((s for s in STEPS_S if s >= shown_s), STEPS_S[-1])
        found, day = [], ""
        for begin, end in self.pieces:
            first = -(-begin // step) * step
            for i in range(int((end - first) // step) + 1):
                at = datetime.fromtimestamp(first + i * step, timezone.utc)
                today = at.strftime("%d %b").lstrip("0")
                time = "" if step >= 86400 else at.strftime("%H:%M" if step >= 60 else "%H:%M:%S")
                found.append((self(at.timestamp()), " ".join(filter(None, ["" if today == day else today, time]))))
                day = today
        return found


def clock(spans: Iterable[Span]) -> Clock:
    """The clock of the times in which something was going on: at least one span, none of them empty."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    busy = sum(end - begin for begin, end in merged)
    pieces = merged[:1]
    for begin, end in merged[1:]:
        if begin - pieces[-1][1] <= LONGEST_BREAK * busy:
            pieces[-1] = pieces[-1][0], end
        else:
            pieces.append((begin, end))
    shown = sum(end - begin for begin, end in pieces)
    whole = 1 + CUT_TO * (len(pieces) - 1)
    starts, done = [], 0.0
    for begin, end in pieces:
        starts.append(done)
        done += ((end - begin) / shown + CUT_TO) / whole
    return Clock(tuple(pieces), tuple(starts), 1 / (shown * whole))
