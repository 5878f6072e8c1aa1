"""What a cluster allows, asked by who has not submitted anything yet. Knows no run."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from launch.cluster import environment, slurm, slurm_orders, slurm_questions
from launch.cluster.answers import NoAnswer, SchedulerError
from launch.cluster.asked import submitting
from launch.cluster.environment import SHIPPED
from launch.cluster.job import Job, flags

COMMANDS = {
    "sbatch": "submits",
    "srun": "starts the ranks of a job",
    "scontrol": "puts a job back after a crash or at its time limit",
    "squeue": "tells whether a job is in the queue",
    "scancel": "ends one",
    "sinfo": "tells what partitions have",
    "sacctmgr": "tells how a QOS pre-empts, and how many jobs a user may have",
}
"""And what each is for."""
NEEDED = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
OLDEST = (20, 11)
"""The oldest SLURM on which jobs of this project have run."""


def version() -> str:
    """SLURM's, as it answers. Raises SchedulerError."""
    slurm.run(["scontrol", "show", "config"], timeout_s=10)  # slurmctld's answer, and not the command's alone
    return slurm.run(["sinfo", "--version"], timeout_s=10).strip()


def is_older(told: str) -> bool:
    """Whether a version as SLURM tells it, as slurm 20.11.4, is older than OLDEST."""
    match = re.search(r"(\d+)\.(\d+)", told)
    return match is not None and (int(match[1]), int(match[2])) < OLDEST


def settings(*keys: str) -> dict[str, str]:
    """The settings of slurm.conf that are asked for and that SLURM tells. Raises SchedulerError."""
    told = slurm.run(["scontrol", "show", "config"], timeout_s=10)
    found = {key: re.search(rf"^{key}\s*=\s*(.*\S)", told, re.M) for key in keys}
    return {key: match[1] for key, match in found.items() if match}


def of_partition(name: str) -> dict[str, str]:
    """KEY=VALUE of a partition, as `scontrol show partition` has them; {} where it shows none. Raises NoAnswer."""
    try:
        told = slurm.run(["scontrol", "-a", "show", "partition", "-o", name], timeout_s=10)
    except NoAnswer:
        raise
    except SchedulerError:
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", told))


def most_submitted(qos: str | None) -> int | None:
    """How many jobs, or tasks of arrays, the user may have in the queue; None where accounting sets no limit, or cannot
    be asked."""
    return _least(qos, "MaxSubmitJobs")


def most_at_work(qos: str | None) -> int | None:
    """How many of them may run at a time."""
    return _least(qos, "MaxJobs")


def _least(qos: str | None, limit: str) -> int | None:
    """A limit on the user's jobs: of the user's association, and of the QOS."""
    limits = []
    asked = [
        [*_of_the_user(), f"format={limit}"],
        ["sacctmgr", "-nP", "show", "qos", *([qos] if qos else ["normal"]), f"format={limit}PU"],
    ]
    for command in asked:
        with contextlib.suppress(SchedulerError):
            limits += [int(word) for word in slurm.run(command, timeout_s=10).split() if word.isdigit()]
    return min(limits, default=None)


def _of_the_user() -> list[str]:
    """The words that ask accounting, which may know several clusters, for the user's part in this one."""
    here = slurm_questions.cluster_name()
    on_it = [f"cluster={here}"] if here else []
    return ["sacctmgr", "-nP", "show", "assoc", f"user={environment.user()}", *on_it]


def accounts() -> list[str]:
    """The accounts that the user may charge; none if accounting cannot be asked."""
    try:
        told = slurm.run([*_of_the_user(), "format=Account"], timeout_s=10)
    except SchedulerError:
        return []
    return sorted(set(told.split()))


def submit_probe(job: Job, home: dict[str, str], script: Path, asked: Path, log: Path) -> str:
    """Queue a job that asks for what `job` would, and runs `script` with `asked`; its id. Raises SchedulerError."""
    options = {k: v for k, v in job.options().items() if k not in ("requeue", "signal", "output", "open-mode")}
    options |= {"job-name": "ddpm-doctor", "output": str(log), "ntasks-per-node": "1"}
    words = ["sbatch", "--parsable", *flags(options), str(script), str(asked)]
    with submitting(words):
        env = {**os.environ, **home, "PYTHONPATH": home["DDPM_HOME"]}
        return slurm_orders.submit(words, env=env)


def try_out(job: Job) -> None:
    """Have SLURM judge what `job` would ask for, without queueing it. Raises SchedulerError with what it says."""
    array = [f"--array=0-{job.num_tasks - 1}"] if job.is_array else []
    options = flags({k: v for k, v in job.options().items() if k not in ("dependency", "output")})
    words = ["sbatch", "--test-only", *options, *array, str(SHIPPED / "slurm" / f"{job.stage}.sbatch"), "RUN"]
    with submitting(words):
        slurm.run(words)
