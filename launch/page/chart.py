"""Curves as SVG: axes, ticks, units, a legend, and what a pointer is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from launch.page.axes import Scale, across, scale
from launch.page.markup import Html, Part, join, tag, text
from launch.page.words import count, short

WIDTH, HEIGHT = 480, 264
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 40
"""Margins, with room for the larger letters that a phone gets."""
MOST_POINTS = 1000
NUM_COLOURS = 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """points: by x. kind: raw (faint) | smooth | dots, which are told of one by one and may have an interval each."""

    name: str
    points: Sequence[Point]
    kind: str = "smooth"
    colour: int = 0
    told: str = ""
    told_of_dots: Sequence[str] = ()
    intervals: Sequence[Point] = field(default=())


def chart(
    title: str, lines: Sequence[Line], *, y: str, log: bool = False, zero: bool = False, until: float = 0
) -> Html:
    """A figure, by step from nought to the last one, or to `until`. log: the y axis is, where all values are positive;
    zero: it begins at nought."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return Html("")
    values = [
        v for line in drawn for v in (*(v for _, v in line.points), *(e for ends in line.intervals for e in ends))
    ]
    log = log and min(values) > 0
    down = scale(values, HEIGHT - BOTTOM, TOP, log=log, zero=zero)
    along = across([0.0, until, *(at for line in drawn for at, _ in line.points)], LEFT, WIDTH - RIGHT)
    axes = _axes(along, down, y + (", log scale" if log else ""))
    inside = [axes, *(_line(line, along, down) for line in drawn)]
    name = f"{title}: {'; '.join(line.told or line.name for line in drawn)}"
    svg = tag("svg", *inside, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name)
    return tag("figure", tag("figcaption", tag("b", title), " ", _legend(drawn)), svg, class_="chart")


def _legend(lines: Sequence[Line]) -> Html:
    if len(lines) < 2:
        return text(lines[0].name)
    return join((tag("span", line.name, class_=f"key {_class(line)}") for line in lines), " ")


def _class(line: Line) -> str:
    return f"{line.kind} c{line.colour % NUM_COLOURS}" + (" second" if line.colour >= NUM_COLOURS else "")


def _axes(along: Scale, down: Scale, y: str) -> Html:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts, up = [], down.ticks()
    as_powers = not down.log and max(map(abs, up), default=0.0) < 0.01
    for value in up:
        at = f"{down(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", short(value, as_power=as_powers), x=LEFT - 6, y=at, dy=".32em", text_anchor="end"))
    for value in along.ticks():
        at, near_end = f"{along(value):.1f}", along(value) > right - 14
        parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(
            tag("text", count(value), x=at, y=bottom + 6, dy=".9em", text_anchor="end" if near_end else "middle")
        )
    parts.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", "step", x=right, y=HEIGHT - 4, text_anchor="end", class_="label"))
    parts.append(tag("text", y, x=2, y=13, class_="label"))
    return join(parts)


def _line(line: Line, along: Scale, down: Scale) -> Html:
    places = [f"{along(at):.1f} {down(value):.1f}" for at, value in line.points]
    told = tag("title", line.told or line.name)
    parts: list[Part] = [tag("path", told, d="M" + "L".join(places))]
    if line.kind == "dots":
        for (at, _), (low, high) in zip(line.points, line.intervals, strict=False):
            parts.append(tag("path", d=f"M{along(at):.1f} {down(low):.1f}V{down(high):.1f}", class_="interval"))
        words = line.told_of_dots or [line.name] * len(places)
        for place, word in zip(places, words, strict=True):
            cx, cy = place.split()
            parts.append(tag("circle", tag("title", word), cx=cx, cy=cy, r=3.2))
    return tag("g", *parts, class_=_class(line))


# ---------------------------------------------------------------- fewer points


def finite(points: Iterable[Point], *, positive: bool = False) -> list[Point]:
    return [(at, value) for at, value in points if math.isfinite(value) and (value > 0 or not positive)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of the points: the least and the greatest of each stretch, and the last one."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / ((most - 1) // 2))
    kept = []
    for begin in range(0, len(points), size):
        part = range(begin, min(begin + size, len(points)))
        ends = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each value's mean with its neighbours, of one hundredth of all on either side; none at the beginning, where a
    loss falls too fast for that."""
    reach = len(points) // 100
    if len(points) >= 20:
        reach = max(reach, 1)
    sums = [0.0, *accumulate(value for _, value in points)]
    found = []
    for i, (at, _) in enumerate(points):
        first, last = max(0, i - reach), min(i + min(reach, i), len(points) - 1)
        found.append((at, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return found
