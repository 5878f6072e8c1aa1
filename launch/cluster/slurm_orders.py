"""Orders that SLURM takes, each one command with a time limit. Knows no run."""

from __future__ import annotations

import re

from launch.cluster import slurm
from launch.cluster.answers import NoJobId
from launch.cluster.slurm import TIMEOUT_S, shortened, words

JOB_ID = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*| on cluster \S+)?")
"""The whole of the line in which sbatch tells it, with --parsable and without."""


def submit(
    argv: list[str], *, timeout_s: float = TIMEOUT_S, cwd: str | None = None, env: dict[str, str] | None = None
) -> str:
    """Run an sbatch; returns the job's id, whatever a site has it say around that. Raises SchedulerError."""
    said = slurm.run(argv, timeout_s=timeout_s, cwd=cwd, env=env)
    found = [match[1] for line in said.splitlines() if (match := JOB_ID.fullmatch(line.strip()))]
    if not found:
        told = "\n  ".join(shortened(words(argv[0], said))) or "nothing"
        raise NoJobId(f"{argv[0]} told no job's id, but: {told}")
    return found[-1]


def too_many(refusal: str) -> bool:
    """Whether a refusal of sbatch's may be about how many jobs the user has, of which each task of an array is one."""
    return bool(re.search(r"Submit\w*Limit|violates accounting/QOS policy", refusal))


def requeue(job: str) -> None:
    slurm.run(["scontrol", "requeue", job], timeout_s=60)


def exclude(job: str, nodes: str) -> None:
    """`job`, which waits, is not to have these nodes. Raises SchedulerError."""
    slurm.run(["scontrol", "update", f"jobid={job}", f"excnodelist={nodes}"])


def delay(job: str, seconds: int) -> None:
    """`job`, which waits, is not to begin before so long. Raises SchedulerError."""
    slurm.run(["scontrol", "update", f"jobid={job}", f"starttime=now+{seconds}"])


def mail_at_end(job: str, address: str) -> None:
    """Have SLURM mail there when `job`, which runs, ends. Raises SchedulerError."""
    kind = "END,FAIL" + (",ARRAY_TASKS" if "_" in job else "")  # of a job that fails it mails no END
    slurm.run(["scontrol", "update", f"jobid={job}", f"mailuser={address}", f"mailtype={kind}"])


def make_wait(job: str, other: str) -> None:
    """`job`, which has not begun, waits for `other` to end, and for nothing else. Raises SchedulerError."""
    slurm.run(["scontrol", "update", f"jobid={job}", f"dependency=afterany:{other}"])


def cancel_waiting(job: str) -> None:
    """Of an array: its tasks that have not begun."""
    slurm.run(["scancel", "--state=PENDING", job])


def cancel(jobs: list[str]) -> None:
    slurm.run(["scancel", *jobs])
