"""How far a job has come: what advances when a life of it was not in vain. Another job's work is not its progress."""

from __future__ import annotations

from pathlib import Path

from ddpm.errors import RequestError
from ddpm.run.files import DamagedFile, read_bytes
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling.request import read_request, shard_range
from launch.cluster.job import numbers


def progress(run: RunDir, job: str, stage: str, set_name: str) -> int:
    """Saved steps; shards of the job's own and finished batches of them; or features that are there, parts of a bound.

    Raises OSError where it cannot look.
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
    """A shard counts as all of its batches and one more, so that what is published advances what was in parts."""
    try:
        read_bytes(where.request)  # a file system that fails for a moment is no damage: OSError
        request = read_request(where)
        ranges = {shard: shard_range(request.num_samples, request.shards, shard) for shard in shards}
    except (FileNotFoundError, RequestError, DamagedFile):
        return 0
    begins = [n.partition("-")[0] for n in _names(where.part) if n.endswith(".npz")]
    there = [int(b) for b in begins if b.isdecimal()]
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
