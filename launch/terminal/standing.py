"""How a run stands, in one word, by its events and what SLURM has of its jobs; and what its waiting jobs wait for.

A pure function: who calls it has read the run and asked SLURM, once for all runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.cluster.scheduler import Queued, Wait, explain, typed

LATER = ("sample", "evaluate")
DOING = {"sample": "sampling", "evaluate": "scoring"}
BETWEEN = ("allocated", "checkpoint", "save_failed", "stage_began", "stage_done", "notified")
"""Events that tell nothing of how a life began or ended."""
OWN_REASONS = ("STOP", "interrupted")
"""Why a life was asked to stop, where that was its owner's wish."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run."""

    events: list[dict[str, Any]]
    jobs: dict[str, Queued] | None
    """The run's jobs that SLURM has; None: SLURM was not asked, or did not answer."""
    finished: bool = False
    """Whether training is."""
    stop_file: bool = False
    beats: bool = False
    """Whether a trainer has given a sign of life just now, wherever it runs."""
    here: bool = False
    """Whether a background process of this machine trains it, or will."""
    works_here: bool = False
    """Whether one does anything for it: trains, samples or scores."""
    cluster: str = ""
    """The cluster of `jobs`; "" if it has no name."""
    behind: bool = False
    """Whether the process here waits for another run's to end."""


def word(f: Facts) -> str:
    """complete | running | sampling | scoring | starting | suspended | queued | held | failed | cancelled | stopped
    | completing | prepared | elsewhere | ended

    sampling, scoring: training is complete, and what follows it is at work.
    held: it waits until somebody releases it. completing: SLURM is ending the last job there is, and does not say
    whether it comes back, as a pre-empted one does. elsewhere: it went to another cluster, and
    tells of no end there. ended: otherwise, without a word.
    """
    jobs = f.jobs or {}
    submitted = (e for e in f.events if e["event"] == "submitted")
    stages = {(str(e["job"]), e.get("cluster", f.cluster)): str(e.get("stage", "train")) for e in submitted}

    def stage_of(event: dict[str, Any]) -> str:
        job = str(event.get("job", "")).partition("_")[0], event.get("cluster", f.cluster)
        return str(event.get("stage") or stages.get(job, "train"))

    active = {job: told for job, told in jobs.items() if told.state != "COMPLETING"}
    ending = {stages.get((job, f.cluster), "train") for job in jobs.keys() - active.keys()}
    of_training = {job: told for job, told in active.items() if stages.get((job, f.cluster), "train") not in LATER}
    follows = bool(ending & {*LATER}) and all(told.reason == "Dependency" for told in active.values())
    if of_training or (f.finished and active and not follows):
        stands = _in_queue(of_training or active)
        if stands != "running" or of_training:
            return stands
        return DOING[max(stages[job, f.cluster] for job, told in active.items() if told.state == "RUNNING")]
    if f.finished and f.works_here:
        began = [e.get("stage") for e in f.events if e["event"] == "stage_began"]
        return DOING.get(str(began[-1]) if began else "", "running")
    tale = [e for e in f.events if is_later(stage_of(e)) == f.finished and e["event"] not in BETWEEN]
    last: dict[str, Any] = tale[-1] if tale else {}
    if last.get("event") in ("failed", "cancelled"):
        return str(last["event"])
    if f.finished:
        return "completing" if ending & {*LATER} else "complete"
    if f.stop_file or (last.get("event"), last.get("reason")) == ("stop_requested", "STOP"):
        return "stopped"
    if ending - {*LATER}:  # it was pre-empted, maybe, and what waits for it waits on
        return "completing"
    if active:  # what is to follow a training of which nobody knows how it ended
        return _in_queue(active)
    if jobs:
        return "completing"
    if (f.beats or f.here) and last.get("event") in ("started", "resumed"):  # a full disk takes no sign of life
        return "running"
    if f.here:
        return "queued" if f.behind else "starting"
    if f.cluster and last.get("cluster", f.cluster) != f.cluster and last.get("event") != "finished":
        return "elsewhere"
    if never_began(f.events, last):
        return "queued" if f.jobs is None else "cancelled"
    if f.jobs is None and last.get("event") == "requeued":
        return "queued"
    return "ended" if last else "prepared"


def is_later(stage: str) -> bool:
    """Whether a job of this stage, or of several that a process here does in turn (sample+evaluate), does not train."""
    return stage.partition("+")[0] in LATER


def waits(jobs: dict[str, Queued], end: str) -> list[dict[str, Any]]:
    """Of each job that waits: what for, and what to do; for --json. end: the command that ends all of the run's jobs,
    which nobody is told to type while one of them runs."""
    runs = any(told.state != "PENDING" for told in jobs.values())
    found = ((job, explain(job, told, f"{typed('scancel')} {job}" if runs else end)) for job, told in jobs.items())
    return [{"job": job, **wait.to_json()} for job, wait in found if wait]


def line(wait: dict[str, Any]) -> str:
    """One of these for people."""
    return str(Wait(wait["reason"], wait["words"], wait["next_step"], start=wait["expected_start"]))


def _in_queue(active: dict[str, Queued]) -> str:
    states = {told.state for told in active.values()}
    if "RUNNING" in states or "SUSPENDED" in states:
        return "running" if "RUNNING" in states else "suspended"
    waiting = [explain(job, told) for job, told in active.items()]
    return "held" if all(wait is not None and wait.held for wait in waiting) else "queued"


def never_began(events: list[dict[str, Any]], last: dict[str, Any]) -> bool:
    """Whether nothing is heard of the job that was submitted last: it waits, or was cancelled while it did."""
    job = last.get("job")
    told = [e["event"] for e in events if e.get("job") == job]
    return last.get("event") == "submitted" and last.get("via") != "local" and told == ["submitted"]
