"""How far samples are, by files alone: what counts, the pace of several tasks together, and the end that follows."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from ddpm.run.paths import RunDir, SampleSet
from launch.terminal import making
from launch.terminal.columns import until

NOW = 1_800_000_000.0


def begin(run: RunDir, name: str = "s", num: int = 800, shards: int = 8, at: float = NOW - 5000) -> SampleSet:
    made = run.sample_set(name)
    made.part.mkdir(parents=True)
    made.request.write_text(json.dumps({"num_samples": num, "shards": shards}))
    os.utime(made.request, (at, at))
    return made


def there(path: Path, ago_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (NOW - ago_s, NOW - ago_s))


def part(made: SampleSet, first: int, num: int) -> Path:
    return made.part / f"{first:09d}-{num}.npz"


def test_shards_and_the_batches_of_those_to_come_are_counted_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    begin(run, "older", at=NOW - 9000)
    made = begin(run)
    there(made.shard_manifest(2, 8), 100)
    there(made.shard_manifest(2, 9), 100)  # of another sharding
    for first in (200, 250, 300):  # the first two are of shard 2, whose parts are about to be removed
        there(part(made, first, 50), 90)
    found = making.newest(run, NOW)
    assert found is not None and (found.set_name, found.shards, found.of_shards) == ("s", 1, 8)
    assert (found.images, found.of_images) == (150, 800)


def test_the_pace_is_that_of_all_tasks_since_those_at_work_began(tmp_path: Path) -> None:
    """Four tasks come with their first batch in one second, after 100 s each: 2 images a second, not 200."""
    run = RunDir(tmp_path)
    made = begin(run)
    for task in range(4):
        there(run.shard_marker(f"17_{task}"), 101)
        there(part(made, 100 * task, 50), 1 - task / 4)
    found = making.newest(run, NOW)
    assert found is not None and found.images_per_s == pytest.approx(200 / 101)
    end = found.end(NOW)
    assert end is not None
    at = datetime.fromisoformat(end.replace("Z", "+00:00"))
    assert at.timestamp() == pytest.approx(NOW + 600 / (200 / 101), abs=0.01)
    assert found.told(NOW) == f"200 of 800 images, 1.98 images/s, until {until(end)}"


def test_what_came_before_a_break_and_long_ago_makes_no_pace(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    made = begin(run)
    there(made.shard_manifest(0, 8), 4000)
    there(made.shard_manifest(1, 8), 3000)
    there(made.shard_manifest(2, 8), 450)
    found = making.newest(run, NOW)  # of this machine: nothing says when it began
    assert found is not None and found.images_per_s == pytest.approx(100 / 900)
    there(run.shard_marker("17"), 60)
    found = making.newest(run, NOW)
    assert found is not None and (found.images_per_s, found.end(NOW)) == (None, None)
    assert found.told(NOW) == "300 of 800 images"


def test_the_slowest_pace_is_one_too_and_a_finished_set_has_no_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    made = begin(run, num=2, shards=2)
    there(made.shard_manifest(0, 2), 4000)
    there(made.shard_manifest(1, 2), 2000)
    found = making.newest(run, NOW)
    assert found is not None and found.images_per_s == pytest.approx(1 / 4000) and found.end(NOW) is None


@pytest.mark.parametrize("request_json", ["{", "[]", '{"shards": 4}', '{"shards": 9, "num_samples": 4}'])
def test_a_request_that_cannot_be_read_is_no_set(tmp_path: Path, request_json: str) -> None:
    run = RunDir(tmp_path)
    begin(run).request.write_text(request_json)
    assert making.newest(run, NOW) is None
