"""Whether a job is requeued when its batch shell ends: the evidence, and the decision, which asks nobody.

After a crash SLURM's job is FAILED, and SLURM never requeues it; a job that saved before its time limit exits with 75.
Both are requeued, but only while SLURM calls this life of the job RUNNING: under scancel it is COMPLETING, and a
requeue would revive it; and if a node was unreachable, a later life may already run elsewhere. A job is retried without
limit while it makes progress, and fails after MAX_RETRIES retries in a row without any. SLURM itself requeues jobs that
it pre-empts; where it does not, a successor job goes on, also for a job that is COMPLETING because of pre-emption.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from ddpm.errors import EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE
from ddpm.run.events import life_of
from launch.cluster.scheduler import Mercy, Shown
from launch.queue.nodes import MISTAKE

MAX_RETRIES = 3
WAIT_S = (0, 60, 300)
"""Seconds before the first, second and third retry in a row, beside SLURM's own delay: a passing problem, such as a
file system that is away, may be over by then."""
UNCOUNTED = ("preempted", "suspended")
"""Reasons for a requeue that do not count as a retry."""
GONE = "gone"
"""Reason of a life whose run was moved away: nothing is written under the run's old name."""


@dataclass(frozen=True)
class Evidence:
    """Facts about a job whose batch shell ends, with their sources. Facts that cannot change the decision are not
    asked."""

    stage: str
    """train, sample or evaluate: the batch script's."""
    code: int
    """The exit code in rank 0's marker; srun's if there is no marker."""
    reason: str = "crash"
    """The reason in rank 0's marker."""
    restart: int = 0
    """The number of this life of the job, from the shell's environment."""
    shown: Shown | None = None
    """What scontrol shows of the job; None: SLURM does not know it."""
    stop_file: bool = False
    """Whether a person has made STOP in the run directory."""
    progress: int | None = None
    """The job's progress (saved steps, its shards' batches, or features); None: the run cannot be read."""
    retries: int = 0
    """How often in a row the job, or those it succeeds, was put back at this progress by its own fault: the events."""
    mercy: Mercy | None = None
    """How SLURM pre-empts; asked only if the job may have been pre-empted."""
    uncounted: int = 0
    """Number of lives since the last one whose events have more than its start."""
    can_tell: bool = True
    """Whether events can be read and written, so that this life will be counted."""
    mistaken: bool = False
    """Whether it died of an error that code alone makes, and so did the life before, at the same progress."""


@dataclass(frozen=True)
class Decision:
    what: Literal["leave", "fail", "requeue", "succeed"]
    """leave: leave it to SLURM; fail: say that it has failed; requeue; succeed: submit a successor job."""
    why: str = ""
    """For the job's log, and for the event of a failure."""

    @property
    def goes_on(self) -> bool:
        return self.what in ("requeue", "succeed")


def decide(e: Evidence) -> Decision:
    if e.code == 0:
        return Decision("leave")
    if e.code == EXIT_BUSY and (why := not_ours(e.shown, e.restart)):
        return Decision("leave", why)  # an orphan, fenced out by a later life of its own job
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
    if e.mistaken:
        return Decision("fail", "two lives in a row ended by the same mistake of the code; mend it, submit again with "
                        "--code new")  # fmt: skip
    if e.retries >= MAX_RETRIES and e.reason not in UNCOUNTED:
        step = "mend the cause, submit again (with --code new if it was in the code)"
        step = "their time was over too soon: submit again with a longer --time" if e.reason == "time_limit" else step
        return Decision(
            "fail",
            f"{e.retries + 1} lives in a row ended ({e.reason}, exit code {e.code}) without progress "
            f"beyond {e.progress}; {step}",
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
    """Why this life must not be requeued, by SLURM's state of the job; "" if it may be.

    or_preempted: ask about a successor instead, which is also allowed while pre-emption is ending the job.
    """
    if shown is None or shown.state != "RUNNING":
        if or_preempted and shown is not None and shown.preempted and shown.restarts == restart:
            return ""
        return f"SLURM calls the job {shown.state if shown else 'gone'}: leaving it to SLURM"
    if shown.restarts != restart:
        return f"SLURM runs life {shown.restarts} of the job, and this is {restart}: leaving it alone"
    return ""


NO_FAULT_OF_ITS_OWN = (*UNCOUNTED, "time_limit", "interrupted", "STOP", "save_failed", "out_of_memory")
"""Reasons for an end that say nothing against the node."""


def blames_its_node(e: Evidence) -> bool:
    """Whether this life died by itself in a way that may not happen on another node."""
    return e.code not in (0, EXIT_BUSY, EXIT_FATAL, EXIT_REQUEUE) and e.reason not in NO_FAULT_OF_ITS_OWN


def wait_s(e: Evidence) -> int:
    """Seconds for which a job that is requeued now is kept from starting."""
    counts = e.code != EXIT_REQUEUE and e.reason not in UNCOUNTED
    return WAIT_S[min(e.retries, len(WAIT_S) - 1)] if counts else 0


# ---------------------------------------------------------------- counting


def retries_without_progress(events: list[dict[str, Any]], job: str, now_at: int) -> int:
    """How often in a row `job`, or jobs it succeeds, was requeued through its own fault at progress `now_at`."""
    jobs = _succeeded(events, job)
    told = (e for e in reversed(events) if e["event"] == "requeued" and e.get("job") in jobs)
    here = takewhile(lambda e: e.get("progress") == now_at, told)
    return len({life_of(e) for e in here if e.get("reason") not in UNCOUNTED})  # a write that failed may be there twice


def mistaken_again(events: list[dict[str, Any]], job: str, error: str, now_at: int | None) -> bool:
    """Whether the life before this one, of `job` or of the one that it succeeds, died of the same mistake, `error`."""
    if not MISTAKE.match(error):
        return False
    lives = {job, *(e.get("successor_of") for e in events if e.get("job") == job)}
    last: dict[str, Any] = next((e for e in reversed(events) if e["event"] == "requeued" and e.get("job") in lives), {})
    return last.get("error") == error and last.get("progress") == now_at


def uncounted_lives(events: list[dict[str, Any]], job: str, restart: int) -> int:
    """How many lives of the job have started since the last one that could write more than its start."""
    told = (e for e in events if e.get("job") == job and e["event"] != "allocated")
    return restart - max((int(e["restart"]) for e in told), default=0)


def bad_nodes(events: list[dict[str, Any]], job: str) -> list[str]:
    """Nodes on which lives of the job, or of jobs it succeeds, died by themselves, in order of time."""
    jobs = _succeeded(events, job)
    named = (str(e["bad_node"]) for e in events if e.get("bad_node") and e.get("job") in jobs)
    return list(dict.fromkeys(named))


def _succeeded(events: list[dict[str, Any]], job: str) -> set[str]:
    """The job, and those that it succeeds."""
    jobs = {job}
    for event in reversed(events):
        if event.get("job") in jobs and event.get("successor_of"):
            jobs.add(event["successor_of"])
    return jobs
