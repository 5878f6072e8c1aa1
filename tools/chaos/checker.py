"""What the lines of a run must say after any chaos: its events and its curve, read when the chaos is over.

No step of the curve twice or missing; nothing told by a life that another one has followed; and what is saved never
goes back, but by a rollback. The rows compare ends and counts; this looks at how the run says that it got there.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from ddpm.config import reading
from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir, listed

OF_TRAINING = ("started", "resumed", "stop_requested", "checkpoint", "rollback", "finished")
"""Told by the life itself, while it has the run."""


class Unsound(AssertionError):
    """A run whose lines contradict each other."""


def check(root: Path, names: str = "*") -> int:
    """Every run below `root` that has trained; returns how many there are. Raises Unsound."""
    records = sorted(root.glob(f"{names}/run.json"))
    for record in records:
        run = RunDir(record.parent)
        if found := problems(run):
            raise Unsound(f"run {run.name}: {'; '.join(found[:4])}")
    return len(records)


def problems(run: RunDir) -> list[str]:
    events = _events(run)
    return _of_the_curve(run, events) + _of_lives(events) + _of_saves(events)


def _events(run: RunDir) -> list[dict[str, Any]]:
    """A run's events in order of time, those of one file in the order of its lines."""
    told = [e for path in sorted(listed(run.events)) if path.suffix == ".jsonl" for e in read_jsonl(path)]
    return sorted(told, key=lambda e: str(e["time"]))


def _of_the_curve(run: RunDir, events: list[dict[str, Any]]) -> list[str]:
    """Lines come every so many steps; where a run ended, and was made longer later, there is one more."""
    steps = [r["step"] for r in read_jsonl(run.metrics)]
    every = reading.load(run.config).log.every_steps
    ends = {e["step"] for e in events if e["event"] == "finished"}
    due = set(range(every, max(steps, default=0) + 1, every))
    found = [f"the curve goes from step {a} to {b}" for a, b in pairwise(steps) if a >= b]
    found += [f"the curve lacks step {step}" for step in sorted(due - set(steps))]
    return found + [f"the curve has step {step}" for step in sorted(set(steps) - due - ends)]


def _of_lives(events: list[dict[str, Any]]) -> list[str]:
    """A life has the run from its first step until another one has."""
    found = []
    dead: set[tuple[str, int]] = set()
    alive = None
    for e in (e for e in events if e["event"] in OF_TRAINING):
        life = (str(e["job"]), int(e["restart"]))
        if life in dead:
            found.append(f"{e['event']} at step {e['step']} out of the dead life {life[0]}.{life[1]}")
        elif life != alive and alive is not None:
            dead.add(alive)
        if life not in dead:
            alive = life
    return found


def _of_saves(events: list[dict[str, Any]]) -> list[str]:
    """A life goes on from what was saved last, or later where it died between a save and its event."""
    found, saved = [], 0
    for e in events:
        if e["event"] == "rollback":
            saved = 0  # back to a save that it names nowhere; what follows counts from there
        elif e["event"] in ("checkpoint", "resumed"):
            if e["step"] < saved:
                found.append(f"{e['event']} at step {e['step']} after step {saved} was saved")
            saved = max(saved, e["step"]) if e["event"] == "checkpoint" else saved
    return found
