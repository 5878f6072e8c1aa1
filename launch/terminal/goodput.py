"""Goodput of a run, from its life events: how much of the time that it held nodes ended in kept steps.

A life of a job begins where its batch shell began (`since`). It ends with its last sign: its last event, its last
heartbeat, what the next life found of that, or, told by SLURM to the next life, when its nodes were free again
(`former_life_ended`). Its time is divided at its events:

  start_up   until training began: the interpreter, data, the checkpoint, compiling
  kept       training up to a save
  lost       training after the last save of a life that died, or before a rollback
  stopping   from an agreed stop to the end: the save, and waiting for SLURM
  pending    training after the last save of a life that still trains: neither kept nor lost yet

Time in the queue is not counted: nothing was allocated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ddpm.run.events import life_of
from ddpm.run.files import seconds
from ddpm.run.records import BEATS_S

LifeKey = tuple[str, int]

KINDS = ("kept", "start_up", "lost", "stopping", "pending")


class Period(NamedTuple):
    """A part of a life's time; begin and end in Unix seconds."""

    life: LifeKey
    kind: str
    begin: float
    end: float


def breakdown(events: list[dict[str, Any]], beat: dict[str, Any], at: float) -> dict[str, float]:
    """Seconds by kind. events: those of a run, in order of time; beat: its heartbeat; at: the time now."""
    total = dict.fromkeys(KINDS, 0.0)
    for period in periods(events, beat, at):
        total[period.kind] += period.end - period.begin
    return total


def periods(events: list[dict[str, Any]], beat: dict[str, Any], at: float) -> list[Period]:
    """The periods behind `breakdown`, life by life and in order of time; none is empty."""
    lives: dict[LifeKey, list[dict[str, Any]]] = {}
    signs: dict[LifeKey, float] = {}
    for sign in [*(e["last_sign"] for e in events if e.get("last_sign")), beat]:
        if "time" in sign and "job" in sign and seconds(sign["time"]) < at + BEATS_S:  # none from the future
            life = life_of(sign)
            signs[life] = max(signs.get(life, 0.0), seconds(sign["time"]))
    for e in events:
        if ended := e.get("former_life_ended"):
            job, restart = life_of(e)
            life = job, restart - 1
            signs[life] = max(signs.get(life, 0.0), seconds(ended))
        if e["event"] not in ("submitted", "notified") and e.get("stage", "train") == "train":
            lives.setdefault(life_of(e), []).append(e)
    found = []
    for life, own in lives.items():
        last_sign = signs.get(life, 0.0)
        alive = own[-1]["event"] not in ("finished", "failed", "requeued") and at - last_sign < BEATS_S
        found += [Period(life, *part) for part in _of_life(own, last_sign, alive)]
    return found


def _of_life(events: list[dict[str, Any]], last_sign: float, alive: bool) -> list[tuple[str, float, float]]:
    done: list[tuple[str, float, float]] = []
    open_ended: list[tuple[float, float]] = []  # trained, and neither kept nor lost yet
    phase, before = "start_up", seconds(events[0].get("since") or events[0]["time"])

    def settle(kind: str) -> None:
        done.extend((kind, *part) for part in open_ended)
        open_ended.clear()

    for e in [*events, {"event": "", "time": None}]:
        here = seconds(e["time"]) if e["time"] else last_sign
        if here > before:
            if phase == "pending":
                open_ended.append((before, here))
            else:
                done.append((phase, before, here))
            before = here
        name = e["event"]
        if name in ("started", "resumed"):
            phase = "pending"
        elif name == "stop_requested":
            phase = "stopping"
        if name in ("checkpoint", "finished"):
            settle("kept")
        elif name == "rollback" or (not name and not alive):
            settle("lost")
    settle("pending")
    return sorted(done, key=lambda part: part[1])


def share(spent: dict[str, float]) -> float | None:
    """Kept seconds divided by all seconds except pending ones; None if nothing is kept yet."""
    decided = sum(spent.values()) - spent["pending"]
    return spent["kept"] / decided if decided > 0 and spent["kept"] > 0 else None
