"""Why a run's training has ended that did not say so itself: what SLURM, or this machine, knows of its last job."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ddpm.run.files import seconds, stamp
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler
from launch.queue.waiting import is_of
from launch.terminal import standing

ENDS = ("finished", "failed", "cancelled")
AGAIN = "; submit it again to go on"

Event = dict[str, Any]


def last_job(events: list[Event]) -> str:
    """The job that training was left with, where its events tell of no end of it; else ""."""
    tale = (e for e in reversed(events) if not standing.is_later(e.get("stage", "train")))
    last: Event = next((e for e in tale if e["event"] not in standing.BETWEEN), {})
    is_told = not last or last["event"] in ENDS or last.get("reason") in standing.OWN_REASONS
    return "" if is_told else str(last["job"])


def why(run: RunDir, events: list[Event], *, answers: bool = True) -> str | None:
    """Why a run ended that has no job any more, where nothing of it says so. Asks SLURM, where it was its job; answers:
    whether SLURM does, without which nobody knows of its jobs. Raises OSError."""
    job = last_job(events)
    if not job:
        return None
    sent: Event = next((e for e in reversed(events) if e["event"] == "submitted" and e["job"] == job), {})
    if sent and not is_of(run, sent):  # this is a copy
        return None
    if not job[0].isdigit():
        return _here(job, sent, events)
    if not answers:
        return None
    told = scheduler.ends([job])[job] if scheduler.available("scontrol") else ""
    if standing.never_began(events, sent) and not (run.logs / f"train-{job}.out").exists():
        by_hand = (
            f"by scancel, or since its node could not start it, as where that lacks {run.path.parent} (scontrol show "
            f"job {job}, or sacct -j, says so)"
        )
        return f"job {job} left the queue before anything of it began: {told or by_hand}"
    return f"job {job} ended without a word: {told or 'SLURM does not say why'}{AGAIN}"


def _here(job: str, sent: Event, events: list[Event]) -> str | None:
    """Of a background process."""
    heard = next(str(e["time"]) for e in reversed(events) if e["job"] == job)
    what = f"pid {sent.get('pid')} on {sent.get('host')}"
    if sent.get("host") != environment.host():
        return f"{what} has given no sign of life since {heard[:16]}Z: look there, and{AGAIN[1:]}" if sent else None
    booted = _booted()
    if booted is not None and booted > seconds(heard):
        at = stamp(datetime.fromtimestamp(booted, timezone.utc))[:16]
        return f"{what} ended as this machine was started again, at {at}Z{AGAIN}"
    return f"{what} ended without a word, as where it is killed{AGAIN}"


def _booted() -> float | None:
    """When this machine was started: Unix time."""
    try:
        found = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.M)
    except OSError:
        return None
    return float(found[1]) if found else None
