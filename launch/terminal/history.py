"""A run's life for people: a line for each event, consecutive saves folded into one, and who ended a life."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import groupby
from typing import Any

from ddpm.run.paths import RunDir
from launch.terminal.logfiles import tail

Event = dict[str, Any]
HIDDEN = ("event", "time", "job", "restart", "host", "options", "args", "launch", "run", "qos", "since", "last_sign",
          "sha256", "preemption")  # fmt: skip
HIDDEN_IN_SHORT = ("world_size", "code", "via", "pid", "despite", "behind", "cluster")
TAIL_BYTES = 4 << 20
WORDS = {
    "DUE TO PREEMPTION": "preempted",
    "DUE TO JOB REQUEUE": "requeued by hand",
    "DUE TO TIME LIMIT": "time_limit",
    "DUE TO NODE FAILURE": "node failure",
}
"""SLURM's words in a job's log for the end of a life -> words for people."""
UNKNOWN = "SIGTERM: preempted, cancelled or requeued"


def lines(run: RunDir, events: list[Event]) -> Iterator[str]:
    """What status.py --events prints."""
    for e, rest in _told(run, events):
        yield f"{e['time']}  {run.name}  job {e['job']}.{e['restart']}  {e['event']:14} {rest}".rstrip()


def short_lines(run: RunDir, events: list[Event]) -> Iterator[str]:
    """The same for a screen, with the most important part of each line first."""
    for e, rest in _told(run, events, (*HIDDEN, *HIDDEN_IN_SHORT)):
        yield f"{e['time'][5:16].replace('T', ' ')}  {e['event']:14} {rest}  (job {e['job']}.{e['restart']})"


def _told(run: RunDir, events: list[Event], hidden: tuple[str, ...] = HIDDEN) -> Iterator[tuple[Event, str]]:
    """Each event, with saves folded, and its further fields as text."""
    for is_save, group in groupby(
        clear(run, events), key=lambda e: (e["event"] == "checkpoint", e["job"], e["restart"])
    ):
        folded = list(group)
        if is_save[0] and len(folded) > 1:
            first, last = folded[0], folded[-1]
            more = {"saves": len(folded), "step": f"{first.get('step')}..{last.get('step')}"}
            kept = {k: v for k, v in last.items() if k not in more}
            folded = [{**kept, **more, "from": first["time"]}]
        for e in folded:
            rest = " ".join(f"{k}={v}" for k, v in e.items() if k not in hidden and v not in (None, ""))
            yield e, rest


def clear(run: RunDir, events: list[Event]) -> Iterator[Event]:
    """The events, with `preempted` replaced by what SLURM's log says of who ended the life."""
    scancelled = {(e["job"], e["restart"]) for e in events if e["event"] == "cancelled"}
    ours = {(e["job"], e["restart"]) for e in events if e["event"] == "requeued"}  # to SLURM they are requeued by hand
    of_lives = cache(partial(_of_lives, run))  # by job: its log tells of all of them
    for e in events:
        unclear = e["event"] == "stop_requested" and e.get("reason") == "preempted"
        is_told = unclear and (e["job"], e["restart"]) not in ours
        yield {**e, "reason": _who(of_lives, e, scancelled)} if is_told else e


def _who(of_lives: Callable[[str], dict[int, str]], event: Event, scancelled: set[tuple[str, int]]) -> str:
    """Who ended a life by SIGTERM: the life itself cannot know and records `preempted`; SLURM's log says it later."""
    if (event["job"], event["restart"]) in scancelled:
        return "scancel"
    words = of_lives(event["job"]).get(event["restart"], "")
    return WORDS.get(words, "scancel" if words == "CANCELLED" else UNKNOWN)


def _of_lives(run: RunDir, job: str) -> dict[int, str]:
    """SLURM's last words on each life of a job, from the job's log; "" if there are none."""
    text = tail(run.logs / f"train-{job}.out", TAIL_BYTES)
    _, *parts = re.split(r"^\[batch\] .* restart=(\d+) ", text, flags=re.M)
    return {int(life): _word_of(said) for life, said in zip(parts[::2], parts[1::2], strict=True)}


def _word_of(life: str) -> str:
    said = re.findall(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+ (DUE TO [A-Z]+(?: [A-Z]+)?)?", life)
    due = [word for word in said if word and not word.startswith("DUE TO SIGNAL")]
    return due[-1] if due else "CANCELLED" if said else ""
