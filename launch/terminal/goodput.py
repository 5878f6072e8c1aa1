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

from typing import Any

from ddpm.run.events import life_of
from ddpm.run.files import seconds

LifeKey = tuple[str, int]

ALIVE_S = 60.0
"""A heartbeat this near is of a life that goes on; one from the future is no sign of it."""


def breakdown(events: list[dict[str, Any]], beat: dict[str, Any], at: float) -> dict[str, float]:
    """Seconds by kind. events: those of a run, in order of time; beat: its heartbeat; at: the time now."""
    lives: dict[LifeKey, list[dict[str, Any]]] = {}
    signs: dict[LifeKey, float] = {}
    for sign in [*(e["last_sign"] for e in events if e.get("last_sign")), beat]:
        if "time" in sign and "job" in sign and seconds(sign["time"]) < at + ALIVE_S:
            life = life_of(sign)
            signs[life] = max(signs.get(life, 0.0), seconds(sign["time"]))
    for e in events:
        if ended := e.get("former_life_ended"):
            job, restart = life_of(e)
            life = job, restart - 1
            signs[life] = max(signs.get(life, 0.0), seconds(ended))
        if e["event"] not in ("submitted", "notified") and e.get("stage", "train") == "train":
            lives.setdefault(life_of(e), []).append(e)
    total = dict.fromkeys(("kept", "start_up", "lost", "stopping", "pending"), 0.0)
    for life, own in lives.items():
        last_sign = signs.get(life, 0.0)
        alive = own[-1]["event"] not in ("finished", "failed", "requeued") and at - last_sign < ALIVE_S
        for kind, spent in _of_life(own, last_sign, alive).items():
            total[kind] += spent
    return total


def _of_life(events: list[dict[str, Any]], last_sign: float, alive: bool) -> dict[str, float]:
    spent = dict.fromkeys(("kept", "start_up", "lost", "stopping", "pending"), 0.0)
    phase, before = "start_up", seconds(events[0].get("since") or events[0]["time"])
    for e in [*events, {"event": "", "time": None}]:
        here = seconds(e["time"]) if e["time"] else last_sign
        spent[phase] += max(0.0, here - before)
        before = max(before, here)
        name = e["event"]
        if name in ("started", "resumed"):
            phase = "pending"
        elif name == "stop_requested":
            phase = "stopping"
        if name in ("checkpoint", "finished"):
            spent["kept"] += spent.pop("pending")
            spent["pending"] = 0.0
        elif name == "rollback" or (not name and not alive):
            spent["lost"] += spent.pop("pending")
            spent["pending"] = 0.0
    return spent


def share(spent: dict[str, float]) -> float | None:
    """Kept seconds over all that is decided; None where nothing is."""
    decided = sum(spent.values()) - spent["pending"]
    return spent["kept"] / decided if decided > 0 and spent["kept"] > 0 else None
