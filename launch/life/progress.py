"""The progress of a job, a number that grows if a life of it was useful. Other jobs' work does not count."""

from __future__ import annotations

from pathlib import Path

from ddpm.errors import RequestError
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling.request import read_request, shard_range
from launch.cluster.job import numbers


def progress(run: RunDir, job: str, stage: str, set_name: str) -> int:
    """train: saved steps; sample: finished batches and shards of the job's own; evaluate: features and parts of a
    bound.

    Raises OSError if the run cannot be read.
    """
    if stage == "train":
        return run.latest_step()
    where = run.sample_set(set_name)
    if stage == "evaluate":
        names = _names(where.path) + _names(run.bound_set(set_name).path)
        return sum(n.startswith(("features-", "part-")) and n.endswith(".json") for n in names)
    try:
        shards = numbers(run.shard_marker(job).read_text())
    except (FileNotFoundError, ValueError):  # no life of it came so far as to say
        return 0
    return _of_shards(where, shards)


def _of_shards(where: SampleSet, shards: list[int]) -> int:
    """Finished batches of these shards; a published shard counts one more than its batches, so that publishing is
    progress."""
    try:
        request = read_request(where)
        ranges = {shard: shard_range(request.num_samples, request.shards, shard) for shard in shards}
    except RequestError:
        return 0
    begins = [n.partition("-")[0] for n in _names(where.part)]
    there = [int(b) for b in begins if b.isdecimal()]  # no temporary
    count = 0
    for shard, (first, num) in ranges.items():
        if where.shard_manifest(shard, request.shards).exists():
            count += -(-num // request.batch) + 1
        else:
            count += sum(first <= b < first + num for b in there)
    return count


def _names(directory: Path) -> list[str]:
    try:
        return [p.name for p in directory.iterdir()]
    except FileNotFoundError:
        return []
