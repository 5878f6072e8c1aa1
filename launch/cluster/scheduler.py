"""The interface to the scheduler for the rest of launch/: queries, orders, and queueing.

The modules behind it are not imported outside this room: what of them others may use is imported here.
"""

# ruff: noqa: F401

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from ddpm.run.files import FULL
from launch.cluster import asked, by_submitit, by_template
from launch.cluster.answers import NOT_REACHED, Mercy, NoAnswer, NoJobId, Queued, SchedulerError, Shown
from launch.cluster.asked import typed
from launch.cluster.by_template import submit_again
from launch.cluster.ended import ends, signal_name
from launch.cluster.job import Job
from launch.cluster.partitions import partitions
from launch.cluster.reasons import Wait, explain, waiting
from launch.cluster.slurm import asked_once, available
from launch.cluster.slurm_orders import (
    cancel,
    cancel_waiting,
    delay,
    exclude,
    mail_at_end,
    make_wait,
    requeue,
    too_many,
    wait_for_room,
)
from launch.cluster.slurm_questions import (
    any_cancelled,
    cluster_name,
    dependents,
    look_up,
    looked_up_together,
    max_array_size,
    mercy,
    mode_and_grace,
    preemption,
    show,
    spare_nodes,
)

PATIENCE_S = 90
RETRY_S = 3

T = TypeVar("T")


class Way(Protocol):
    """A way of queueing jobs: one of the modules by_*."""

    def describe(self, job: Job) -> str: ...
    def submit(self, job: Job) -> str: ...


WAYS: dict[str, Way] = {"submitit": by_submitit, "sbatch": by_template}


def describe(job: Job) -> str:
    """What --dry-run shows of a job (from `fitting`): the exact command and script."""
    return WAYS[job.site.via].describe(job)


def by_hand(job: Job) -> str:
    """The command line by which a person queues `job` (from `fitting`), in any directory."""
    home = " ".join(f"{k}={shlex.quote(v)}" for k, v in job.home.items())
    return f"{home} {shlex.join(by_template.command(job))}"


def fitting(job: Job) -> Job:
    """The job with at most as many tasks as an array may have on this cluster."""
    return job.with_tasks(max_array_size()) if job.is_array and available() else job


def submit(job: Job) -> str:
    """Queue a job (from `fitting`); returns its id. Raises SchedulerError."""
    return WAYS[job.site.via].submit(job)


def asking(cluster: str) -> contextlib.AbstractContextManager[None]:
    """Within: SLURM's commands ask that cluster; "": the one that they ask anyway."""
    return contextlib.nullcontext() if cluster in ("", cluster_name()) else asked.asking(cluster)


def queued(jobs: list[str]) -> dict[str, str]:
    """The states of those `jobs` that SLURM still has. Raises SchedulerError."""
    return {job: told.state for job, told in look_up(jobs).items()}


def followers(job: str) -> list[str]:
    """Jobs that wait for `job` to end, directly or through other jobs. Raises SchedulerError."""
    found: list[str] = []
    todo = [job.partition("_")[0]]
    while todo:
        new = [other for other in dependents(todo.pop()) if other not in found]
        found += new
        todo += new
    return found


def patiently(
    ask: Callable[[], T],
    on: type[Exception] | tuple[type[Exception], ...] = NoAnswer,
    patience_s: float | None = None,
) -> T:
    """Call `ask`, again for `patience_s` (default PATIENCE_S) while it raises `on`, as when slurmctld restarts; not
    where a disk is full, which does not pass."""
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    while True:
        try:
            return ask()
        except on as e:
            if time.monotonic() > deadline or (isinstance(e, OSError) and e.errno in FULL):
                raise
        time.sleep(RETRY_S)
