"""A table of runs that fits the terminal: one line for each run; columns are shown whole or not at all.

A pure function of `overview.describe`'s rows and a width. Must not know where rows come from, or who draws them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from textwrap import shorten
from typing import Any

from ddpm.run.files import seconds
from ddpm.run.log import plain

Row = Mapping[str, Any]
GAP = "  "


@dataclass(frozen=True)
class Column:
    """forms: functions from a run to its cell, the widest first; the last one is used if the first does not fit."""

    name: str
    forms: tuple[Callable[[Row], str], ...]
    right: bool = False
    needed: bool = False
    """Shown at any width."""


def lines(rows: list[dict[str, Any]], width: int) -> tuple[list[str], set[str]]:
    """The table of runs: its head and a line for each row; and the names of the columns that had something to say, and
    no room. Lines are at most `width` wide, unless run, state and step alone are wider.
    """
    return fitted(rows, width, COLUMNS, BY_NEED)


def fitted(
    rows: list[dict[str, Any]], width: int, columns: Sequence[Column], by_name: Sequence[str]
) -> tuple[list[str], set[str]]:
    """`lines` for any columns; by_name: all their names, in the order in which they get room."""
    chosen: dict[str, list[str]] = {}
    left_out = set()
    by_need = sorted(columns, key=lambda column: by_name.index(column.name))
    room = width + len(GAP)
    for column in by_need:  # each in its narrowest form, and then those that came in in a wider one
        cells = _said(column, -1, rows)
        if column.needed or (any(cells) and _needs(column, cells) <= room):
            chosen[column.name], room = cells, room - _needs(column, cells)
        elif any(cells):
            left_out.add(column.name)
    for column in (column for column in by_need if column.name in chosen):
        wide = _said(column, 0, rows)
        more = _needs(column, wide) - _needs(column, chosen[column.name])
        if more <= room:
            chosen[column.name], room = wide, room - more
    shown = [_aligned(column, chosen[column.name]) for column in columns if column.name in chosen]
    return [GAP.join(cells).rstrip() for cells in zip(*shown, strict=True)], left_out


def _said(column: Column, form: int, rows: list[dict[str, Any]]) -> list[str]:
    return [plain(column.forms[form](row)) for row in rows]


def _needs(column: Column, cells: list[str]) -> int:
    return max(map(_cells, (column.name, *cells))) + len(GAP)


def _aligned(column: Column, cells: list[str]) -> list[str]:
    whole = [column.name, *cells]
    width = max(map(_cells, whole))
    blanks = [" " * (width - _cells(cell)) for cell in whole]
    return [blank + cell if column.right else cell + blank for blank, cell in zip(blanks, whole, strict=True)]


def _cells(text: str) -> int:
    """The width of a text on a terminal, in cells."""
    return sum((unicodedata.east_asian_width(c) in "WF") + (not unicodedata.combining(c)) for c in text)


# ---------------------------------------------------------------- what they say


def value(key: str, longest: int | None = None) -> Callable[[Row], str]:
    """A function that shows a row's value of `key`; of a text longer than `longest` its end."""

    def said(row: Row) -> str:
        text = row[key] if isinstance(row.get(key), str) else "" if key not in row else json.dumps(row[key])
        return text if longest is None or len(text) <= longest else f"…{text[-longest:]}"

    return said


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else format(row[key], form)


def _step(row: Row) -> str:
    return f"{row['step']}/{row['total_steps'] or '?'}"


def _percent(row: Row) -> str:
    """Progress in percent, rounded down, so that 100 % means done."""
    step, total = row["step"], row["total_steps"]
    return f"{100 * step // total}%" if total else ""


def until(at: str) -> str:
    """A time to come, given as a stamp: of today as 14:05, of this week as Sun 14:05, else as 12 Dec."""
    end, today = datetime.fromtimestamp(seconds(at)), datetime.now()
    days = (end.date() - today.date()).days
    form = "%H:%M" if days < 1 else "%a %H:%M" if days < 7 else "%d %b" if days < 300 else "%b %Y"
    return end.strftime(form)


def _waits(row: Row) -> str:
    """SLURM's reason for which the run waits, or the beginning of its sentence: that of a job that does not wait for
    another one of the run."""
    reasons = [r if " " not in r else shorten(r, 28, placeholder=" …") for r in (w["reason"] for w in row["waits"])]
    if row["state"] not in ("queued", "held"):
        return ""
    return next((reason for reason in reasons if reason != "Dependency"), reasons[0] if reasons else "")


def _jobs(row: Row) -> str:
    """Each with its stage: `train 20 running, sample 21 pending`."""
    return ", ".join(
        f"{row['stages'].get(job, '')} {job} {state.lower()}".strip() for job, state in row["jobs"].items()
    )


def _first_job(row: Row) -> str:
    jobs = list(row["jobs"])
    return f"{jobs[0]} +{len(jobs) - 1}" if jobs[1:] else "".join(jobs)


def _samples(row: Row) -> str:
    return ", ".join(f"{shards} {name}" for name, shards in row["samples"].items())


def score(row: Row) -> str:
    """The best founded score, with its set, and the number of other scores."""
    return _with_others(row, lambda name: f"{row['scores_told'][name]} ({name})")


def _score_in_short(row: Row) -> str:
    def short(name: str) -> str:
        told = re.sub(r" \(.*?\)|, [^,]* features$", "", row["scores_told"][name])
        return f"{told} ({name})"

    return _with_others(row, short)


def _with_others(row: Row, tell: Callable[[str], str]) -> str:
    first, *others = row["scores_told"] or [""]
    return (tell(first) if first else "") + (f" +{len(others)}" if others else "")


COLUMNS = (
    Column("run", (lambda row: row["name"],), needed=True),
    Column("state", (lambda row: row["state"],), needed=True),
    Column("step", (_step,), right=True, needed=True),
    Column("%", (_percent,), right=True),
    Column("end", (lambda row: f"~{until(row['expected_end'])}" if row["expected_end"] else "",)),
    Column("waits for", (_waits,)),
    Column("saved", (_number("saved_step", "d"),), right=True),
    Column("loss", (_number("loss", ".4f"),), right=True),
    Column("img/s", (_number("images_per_s", ".0f"),), right=True),
    Column("restarts", (_number("restarts", "d"),), right=True),
    Column("goodput", (_number("goodput", ".0%"),), right=True),
    Column("jobs", (_jobs, _first_job)),
    Column("samples", (_samples, lambda row: " ".join(row["samples"].values()))),
    Column("score", (score, _score_in_short)),
)
BY_NEED = ("run", "state", "step", "%", "end", "waits for", "score", "loss", "saved", "restarts", "goodput", "jobs",
           "img/s", "samples")  # fmt: skip
"""The order in which columns get room."""
