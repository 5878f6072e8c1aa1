"""Jobs by the templates in slurm/, exactly as they are submitted by hand."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from launch.cluster import environment, slurm
from launch.cluster.environment import PROJECT
from launch.queue.job import HOME, SBATCH_TIMEOUT_S, Job, flags, ranges


def template(stage: str) -> Path:
    return PROJECT / "slurm" / f"{stage}.sbatch"


def command(job: Job, *, offset: int | None = None, array: str = "") -> list[str]:
    """One sbatch. offset: of a sample job, to which its array adds the number of the task."""
    words = flags(job.options(array=bool(array))) + ([f"--array={array}"] if array else [])
    args = [str(job.run.path), *([job.set_name] if job.set_name else [])]
    args += list(job.extra_args) if offset is None else [str(offset)]
    return ["sbatch", "--parsable", *words, str(template(job.stage)), *args]


def commands(job: Job) -> list[list[str]]:
    """Every sbatch that `job` takes: several where MaxArraySize is small, one per shard where there are no arrays."""
    if not job.shards:
        return [command(job)]
    size = slurm.max_array_size() if slurm.available() else 1001
    if size == 1:
        return [command(job, offset=shard) for shard in job.shards]
    blocks: dict[int, list[int]] = {}
    for shard in job.shards:
        blocks.setdefault(shard // size * size, []).append(shard)
    return [
        command(job, offset=offset, array=f"{ranges([s - offset for s in block])}%{job.site.max_parallel}")
        for offset, block in blocks.items()
    ]


def describe(job: Job) -> str:
    """What --dry-run shows: each command, and the template that it submits."""
    return "\n".join(shlex.join(c) for c in commands(job)) + "\n\n" + template(job.stage).read_text()


def submit(job: Job) -> Iterator[str]:
    """Queues it; job ids as SLURM gives them. Raises SlurmError."""
    return map(sbatch, commands(job))


def sbatch(words: list[str]) -> str:
    """Run one sbatch from the project's root; returns the job id. Raises SlurmError."""
    with environment.outside_allocation():
        said = slurm.run(words, timeout_s=SBATCH_TIMEOUT_S, cwd=str(PROJECT), env={**os.environ, **HOME})
    found = re.search(r"^(\d+)(;.*)?$", said, re.MULTILINE)
    if found is None:
        raise slurm.SlurmError(f"sbatch: said no job's id, but {said.strip()!r}")
    return found[1]
