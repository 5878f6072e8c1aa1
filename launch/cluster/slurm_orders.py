"""Orders to SLURM, each one command with a time limit. Knows no run."""

from __future__ import annotations

import os
import re

from launch.cluster import slurm
from launch.cluster.answers import NoJobId
from launch.cluster.slurm import TIMEOUT_S, shortened, words

JOB_ID = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*| on cluster \S+)?")
"""The whole line in which sbatch prints the id, with --parsable and without."""


def submit(
    argv: list[str], *, timeout_s: float = TIMEOUT_S, cwd: str | None = None, env: dict[str, str] | None = None
) -> str:
    """Run sbatch; returns the job's id, whatever else a site's sbatch prints. Raises SchedulerError.

    env: what the job inherits; default this process's.
    """
    said = slurm.run(argv, timeout_s=timeout_s, cwd=cwd, env={**os.environ} if env is None else env)
    found = [match[1] for line in said.splitlines() if (match := JOB_ID.fullmatch(line.strip()))]
    if not found:
        told = "\n  ".join(shortened(words(argv[0], said))) or "nothing"
        raise NoJobId(f"{argv[0]} told no job's id, but: {told}")
    return found[-1]


def too_many(refusal: str) -> bool:
    """Whether sbatch may have refused because the user has too many jobs; each task of an array counts as one."""
    return bool(re.search(r"Submit\w*Limit|violates accounting/QOS policy", refusal))


def wait_for_room(refusal: str) -> str:
    """What to do where sbatch says that the queue has as many jobs of the user, or a group, as it may; else ""."""
    full = re.search(r"Submit\w*Limit", refusal)
    return "wait for one of your jobs to end, or cancel one (squeue --me); or use another --qos" if full else ""


def requeue(job: str) -> None:
    slurm.run(["scontrol", "requeue", job], timeout_s=60)


def exclude(job: str, nodes: str) -> None:
    """Exclude nodes from a waiting job. Raises SchedulerError."""
    slurm.run(["scontrol", "update", f"jobid={job}", f"excnodelist={nodes}"])


def delay(job: str, seconds: int) -> None:
    """Keep a waiting job from starting for so many seconds. Raises SchedulerError."""
    slurm.run(["scontrol", "update", f"jobid={job}", f"starttime=now+{seconds}"])


def mail_at_end(job: str, address: str) -> None:
    """Have SLURM mail to an address when a running job ends. Raises SchedulerError."""
    kind = "END,FAIL" + (",ARRAY_TASKS" if "_" in job else "")  # SLURM mails no END for a job that fails
    slurm.run(["scontrol", "update", f"jobid={job}", f"mailuser={address}", f"mailtype={kind}"])


def make_wait(job: str, other: str) -> None:
    """Make a waiting job wait for `other` to end, and for nothing else. Raises SchedulerError."""
    slurm.run(["scontrol", "update", f"jobid={job}", f"dependency=afterany:{other}"])


def cancel_waiting(*jobs: str) -> None:
    """Cancel those that have not started; of an array the tasks that have not. Raises SchedulerError."""
    slurm.run(["scancel", "--state=PENDING", *jobs])


def cancel(jobs: list[str]) -> None:
    slurm.run(["scancel", *jobs])
