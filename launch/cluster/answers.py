"""Types of a scheduler's answers about jobs, queue and pre-emption, and of its refusals and silence."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm.errors import EnvironmentLacks


class SchedulerError(EnvironmentLacks):
    """A command failed or did not answer; the message is the scheduler's own."""


class NoAnswer(SchedulerError):
    """The scheduler is busy or unreachable: it has refused nothing, and may answer later."""


class NoJobId(SchedulerError):
    """sbatch succeeded without printing a job id: there may be a job, and asking again would queue another."""


NOT_REACHED = "is this the login node, and SLURM_CONF, if it is set, this cluster's? Else try again later"
"""What to do after NoAnswer."""


@dataclass(frozen=True)
class Shown:
    """What SLURM shows of a job, or of one task of an array."""

    state: str
    """RUNNING, PENDING, COMPLETING …"""
    restarts: int
    may_requeue: bool
    partition: str
    qos: str
    time_limit: str
    queued_at: str | None
    """When it last entered the queue; for a requeued job, when the nodes of its last life were free again."""
    preempted: bool = False
    """Whether it became COMPLETING in the second in which it was pre-empted: then pre-emption is ending it, unless it
    had a grace period, in which it may have been cancelled."""
    excluded: str = ""
    """The nodes that the job excludes, as a SLURM host list."""
    suspended_at: str | None = None
    """When it was last suspended or resumed: a stamp; None: never."""


@dataclass(frozen=True)
class Queued:
    """What squeue shows of a job; for an array, of its liveliest task."""

    state: str
    """RUNNING, PENDING, SUSPENDED, COMPLETING …"""
    reason: str = ""
    """Why it waits, in SLURM's words."""
    start: str | None = None
    """When SLURM expects a waiting job to start: a stamp, or None."""


@dataclass(frozen=True)
class Mercy:
    """What SLURM does with a job when it pre-empts it."""

    requeues: bool
    grace_s: int
    kill_wait_s: int
    known: bool = True
    """Whether this is SLURM's answer; else it is a usual setting."""
