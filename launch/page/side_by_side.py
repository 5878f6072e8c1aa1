"""The page of several runs: what differs between them, beside what came of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ddpm.errors import RequestError
from ddpm.scoring.compare import check_comparable
from ddpm.scoring.record import SCORE_NAMES, key_of
from launch.page import curves, pictures, recipe, scores
from launch.page.chart import Line, chart
from launch.page.facts import Facts, headline
from launch.page.markup import Column, Html, Part, document, join, note, section, table, tag
from launch.page.page import foot, shown
from launch.page.style import STYLE
from launch.page.words import digits

MOST_DRAWN = 16
"""Runs in a chart."""
FALL = 0.02
"""Of the steps, at the beginning: the fall of a loss there would leave no room for what differs later."""


def of_runs(every: Sequence[Facts], page: Path) -> str:
    """The whole page. page: where it will lie, for its links."""
    ordered = sorted(every, key=_by_score)
    drawn = ordered[:MOST_DRAWN]
    left_out = note(f"{len(ordered) - len(drawn)} more runs are not drawn.") if len(ordered) > len(drawn) else Html("")
    title = f"{len(ordered)} runs side by side"
    names = ", ".join(facts.run.name for facts in ordered[:8]) + (", …" if ordered[8:] else "")
    parts = [
        tag("h1", title),
        tag("p", names, class_="lead"),
        section("What differs, and what came of it", shown(_table, ordered, page)),
        section("Curves", shown(_charts, drawn), left_out),
        section("Samples of the last step", shown(_grids, drawn), left_out),
        foot(max(facts.made for facts in ordered), str(ordered[0].run.path.parent)),
    ]
    return document(title, *parts, style=STYLE)


def _by_score(facts: Facts) -> tuple[bool, float]:
    """Runs with a score first, the best first; then by loss."""
    best = headline(facts.scores)
    if best is not None:
        return False, float(best.record[key_of(best.record)])
    loss = curves.last_mean(facts.metrics)
    return True, float("inf") if loss is None else loss


def compared(every: Sequence[Facts]) -> tuple[list[str], list[dict[str, Any]]]:
    """The config's keys that differ among the runs, and for each run its values, step, loss and score."""
    configs = [facts.config for facts in every if facts.config is not None]
    keys = dict.fromkeys(key for c in configs[1:] for key, *_ in recipe.differences(c, configs[0]))
    rows = []
    for facts in every:
        best, tree = headline(facts.scores), facts.config.model_dump(mode="json") if facts.config else None
        rows.append({
            "values": ["" if tree is None else recipe.shown_value(tree, key) for key in keys],
            "state": facts.row["state"],
            "step": facts.row["step"],
            "loss": curves.last_mean(facts.metrics),
            "score": None if best is None else best.record,
        })  # fmt: skip
    return list(keys), rows


def _table(every: Sequence[Facts], page: Path) -> Html:
    keys, found = compared(every)
    columns = [Column("run"), *(Column(tag("code", key), True) for key in keys), Column("state"), Column("step", True)]
    columns += [Column("loss", True), Column("score"), Column("goodput", True)]
    rows: list[list[Part]] = []
    for facts, row in zip(every, found, strict=True):
        good = facts.row["goodput"]
        cells: list[Part] = [_link(facts, page), *row["values"], row["state"], f"{row['step']:,}"]
        cells += ["" if row["loss"] is None else digits(row["loss"]), _score(row["score"])]
        rows.append([*cells, "" if good is None else f"{good:.1%}"])
    parts = [table(columns, rows)]
    records = {facts.run.name: row["score"] for facts, row in zip(every, found, strict=True) if row["score"]}
    try:
        if len(records) > 1:
            check_comparable(records)
    except RequestError as e:
        parts.append(note(f"Not all of these scores may be compared: {e}."))
    told_of = "Their configs do not differ. " if not keys else ""
    parts.append(note(told_of, "Loss: the running mean at the end. Score: of the most samples, the newest of those."))
    return join(parts)


def _score(record: dict[str, Any] | None) -> str:
    return "" if record is None else f"{SCORE_NAMES[key_of(record)]} {scores.value(record)}, {scores.in_words(record)}"


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
