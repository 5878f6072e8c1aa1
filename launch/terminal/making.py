"""How far the making of samples is, from the files of their set, so that anybody can ask at any time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from typing import NamedTuple

from ddpm.run.files import read_json, stamp
from ddpm.run.log import counted
from ddpm.run.paths import RunDir, SampleSet, listed
from ddpm.sampling.request import shard_range
from launch.terminal.columns import until

RECENT_S = 900.0
"""The pace is measured over the last quarter of an hour; if no image came in it, over all of the work."""


class Making(NamedTuple):
    """How far one set is."""

    set_name: str
    shards: int
    of_shards: int
    images: int
    of_images: int
    images_per_s: float | None
    """The speed of all tasks together; None before it is known."""

    def told(self, now: float) -> str:
        """In words: `12,500 of 50,000 images, 38.2 images/s, until 14:05`."""
        pace = f", {self.images_per_s:.3g} images/s" if self.images_per_s else ""
        end = self.end(now)
        return (
            f"{self.images:,} of {counted(self.of_images, 'image', ',')}{pace}{f', until {until(end)}' if end else ''}"
        )

    def end(self, now: float) -> str | None:
        """When the last image will be there, at this pace: a stamp."""
        if not self.images_per_s or self.images >= self.of_images:
            return None
        with suppress(OverflowError, ValueError, OSError):  # so late that no date can hold it
            left_s = (self.of_images - self.images) / self.images_per_s
            return stamp(datetime.fromtimestamp(now + left_s, timezone.utc))
        return None


def newest(run: RunDir, now: float, set_name: str = "") -> Making | None:
    """How far the set is that was begun last, or that has this name; None if there is none, or its request cannot be
    read. now: Unix time."""
    begun = [s for s in run.sample_sets() if s.request.exists() and set_name in ("", s.name)]
    if not begun:
        return None
    made = max(begun, key=lambda s: s.request.stat().st_mtime)
    asked = read_json(made.request) or {}
    num, shards = asked.get("num_samples"), asked.get("shards")
    if not (isinstance(num, int) and isinstance(shards, int) and 1 <= shards <= num):
        return None
    published = set(_published(made, shards))
    came = [(at, shard_range(num, shards, index)[1]) for index, at in published]
    done = {index for index, _ in published}
    came += [(at, size) for first, size, at in _parts(made) if ((first + 1) * shards - 1) // num not in done]
    return Making(made.name, len(done), shards, sum(size for _, size in came), num, _pace(run, came, now))


def _pace(run: RunDir, came: list[tuple[float, int]], now: float) -> float | None:
    """Images a second. came: when images were there, and how many. They are counted from when the tasks that are at
    work began, as these come with their first ones all together; where no job says so, from the first of the images."""
    if not came:
        return None
    begun = min(_lives(run), default=min(at for at, _ in came))
    since = next((t for t in (max(now - RECENT_S, begun), begun) if any(at > t for at, _ in came)), now)
    return sum(size for at, size in came if at > since) / (now - since) if now > since else None


def _lives(run: RunDir) -> Iterator[float]:
    """When each of the jobs that make samples began to."""
    for marker in run.logs.glob(run.shard_marker("*").name):
        with suppress(FileNotFoundError):  # done meanwhile
            yield marker.stat().st_mtime


def _published(made: SampleSet, shards: int) -> Iterator[tuple[int, float]]:
    """Index and time of each shard that is there."""
    for path in listed(made.path):
        found = re.fullmatch(r"shard-([0-9]{5,})-of-([0-9]{5,})\.json", path.name)
        if found and int(found[2]) == shards and int(found[1]) < shards:
            with suppress(FileNotFoundError):
                yield int(found[1]), path.stat().st_mtime


def _parts(made: SampleSet) -> Iterator[tuple[int, int, float]]:
    """First sample, number of them and time of each batch of shards that are not there yet."""
    for path in listed(made.part):
        if found := re.fullmatch(r"([0-9]{9,})-([0-9]+)\.npz", path.name):
            with suppress(FileNotFoundError):
                yield int(found[1]), int(found[2]), path.stat().st_mtime
