"""Whether a job is put back when its batch shell ends: the evidence, and what follows from it. Asks nobody.

A crash leaves SLURM's job FAILED, which SLURM never requeues; a job that saved before its time limit left with 75. Both
are put back, and only while SLURM calls this very life of the job RUNNING: under scancel it is COMPLETING, and a
requeue would raise it from the dead; and where a node was out of reach, a later life may run elsewhere. Policy by
progress: endless while it advances; failed after MAX_RETRIES retries in a row without any. SLURM itself requeues what
it pre-empts; where it does not, a successor goes on, also for a job that is COMPLETING by pre-emption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ddpm.errors import EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE
from launch.cluster.scheduler import Mercy, Shown

MAX_RETRIES = 3
WAIT_S = (0, 60, 300)
"""Before the first retry in a row, the second, the third, beside what SLURM itself waits: what a life met, such as a
file system that is away, may be over by then."""
UNCOUNTED = ("preempted", "suspended")
"""Reasons to come back that are no retry."""
GONE = "gone"
"""Why a life left whose run was moved away: what lies under its name is not told how it ended."""


@dataclass(frozen=True)
class Evidence:
    """Facts about a job whose batch shell ends, and where each is from. What decides nothing more is not asked for."""

    stage: str
    """train, sample or evaluate: the batch script's."""
    code: int
    """The exit code that rank 0 left in its marker, past srun; srun's where it left none."""
    reason: str = "crash"
    """Why rank 0 says that it left, in its marker."""
    restart: int = 0
    """Which life of the job this is: the shell's environment."""
    shown: Shown | None = None
    """What SLURM says of the job (scontrol); None: it knows none."""
    stop_file: bool = False
    """Whether a person has made STOP in the run directory."""
    progress: int | None = None
    """How far the job has come: saved steps; its shard's batches; its features. None: the run is unreadable."""
    retries: int = 0
    """How often in a row the job, or those it succeeds, was put back at this progress by its own fault: the events."""
    mercy: Mercy | None = None
    """What SLURM does to jobs that it pre-empts; asked for where the job may have been."""
    uncounted: int = 0
    """Lives of the job since the last one of which the events tell anything but its beginning."""
    can_tell: bool = True
    """Whether the events can be read, and take one line more: this life will be counted."""


@dataclass(frozen=True)
class Decision:
    what: Literal["leave", "fail", "requeue", "succeed"]
    """Leave it to SLURM; say that it has failed; requeue it; have a successor go on."""
    why: str = ""
    """For the job's log, and for the event of a failure."""

    @property
    def goes_on(self) -> bool:
        return self.what in ("requeue", "succeed")


def decide(e: Evidence) -> Decision:
    if e.code == 0:
        return Decision("leave")
    if e.code == EXIT_BUSY and (why := not_ours(e.shown, e.restart)):
        return Decision("leave", why)  # an orphan, which its own job's later life has fenced out
    if e.reason == GONE:
        return Decision("leave", "the run is not here any more: submit it where it is")
    if e.code in (EXIT_BUSY, EXIT_FATAL):
        why = "starting again would end the same way: mend what the log names, then submit again"
        why = "another job holds the run: python launch/status.py shows it" if e.code == EXIT_BUSY else why
        return Decision("fail", f"exit code {e.code}: {why}")
    if (why := not_ours(e.shown, e.restart, or_preempted=True)) or e.shown is None:
        return Decision("leave", why)
    if e.stop_file:
        return Decision("fail", "a STOP file forbids another start: submit again to go on, which removes it")
    if e.retries >= MAX_RETRIES and e.reason not in UNCOUNTED:
        return Decision(
            "fail",
            f"{e.retries + 1} lives in a row ended ({e.reason}, exit code {e.code}) without progress "
            f"beyond {e.progress}; mend the cause, submit again",
        )
    # Where pre-emption means cancelling, SLURM lets a job requeue itself but remembers that it was to end it.
    cancels = e.mercy is not None and not e.mercy.requeues
    if e.shown.preempted and (e.mercy is None or e.mercy.requeues or e.mercy.grace_s > 0):
        return Decision("leave", "SLURM is ending the job: leaving it to SLURM")  # with a grace period: under scancel
    return _put_back(e, forbidden=cancels or not e.shown.may_requeue)


def _put_back(e: Evidence, *, forbidden: bool) -> Decision:
    if forbidden and e.stage == "sample":
        return Decision(
            "fail", "requeue is forbidden; the evaluation, or launch/sample.py, makes what is missing"
        )  # the task of an array has no successor
    if not e.can_tell and e.reason not in UNCOUNTED and (forbidden or e.uncounted >= MAX_RETRIES):
        lacks = "can be read" if e.progress is None else "can be written to events/: make room there"
        return Decision("fail", f"its lives cannot be counted while nothing {lacks}; submit the run again")
    how_far = "unknown" if e.progress is None else e.progress
    return Decision("succeed" if forbidden else "requeue", f"exit code {e.code} ({e.reason}); progress {how_far};")


def not_ours(shown: Shown | None, restart: int, *, or_preempted: bool = False) -> str:
    """Why this life is not to be put back, by what SLURM says of the job; "" where it is.

    or_preempted: or followed by a successor, which may also be where pre-emption is ending it.
    """
    if shown is None or shown.state != "RUNNING":
        if or_preempted and shown is not None and shown.preempted and shown.restarts == restart:
            return ""
        return f"SLURM calls the job {shown.state if shown else 'gone'}: leaving it to SLURM"
    if shown.restarts != restart:
        return f"SLURM runs life {shown.restarts} of the job, and this is {restart}: leaving it alone"
    return ""


NO_FAULT_OF_ITS_OWN = (*UNCOUNTED, "time_limit", "interrupted", "STOP", "save_failed", "out_of_memory")
"""Reasons to leave that say nothing against the node."""


def blames_its_node(e: Evidence) -> bool:
    """Whether this life died by itself in a way that another node may not see."""
    return e.code not in (0, EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE) and e.reason not in NO_FAULT_OF_ITS_OWN


def wait_s(e: Evidence) -> int:
    """How long a job that is put back now is kept from its next start."""
    counts = e.code != EXIT_REQUEUE and e.reason not in UNCOUNTED
    return WAIT_S[min(e.retries, len(WAIT_S) - 1)] if counts else 0


# ---------------------------------------------------------------- counting


def retries_without_progress(events: list[dict[str, Any]], job: str, now_at: int) -> int:
    """How many times in a row `job`, or those it succeeds, was put back by its own fault at the progress it has."""
    count, lives = 0, {job}
    for event in reversed(events):
        if event.get("job") in lives and event.get("successor_of"):
            lives.add(event["successor_of"])
        if event["event"] != "requeued" or event.get("job") not in lives:
            continue
        if event.get("progress") != now_at:
            break
        count += event.get("reason") not in UNCOUNTED
    return count


def uncounted_lives(events: list[dict[str, Any]], job: str, restart: int) -> int:
    """How many lives of the job began since the last that had room to tell what became of it."""
    told = (e for e in events if e.get("job") == job and e["event"] != "allocated")
    return restart - max((int(e["restart"]) for e in told), default=0)


def bad_nodes(events: list[dict[str, Any]], job: str) -> list[str]:
    """Nodes on which lives of the job, or of those it succeeds, died by themselves; in their order."""
    lives = {job}
    for event in reversed(events):
        if event.get("job") in lives and event.get("successor_of"):
            lives.add(event["successor_of"])
    named = (str(e["bad_node"]) for e in events if e.get("bad_node") and e.get("job") in lives)
    return list(dict.fromkeys(named))
