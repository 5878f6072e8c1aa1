"""Everything that is queued or at work for a run: SLURM's jobs, processes here, a trainer known by its heartbeat."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from ddpm.errors import RequestError
from ddpm.run.events import read_events
from ddpm.run.files import seconds
from ddpm.run.owners import not_ours
from ddpm.run.paths import RunDir
from ddpm.run.records import BEATS_S, place_of, read_heartbeat
from launch.cluster import environment, scheduler
from launch.queue import local
from launch.queue.turns import turn
from launch.queue.waiting import ask_other_clusters, asked_together, slurm_jobs

OVER = ("finished", "failed", "requeued", "cancelled")


@dataclass(frozen=True)
class Work:
    jobs: dict[str, str]
    """SLURM's job -> state; for an array that of its liveliest task. 17;b on another cluster than the one asked."""
    here: dict[str, int]
    """Background job of this machine -> pid."""
    elsewhere: str = ""
    """For a message: another trainer that has just given a sign of life, or ""."""
    stays: Mapping[str, str] = field(default_factory=dict)
    """The `jobs` that stay in the queue, as SLURM refused to cancel them -> its words. STOP ends each at its start."""
    silent: tuple[str, ...] = ()
    """Clusters that had jobs of it, and do not answer."""

    def __bool__(self) -> bool:
        return bool(self.jobs or self.here or self.elsewhere)

    def __str__(self) -> str:
        stay = dict.fromkeys(self.stays, ", and stays so")
        told = [f"job {named(job)} ({state.lower()}{stay.get(job, '')})" for job, state in self.jobs.items()]
        told += [f"pid {pid} on this machine" for pid in self.here.values()]
        return ", ".join([*told, *([self.elsewhere] if self.elsewhere else [])])


def named(job: str) -> str:
    """A job of `Work.jobs` for people."""
    return job.replace(";", " of cluster ")


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs of `Work.jobs`, wherever they are. Raises SchedulerError."""
    _order(jobs, scheduler.cancel)


def _order(jobs: Iterable[str], order: Callable[[list[str]], None]) -> None:
    """Give the order to each cluster for its jobs, also after another one refused. Raises SchedulerError."""
    numbers: dict[str, list[str]] = {}
    refused: list[scheduler.SchedulerError] = []
    for job in jobs:
        number, _, cluster = job.partition(";")
        numbers.setdefault(cluster, []).append(number)
    for cluster, some in numbers.items():
        try:
            with scheduler.asking(cluster):
                order(some)
        except scheduler.SchedulerError as e:
            refused.append(e)
    if refused:
        raise next((e for e in refused if isinstance(e, scheduler.NoAnswer)), refused[0])


def to_end(run: RunDir) -> str:
    """What a person types to end what is at work for a run, or waits to be, wherever that is: messages say this."""
    return f"python launch/cancel.py {run.quoted}"


def of_run(run: RunDir) -> Work:
    """The run's work. Raises NoAnswer if SLURM does not answer, SchedulerError if it refuses."""
    events = read_events(run)
    jobs = slurm_jobs(run, events)
    asked = jobs if scheduler.available() else []
    try:
        states = scheduler.queued(asked) if asked else {}
    except scheduler.NoAnswer as e:
        raise scheduler.NoAnswer(
            f"cannot tell whether run {run.name} is at work while SLURM does not answer: {scheduler.NOT_REACHED}\n  {e}"
        ) from None
    others, silent = ask_other_clusters(run)
    states, here = {**states, **others}, {job: pid for job, (pid, _) in local.at_work(run).items()}
    return Work(states, here, "" if states or here else _beats(run, events, gone=asked), silent=silent)


def end(run: RunDir) -> Work:
    """`end_all` of one."""
    return end_all([run])[0]


def not_from_here(run: RunDir) -> str:
    """For a message: why this user cannot end a run; "" where nothing forbids it."""
    if os.access(run.path, os.W_OK):
        return ""
    return f"run {run.name} cannot be ended from here: {not_ours(run.path) or f'{run.path} cannot be written'}"


def end_all(runs: Sequence[RunDir]) -> list[Work]:
    """Cancel waiting jobs, and ask running ones by STOP to save and exit. Returns what there was of each run.

    Raises SchedulerError, EnvironmentLacks, RequestError where a run cannot be written: then nothing was done.
    """
    for run in runs:
        if why := not_from_here(run):
            raise RequestError(why)
    with ExitStack() as turns:  # so that nobody queues more of their jobs meanwhile
        for run in sorted(runs, key=lambda run: str(run.path)):  # in one order, or two who do so wait for each other
            turns.enter_context(turn(run))
        with asked_together(runs):
            found = [of_run(run) for run in runs]
        for run, of_one in zip(runs, found, strict=True):
            if of_one or of_one.silent:  # first: whatever comes back, or succeeds another, ends at its start
                run.renew_stop()
        try:
            _order((job for of_one in found for job in of_one.jobs), lambda jobs: scheduler.cancel_waiting(*jobs))
        except scheduler.NoAnswer:
            raise
        except scheduler.SchedulerError as e:  # one is another user's who shares the run; the others are cancelled
            why = " ".join(str(e).split())
            waits = [[job for job, state in of_run(run).jobs.items() if state == "PENDING"] for run in runs]
            found = [replace(one, stays=dict.fromkeys(on, why)) for one, on in zip(found, waits, strict=True)]
    return found


def _beats(run: RunDir, events: list[dict[str, Any]], gone: list[str]) -> str:
    """The trainer of a recent heartbeat that has not ended and is no process of this machine, which would be known; ""
    if there is none.

    gone: jobs that this cluster no longer has.
    """
    beat, place = read_heartbeat(run), place_of(run)
    age = abs(time.time() - seconds(beat["time"])) if beat else BEATS_S
    if age >= BEATS_S or beat.get("inode", place) != place:
        return ""
    here = scheduler.cluster_name()
    if beat.get("cluster", here) == here and str(beat["job"]).partition("_")[0] in gone:
        return ""
    of_life = [e for e in events if (e["job"], e["restart"]) == (str(beat["job"]), beat["restart"])]
    over = any(e["event"] in OVER for e in of_life)
    ours = any(e["event"] == "submitted" and e.get("host") == environment.host() and e.get("pid") for e in of_life)
    return "" if over or ours else f"job {beat['job']} on {beat.get('host', 'some host')}, alive {age:.0f} s ago"
