"""The page of several runs: how they differ, and their results."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ddpm.config.reading import as_typed
from ddpm.errors import RequestError
from ddpm.scoring.compare import check_comparable
from ddpm.scoring.record import SCORE_NAMES, key_of
from launch.page import curves, pictures, scores
from launch.page.chart import Line, chart
from launch.page.facts import Facts
from launch.page.markup import Column, Html, Part, document, join, note, section, table, tag
from launch.page.page import foot, shown
from launch.page.style import STYLE
from launch.page.words import digits
from launch.terminal import side_by_side

MOST_DRAWN = 16
"""Runs in a chart."""
MOST_BESIDE = 4
"""Keys that stand in the table of runs."""
Row = dict[str, Any]
FALL = 0.02
"""Part of the steps that is left out at the beginning: a loss falls so far there that later differences vanish."""


def of_runs(every: Sequence[Facts], page: Path) -> str:
    """The whole page. page: where it will lie, for its links."""
    of = {str(facts.run.path): facts for facts in every}
    rows = side_by_side.rows([facts.run for facts in every])
    ordered = [of[row["path"]] for row in rows]
    drawn = ordered[:MOST_DRAWN]
    left_out = note(f"{len(ordered) - len(drawn)} more runs are not drawn.") if len(ordered) > len(drawn) else Html("")
    title = f"{len(ordered)} runs side by side"
    names = ", ".join(facts.run.name for facts in ordered[:8]) + (", …" if ordered[8:] else "")
    parts = [
        tag("h1", title),
        tag("p", names, class_="lead"),
        section("What differs, and what came of it", shown(_table, rows, of, page)),
        section("Curves", shown(_charts, drawn), left_out),
        section("Samples of the last step", shown(_grids, drawn), left_out),
        foot(max(facts.made for facts in ordered), str(ordered[0].run.path.parent)),
    ]
    return document(title, *parts, style=STYLE)


def _table(rows: Sequence[Row], of: Mapping[str, Facts], page: Path) -> Html:
    """A row for each run; what differs in more keys than have room there is a table of its own, a row for each key."""
    keys = list(dict.fromkeys(key for row in rows for key in row["differs"]))
    values = {key: [as_typed(row["differs"][key]) if row["differs"] else "" for row in rows] for key in keys}
    beside = keys if len(keys) <= MOST_BESIDE else []
    columns = [Column("run"), *(Column(tag("code", key), True) for key in beside), Column("state")]
    columns += [
        Column("step", True),
        Column(side_by_side.LOSS, True),
        Column("score"),
        Column("of", wraps=True),
        Column("goodput", True),
    ]
    cells: list[list[Part]] = []
    for i, row in enumerate(rows):
        facts, score = of[row["path"]], row["score"] or {"number": "", "of": ""}
        good, loss = facts.row["goodput"], row["loss"]
        cells.append([
            _link(facts, page), *(values[key][i] for key in beside), facts.row["state"], f"{facts.row['step']:,}",
            "" if loss is None else digits(loss), _number(facts, row), score["of"],
            "" if good is None else f"{good:.1%}",
        ])  # fmt: skip
    told = "" if keys else "Their configs do not differ. "
    told += f"{side_by_side.LOSS.capitalize()}: {side_by_side.which_loss(rows)}."
    told += f" {which[0].upper()}{which[1:]}." if (which := side_by_side.which_code(rows)) else ""
    parts: list[Part] = [table(columns, cells), note(told), _incomparable(rows, of)]
    if len(beside) < len(keys):
        names = [Column("key"), *(Column(of[row["path"]].run.name, True) for row in rows)]
        parts.append(table(names, [[tag("code", key), *values[key]] for key in keys]))
    return join(parts)


def _record(facts: Facts, row: Row) -> Mapping[str, Any] | None:
    """The record of the row's score."""
    name = row["score"]["set"] if row["score"] else None
    return next((score.record for score in facts.scores if score.name == name), None)


def _number(facts: Facts, row: Row) -> str:
    """The score and half of its interval."""
    record = _record(facts, row)
    return f"{SCORE_NAMES[key_of(record)]} {scores.value(record)}" if record is not None else ""


def _incomparable(rows: Sequence[Row], of: Mapping[str, Facts]) -> Html:
    """Where the scores in the table were not taken alike."""
    records = {row["name"]: record for row in rows if (record := _record(of[row["path"]], row)) is not None}
    try:
        if len(records) > 1:
            check_comparable(records)
    except RequestError as e:
        return note(f"Not all of these scores may be compared: {e}.")
    return Html("")


def _link(facts: Facts, page: Path) -> Part:
    """The run's name, and where it has a page of its own the way there."""
    if not facts.run.report.is_file():
        return facts.run.name
    way = os.path.relpath(facts.run.report.resolve(), page.resolve().parent)
    return tag("a", facts.run.name, href=quote(way))


def _charts(every: Sequence[Facts]) -> Html:
    last = max((facts.metrics[-1]["step"] for facts in every if facts.metrics), default=0)
    parts = [scores.by_step_chart(series, of, last) for series, of in _by_step(every)]
    for key, title in (("loss", "Loss"), ("grad_norm", "Norm of the gradient")):
        running = [
            curves.smooth_line(facts.metrics, key, facts.run.name, i, since=FALL * last)
            for i, facts in enumerate(every)
        ]
        parts.append(chart(f"{title}, running mean", running, y=title.lower(), log=True))
    if not any(parts):
        return note("None of them has metrics.")
    told = note(f"Loss and norm from step {FALL * last:,.0f} on.")
    return join([tag("div", *parts, class_="charts"), told])


def _by_step(every: Sequence[Facts], most: int = 2) -> list[tuple[scores.Series, list[Line]]]:
    """Series of scores that several of the runs have, a line each: first those that most of them have."""
    found: dict[scores.Series, list[Line]] = {}
    for i, facts in enumerate(every):
        for series, of in scores.by_step(facts.scores).items():
            found.setdefault(series, []).append(scores.curve(of, facts.run.name, i))
    return sorted(found.items(), key=lambda item: -len(item[1]))[:most]


def _grids(every: Sequence[Facts]) -> Html:
    figures = list(filter(None, (pictures.last_grid(facts.run, facts.run.name) for facts in every)))
    return tag("div", *figures, class_="pictures") if figures else note("None of them has a grid.")
