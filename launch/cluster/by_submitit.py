"""Queues jobs by submitit: its runner and pickles (in logs/submitit/) with our script, options and supervisor.

Only the two classes that submitit's runner reads are used, and none of its executors: they always ask for a time limit,
wait for sbatch for ever, and take its silence for a refusal. pyproject.toml names the versions that were tried.
"""

from __future__ import annotations

import os
import pkgutil
import shlex
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.cluster import slurm_orders
from launch.cluster.asked import submitting
from launch.cluster.job import SBATCH_TIMEOUT_S, Job, flags

ENTRY = "launch.jobs:main"
MAX_TIMEOUTS = 3
"""A number for submitit's own handling of time limits, which our entry replaces."""


class Named:
    """A function that is pickled as its name alone, so that submitting need not load it.

    A requeued job thus runs the run's code on the run directory, not objects from the time when it was queued.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return pkgutil.resolve_name, (self._name,)


def folder(job: Job) -> Path:
    """The folder of pickles, writable by the submitter alone: whoever can write a pickle can have a job run their code.

    In a run that a group shares, every other user therefore has a folder of their own.
    """
    where = job.run.logs / "submitit"
    try:
        mine = where.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        mine = True
    return where if mine else where.with_name(f"submitit-{os.geteuid()}")


def command(job: Job, script: str) -> list[str]:
    """The sbatch command for `script`."""
    array = [f"--array={_array(job)}"] if job.is_array else []
    return ["sbatch", *flags(job.options()), *array, script]


def script_text(job: Job) -> str:
    """The job script, in submitit's form."""
    options = job.options()
    told = {**job.home, **job.identity, "DDPM_RUN": str(job.run.path), "DDPM_STAGE": job.stage}
    told |= {"DDPM_SET": job.set_name} if job.set_name else {}
    listed = {"wckey": "submitit", **options, **({"array": _array(job)} if job.is_array else {})}
    log = folder(job) / ("%A_%a_%t_log.out" if job.is_array else "%j_%t_log.out")
    srun = ["srun", "--unbuffered", "--output", str(log), "--kill-on-bad-exit=1", "--open-mode=append"]
    srun += [f"--output={options['output']}"]
    ours = '"${ddpm_srun[@]}" ' if job.site.container.image else ""
    python = '"${ddpm_python[@]}"' if job.site.container.image else shlex.quote(sys.executable)
    rank = ["bash", f"{told['DDPM_HOME']}/slurm/rank.sh"]
    runner = ["-u", "-m", "submitit.core._submit", str(folder(job))]
    lines = ["#!/bin/bash", "", "# Parameters"]
    lines += [f"#SBATCH --{k}" + ("" if v is True else f"={shlex.quote(str(v))}") for k, v in sorted(listed.items())]
    lines += ["", "# setup", *(f"export {k}={shlex.quote(v)}" for k, v in told.items())]
    # what it runs may have been purged meanwhile, or what that is on be away for a moment
    unpack = '"$DDPM_PYTHON" "$DDPM_RUN/code.zip" "$DDPM_HOME" || [ -d "$DDPM_HOME" ]'
    lines += [f"for ddpm_try in {{1..20}}; do {unpack} && break; sleep 3; done"]
    lines += ['. "$DDPM_HOME/slurm/supervise.sh" || exit 2', "", "# command", "export SUBMITIT_EXECUTOR=slurm"]
    lines += [f"{shlex.join(srun)} {ours}{shlex.join(rank)} {python} {shlex.join(runner)}", ""]
    return "\n".join(lines)


def _array(job: Job) -> str:
    return f"0-{job.num_tasks - 1}%{min(job.num_tasks, job.site.max_parallel)}"


def describe(job: Job) -> str:
    """What --dry-run shows: the command, and the script that it submits."""
    return f"{shlex.join(command(job, 'SCRIPT'))}\n\n{script_text(job)}"


def submit(job: Job) -> str:
    """Queue the job; returns its id. Raises SchedulerError.

    Pickles and script are written before the job exists, and are renamed to its id afterwards.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    where = folder(job)
    where.parent.mkdir(parents=True, exist_ok=True)
    where.mkdir(mode=0o700, exist_ok=True)
    where.chmod(0o700)
    pickles = []
    for number in range(job.num_tasks):
        task = DelayedSubmission(Named(ENTRY), job.arguments(job.shards_of(number)))  # type: ignore[arg-type]  # once it is read, it is one
        task.set_timeout(job.site.at(job.stage).time or 5, MAX_TIMEOUTS)
        pickles.append(where / f"{uuid.uuid4().hex}.pkl")
        task.dump(pickles[-1])
    script = where / f".submission_file_{uuid.uuid4().hex}.sh"
    script.write_text(script_text(job))
    words = command(job, str(script))
    with submitting(words):
        job_id = slurm_orders.submit(words, timeout_s=SBATCH_TIMEOUT_S)
    for task_number, pickle in enumerate(pickles):
        task_id = f"{job_id}_{task_number}" if len(pickles) > 1 else job_id
        JobPaths(where, task_id).move_temporary_file(pickle, "submitted_pickle")
    JobPaths(where, job_id).move_temporary_file(script, "submission_file", keep_as_symlink=True)
    return job_id
