"""Queues jobs by the templates in slurm/, exactly as by hand."""

from __future__ import annotations

import os
import shlex

from launch.cluster import code, environment, slurm_orders
from launch.cluster.asked import submitting
from launch.cluster.environment import PROJECT
from launch.cluster.job import SBATCH_TIMEOUT_S, Job, at_home, flags, ranges


def template(home: dict[str, str], stage: str) -> str:
    return f"{home['DDPM_HOME']}/slurm/{stage}.sbatch"


def command(job: Job) -> list[str]:
    """The sbatch command of a job. The tasks of a sample job divide the shards that are named."""
    array = [f"--array=0-{job.num_tasks - 1}%{job.site.max_parallel}"] if job.is_array else []
    args = [str(job.run.path), *([job.set_name] if job.set_name else []), *job.extra_args]
    args += ["--shards", ranges(job.shards)] if job.shards else []
    args += ["--tasks", str(job.num_tasks)] if job.is_array else []
    return ["sbatch", "--parsable", *flags(job.options()), *array, template(job.home, job.stage), *args]


def describe(job: Job) -> str:
    """What --dry-run shows: the command, and the template that it submits."""
    files = code.of_run(job.run) or code.of_checkout()
    return f"{shlex.join(command(job))}\n\n{files[f'slurm/{job.stage}.sbatch'].decode()}"


def submit(job: Job) -> str:
    """Queue the job; returns its id. Raises SchedulerError."""
    return sbatch(command(job), {**job.home, **job.identity})


def submit_again(stage: str, options: dict[str, str | bool], args: list[str]) -> str:
    """Queue a job of `stage` with another job's options, to run this process's code; returns its id. SchedulerError."""
    here = at_home(PROJECT)
    own = {"DDPM_RUN_ID": environment.run_id()}
    return sbatch(["sbatch", "--parsable", *flags(options), template(here, stage), *args], {**here, **own})


def sbatch(words: list[str], home: dict[str, str]) -> str:
    """Run one sbatch in the folder of the code; returns the job id. Raises SchedulerError."""
    with submitting(words):
        env = {**os.environ, **home}
        return slurm_orders.submit(words, timeout_s=SBATCH_TIMEOUT_S, cwd=home["DDPM_HOME"], env=env)
