"""Jobs by the templates in slurm/, exactly as they are submitted by hand."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from launch.cluster import environment, slurm_orders
from launch.cluster.environment import PROJECT
from launch.cluster.job import HOME, SBATCH_TIMEOUT_S, Job, flags, ranges


def template(stage: str) -> Path:
    return PROJECT / "slurm" / f"{stage}.sbatch"


def command(job: Job) -> list[str]:
    """Its sbatch. Of a sample job each task takes its share of the shards that are named."""
    array = [f"--array=0-{job.num_tasks - 1}%{job.site.max_parallel}"] if job.is_array else []
    args = [str(job.run.path), *([job.set_name] if job.set_name else []), *job.extra_args]
    args += ["--shards", ranges(job.shards)] if job.shards else []
    args += ["--tasks", str(job.num_tasks)] if job.is_array else []
    return ["sbatch", "--parsable", *flags(job.options()), *array, str(template(job.stage)), *args]


def describe(job: Job) -> str:
    """What --dry-run shows: the command, and the template that it submits."""
    return f"{shlex.join(command(job))}\n\n{template(job.stage).read_text()}"


def submit(job: Job) -> str:
    """Queues it; its id as SLURM gives it. Raises SchedulerError."""
    return sbatch(command(job))


def submit_again(stage: str, options: dict[str, str | bool], args: list[str]) -> str:
    """Queue a job of `stage` with the options of another; returns its id. Raises SchedulerError."""
    return sbatch(["sbatch", "--parsable", *flags(options), str(template(stage)), *args])


def sbatch(words: list[str]) -> str:
    """Run one sbatch from the project's root; returns the job id. Raises SchedulerError."""
    with environment.outside_allocation():
        return slurm_orders.submit(words, timeout_s=SBATCH_TIMEOUT_S, cwd=str(PROJECT), env={**os.environ, **HOME})
