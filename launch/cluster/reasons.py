"""Why SLURM has a job wait, in words, and what to do: the one table of its reasons. Asks nobody."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from launch.cluster import asked
from launch.cluster.answers import Queued


@dataclass(frozen=True)
class Wait:
    """What a waiting job waits for."""

    reason: str
    """SLURM's own word (squeue's %r)."""
    words: str
    next_step: str = ""
    """What its owner can do; "" where waiting is all there is."""
    never: bool = False
    """Whether the request, as it is, can never start."""
    held: bool = False
    """Whether it stays until somebody releases it."""
    start: str | None = None
    """When SLURM expects it to start: a stamp, where it says."""

    def __str__(self) -> str:
        """One line: what, when, and what to do."""
        start = f"; SLURM expects it to start at {self.start[:16]}Z" if self.start else ""
        step = f": {self.next_step}" if self.next_step else ""
        return f"{self.words} ({self.reason}){start}{step}"

    def to_json(self) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "words": self.words,
            "next_step": self.next_step,
            "can_start": not self.never,
            "held": self.held,
            "expected_start": self.start,
        }


def waiting(jobs: list[str], wait: str) -> str:
    """What these jobs wait for, in a line: of many the first ones and how many more."""
    more = f" and {len(jobs) - 4} more" if len(jobs) > 4 else ""
    return f"job{'s'[: len(jobs) > 1]} {', '.join(jobs[:4])}{more} wait{'s'[: len(jobs) == 1]}: {wait}"


RELEASE = "{scontrol} release {job}"
LOOK = "{scontrol} show job {job} says more"
ASK_LESS = "{end}submit again "

TABLE: tuple[tuple[str, str, str, str], ...] = (
    # SLURM's reason, as a whole; what it means; what to do; "never" and "held" as they hold
    ("Priority", "others are before it", "", ""),
    ("Resources", "it is next, and waits for nodes", "", ""),
    ("None", "SLURM has not looked at it yet", "", ""),
    ("Dependency", "it waits for the job before it to end", "", ""),
    ("DependencyNeverSatisfied", "it waits for a job that will not end as it asks",
     "{end}submit again", "never"),
    ("JobArrayTaskLimit", "as many tasks of its array run as may at a time (--max-parallel)", "", ""),
    ("BeginTime", "it is not to start before its time; a job that was put back waits some minutes", "", ""),
    ("JobHeldUser", "its owner holds it", RELEASE, "held"),
    ("JobHeldAdmin", "the cluster's administrators hold it", "ask them, naming job {job}", "held"),
    ("launch failed requeued held", "a node failed to start it, and SLURM holds it", RELEASE, "held"),
    ("JobHoldMaxRequeue", "it was put back too often, and SLURM holds it", RELEASE, "held"),
    ("job requeued in held state", "it was put back, and is held", RELEASE, "held"),
    ("PartitionTimeLimit", "its time limit is above what the partition allows",
     ASK_LESS + "with a shorter --time (sinfo -o '%P %l' shows the limits)", "never"),
    ("PartitionNodeLimit", "it asks for more nodes, or fewer, than the partition allows",
     ASK_LESS + "with other --nodes, or in another --partition (scontrol show partition)", "never"),
    ("PartitionConfig", "the partition does not allow what it asks for",
     ASK_LESS + "with a shorter --time, fewer --nodes, or in another --partition (scontrol show partition)", "never"),
    ("PartitionDown", "the partition is down", "wait for the administrators, or take another --partition", ""),
    ("PartitionInactive", "the partition takes no jobs now",
     "wait for the administrators, or take another --partition", ""),
    ("BadConstraints", "no node is as it asks for",
     ASK_LESS + "with another --constraint, or fewer nodes in --exclude", "never"),
    ("AccountNotAllowed", "its account may not use the partition", ASK_LESS + "with another --account", "never"),
    ("QOSNotAllowed", "its QOS may not be used in the partition", ASK_LESS + "with another --qos", "never"),
    ("InvalidAccount", "its account is not, or no longer, valid", ASK_LESS + "with another --account", "never"),
    ("InvalidQOS", "its QOS is not, or no longer, valid", ASK_LESS + "with another --qos", "never"),
    ("MaxMemPerLimit", "it asks for more memory than the partition allows", ASK_LESS + "with a smaller --mem", "never"),
    ("Licenses", "it waits for a licence", "", ""),
    ("Reservation", "its reservation has not begun, or is in use", "scontrol show reservation tells when", ""),
    ("ReservationDeleted", "its reservation is gone", ASK_LESS + "without --sbatch reservation=…", "held"),
    ("ReqNodeNotAvail", "nodes that it needs are down, drained or reserved",
     "wait, or ask for others; sinfo -R says why", ""),
    ("Nodes required for job are DOWN, DRAINED or reserved",
     "the nodes that it could have are down, drained, or kept for jobs in partitions of higher priority",
     "wait, or ask for others, or another --partition; sinfo -R lists nodes that are down or drained: where it lists "
     "none, jobs of such a partition are before it", ""),
    ("Cleaning", "its life before is still being cleaned up", "", ""),
    ("Prolog", "its node is being made ready", "", ""),
)  # fmt: skip

FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    # the limits of a QOS or an account ("association"): SLURM has some dozens
    (r"(?:QOS|Assoc)Max(?:Wall\w*|\w+Per(?:Job|Node))(?:Limit)?",
     "it asks for more than {who} allows one job to have", ASK_LESS + "for less, or with another {option}", "never"),
    (r"(?:QOS|Assoc)Min\w+", "it asks for less than {who} demands of a job",
     ASK_LESS + "for more, or with another {option}", "never"),
    (r"(?:QOS|Assoc)Grp\w*Minutes\w*|(?:QOS|Assoc)UsageThreshold|AssociationTimeLimit",
     "the time that {who} may use is used up, or running jobs may use it up",
     "wait, ask for a shorter --time, or use another {option}", ""),
    (r"(?:QOS|Assoc)Grp\w+", "the jobs under {who} use all that they may at a time, or it alone asks for more",
     "wait; where none of them runs, " + ASK_LESS + "for less, or with another {option}", ""),
    (r"(?:QOS|Assoc)Max\w+|QOSJobLimit|QOSResourceLimit|AssociationJobLimit|AssociationResourceLimit",
     "your jobs under {who} use all that you may at a time",
     "wait for one of them to end, or use another {option}", ""),
)  # fmt: skip


def explain(job: str, queued: Queued, end: str = "") -> Wait | None:
    """What a job waits for; None where it does not wait. end: the command that takes it, and what follows it, out of
    the queue; "" where it is not there any more."""
    if queued.state != "PENDING":
        return None
    reason, start = (queued.reason or "None").strip("()"), queued.start
    words_of = {"job": job, "scontrol": asked.typed("scontrol"), "end": f"{end}, then " if end else ""}
    known, _, detail = reason.partition(", ")  # ReqNodeNotAvail, UnavailableNodes:n[1-3]
    for name, words, step, marks in TABLE:
        if " " in name and reason.startswith(name):
            return Wait(reason, words, step.format(**words_of), *_marks(marks), start)
        if name == known:
            told = f"{words}: {detail.rpartition(':')[2]}" if detail else words
            return Wait(known, told, step.format(**words_of), *_marks(marks), start)
    for pattern, words, step, marks in FAMILIES:
        if re.fullmatch(pattern, known):
            who, option = ("its QOS", "--qos") if known.startswith("QOS") else ("its account", "--account")
            told, todo = words.format(who=who), step.format(**words_of, option=option)
            return Wait(known, told, todo, *_marks(marks), start)
    return Wait(reason, "SLURM says why it waits", LOOK.format(**words_of), start=start)


def _marks(marks: str) -> tuple[bool, bool]:
    return marks == "never", marks == "held"
