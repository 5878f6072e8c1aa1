"""What a scheduler answers: of a job, of a queue, of pre-emption; and that it refuses, or is silent."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm.errors import EnvironmentLacks


class SchedulerError(EnvironmentLacks):
    """A command that failed or did not answer; the message is the scheduler's own."""


class NoAnswer(SchedulerError):
    """The scheduler is busy or out of reach: it has refused nothing, and may answer later."""


class NoJobId(SchedulerError):
    """sbatch ended well and told no job's id: there is a job, perhaps, and asking again would queue another."""


NOT_REACHED = "is this the login node, and SLURM_CONF, if it is set, this cluster's? Else try again later"
"""What to do after NoAnswer."""


@dataclass(frozen=True)
class Shown:
    """What SLURM says of a job, or of one task of an array."""

    state: str
    """RUNNING, PENDING, COMPLETING …"""
    restarts: int
    may_requeue: bool
    partition: str
    qos: str
    time_limit: str
    queued_at: str | None
    """When it last entered the queue: for a requeued job, when the nodes of its former life were free again."""
    preempted: bool = False
    """Whether it has been COMPLETING from the very second in which it was pre-empted: by that, unless it had a grace
    period, in which it may have been cancelled."""
    excluded: str = ""
    """Nodes that it is not to have, as SLURM lists them."""
    suspended_at: str | None = None
    """When it was last suspended, or went on after that: a stamp; None: never."""


@dataclass(frozen=True)
class Queued:
    """What squeue says of a job that SLURM has; of an array, of its liveliest task."""

    state: str
    """RUNNING, PENDING, SUSPENDED, COMPLETING …"""
    reason: str = ""
    """Why it waits, in SLURM's words."""
    start: str | None = None
    """When SLURM expects that a waiting job starts: a stamp, where it says."""


@dataclass(frozen=True)
class Mercy:
    """What SLURM does with this job when it takes its nodes."""

    requeues: bool
    grace_s: int
    kill_wait_s: int
    known: bool = True
    """Whether SLURM says so; else it is what it mostly does."""
