"""The status page: the table, and under it what does not fit into it; or a line for each change, as in a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

from ddpm.run.files import now
from ddpm.run.log import plain
from launch.cluster import scheduler
from launch.terminal import columns as table
from launch.terminal import standing, streams

LOOK_EVERY_S = 5.0
"""Not more often: each look asks the scheduler."""
LINE_EVERY_S = 30.0
"""Seconds between lines in a pipe about a run that only goes on."""
PIPE_COLUMNS = 200

Row = dict[str, Any]
KINDS = {"kept": "kept", "start_up": "starting up", "lost": "lost", "stopping": "stopping", "pending": "not saved yet"}
"""Kind of time -> words."""


def columns() -> int:
    """How wide a line may be: of the terminal as it is now, or of the pipe."""
    return shutil.get_terminal_size((PIPE_COLUMNS, 0)).columns


def page(rows: list[Row], width: int, *, details: bool) -> list[str]:
    """The table, and under it problems, what to do, and what had no room. details: where hours went, and all scores."""
    shown, left_out = table.lines(rows, width)
    notes = [f"{row['name']}: {told}" for row in rows for told in _notes(row, left_out, details=details)]
    notes += _waiting(rows, left_out)
    below = {"score", "waits for", *(["samples"] if details else [])}
    if hidden := [column.name for column in table.COLUMNS if column.name in left_out - below]:
        notes.append(f"no room for {', '.join(hidden)}: --json has all")
    for note in notes:
        shown += textwrap.wrap(plain(note), width, subsequent_indent="  ",
                               break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return shown


def show(rows: list[Row], *, details: bool) -> None:
    """Print it once."""
    head, *rest = page(rows, columns(), details=details)
    head = f"\x1b[1m{head}\x1b[0m" if streams.draws(sys.stdout) else head
    print("\n".join([head, *rest]), file=streams.below(sys.stdout), flush=True)


def _notes(row: Row, left_out: set[str], *, details: bool) -> Iterator[str]:
    """left_out: columns for which there was no room."""
    if details and any(row["allocated_s"].values()):
        yield where_time_went(row)
    if made := row["making"]:
        listed = details and row["sets"].get(made["set"], {}).get("told", "").endswith(made["told"])
        yield from () if listed else (f"{made['set']}: {made['told']}",)
    if details and row["validation_loss"] is not None:
        yield f"validation loss {row['validation_loss']:.4f}"
    if details:
        yield from _samples_and_scores(row)
    elif "score" in left_out and row["scores_told"]:
        yield table.score(row)
    if row["jobs"] and row.get("cluster") and row["cluster"] != scheduler.cluster_name():
        yield f"its jobs are on cluster {row['cluster']}"
    if row["bad_nodes"] and details:
        error = f": {row['bad_nodes_error']}" if row["bad_nodes_error"] and not row["problem"] else ""
        yield f"lives of it died by themselves on {', '.join(row['bad_nodes'])}{error}"
    if row["problem"]:
        yield row["problem"]


def _waiting(rows: list[Row], left_out: set[str]) -> Iterator[str]:
    """What jobs wait for that somebody can change, or that had no room: a line for all that wait alike."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for wait in row["waits"]:
            unseen = "waits for" in left_out and wait["reason"] != "Dependency"
            if wait["next_step"] or wait["expected_start"] or unseen:
                alike.setdefault(standing.line(wait), []).append((row["name"], wait["job"]))
    for line, those in alike.items():
        names = {name for name, _ in those}
        of = f"{those[0][0]}: " if len(names) == 1 else ""
        yield f"{of}{scheduler.waiting([job for _, job in those], line)}"


def _samples_and_scores(row: Row) -> Iterator[str]:
    """A line for each score, and each set that has none."""
    scored = {name.partition("/")[0] for name in row["scores_told"]}
    yield from (f"{name}: {of['told']}, no score" for name, of in row["sets"].items() if name not in scored)
    for name, told in row["scores_told"].items():
        step = row["sets"].get(name.partition("/")[0], {}).get("step")
        yield f"{name}: {told}{'' if step is None else f', step {step}'}"


def where_time_went(row: Row) -> str:
    """One line: the time that the run held nodes, and its shares."""
    spent = row["allocated_s"]
    total = sum(spent.values())
    hours = f"{total / 3600:.2f} h" if total >= 360 else f"{total:.0f} s"
    return f"{hours} allocated: " + ", ".join(f"{KINDS[kind]} {s / total:.1%}" for kind, s in spent.items() if s)


# ---------------------------------------------------------------- kept up to date


def fitting(shown: list[str], height: int) -> list[str]:
    return shown if len(shown) <= height else [*shown[: height - 1], f"… and {len(shown) - height + 1} more lines"]


def tell(look: Callable[[], list[Row]]) -> None:
    """Until ctrl-C: a line whenever something has changed."""
    said: dict[str, tuple[float, tuple[Any, ...]]] = {}
    while True:
        for row in look():
            at, before = said.get(row["path"], (0.0, ()))
            here = row["state"], row["problem"], row["restarts"], tuple(row["scores"])
            moved = (*here, row["step"])
            if here != before[:-1] or (moved != before and time.monotonic() - at >= LINE_EVERY_S):
                said[row["path"]] = time.monotonic(), moved
                print(plain(f"{now()} {_in_a_line(row)}"), flush=True)
        time.sleep(LOOK_EVERY_S)


def _in_a_line(row: Row) -> str:
    told = [(column, column.forms[0](row)) for column in table.COLUMNS]
    cells = [cell if column.needed or column.name == "%" else f"{column.name} {cell}" for column, cell in told if cell]
    return "  ".join([*cells, *([row["problem"]] if row["problem"] else [])])
