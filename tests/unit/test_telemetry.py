"""ddpm/telemetry.py: no metrics line twice and none missing, whatever happened to the writer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm import telemetry
from ddpm.rundir import RunDir, read_json, read_jsonl
from ddpm.telemetry import Telemetry, tile


def opened(run: RunDir, step: int) -> Telemetry:
    return Telemetry(run, step=step, total_steps=100, owner={"job": "1", "restart": 0, "host": "h"})


def line(step: int) -> dict[str, Any]:
    return {
        **{"step": step, "images": step, "epoch": 0.0, "loss": 0.1 + step, "grad_norm": 1.0, "lr": 1e-3},
        **{"images_per_s": 1.0, "gpu_memory_gib": None},
    }


def steps(run: RunDir) -> list[int]:
    return [r["step"] for r in read_jsonl(run.metrics)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    class Board:
        def __getattr__(self, _: str) -> Any:
            return lambda *args, **kw: None

    monkeypatch.setattr(Telemetry, "board", property(lambda self: Board()))
    return RunDir(tmp_path)


def test_lines_past_the_resumed_step_are_dropped_and_written_again(run: RunDir) -> None:
    first = opened(run, 0)
    for step in (1, 2, 3):
        first.log(line(step))
    first.close()
    second = opened(run, 2)
    assert steps(run) == [1, 2]
    second.log(line(3))
    second.close()
    assert steps(run) == [1, 2, 3]


def test_a_torn_last_line_does_not_spoil_the_next(run: RunDir) -> None:
    first = opened(run, 0)
    first.log(line(1))
    first.close()
    with run.metrics.open("a") as f:
        f.write('{"step": 2, "lo')
    opened(run, 1).log(line(2))
    assert [json.loads(text)["step"] for text in run.metrics.read_text().splitlines()] == [1, 2]


def test_an_orphan_that_still_writes_adds_nothing_to_its_heirs_lines(run: RunDir) -> None:
    orphan = opened(run, 0)
    orphan.log(line(1))
    heir = opened(run, 1)
    orphan.log(line(2))
    heir.log(line(2))
    assert steps(run) == [1, 2]


def test_a_line_that_a_full_disk_refused_comes_with_the_next(run: RunDir) -> None:
    t = opened(run, 0)
    t.log(line(1))
    real = t._metrics

    class Full:
        def write(self, data: bytes) -> int:
            if len(data) > 30:
                return real.write(data[:30])  # a disk that takes a part
            raise OSError(28, "No space left on device")

    class Gone:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    t._metrics = Full()  # type: ignore[assignment]
    t.log(line(2))
    t._metrics = Gone()  # type: ignore[assignment]
    t.log(line(3))
    with pytest.raises(OSError, match="No space"):
        t.sync()  # a checkpoint promises the lines before it
    t._metrics = real
    t.log(line(4))
    assert [json.loads(text)["step"] for text in run.metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_heartbeat_says_who_is_alive_and_where(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    t = opened(run, 0)
    t.heartbeat(3, {"loss": 0.5})
    t.heartbeat(4, {})  # within the same five seconds
    beat = read_json(run.heartbeat)
    assert beat is not None and (beat["step"], beat["job"], beat["loss"]) == (3, "1", 0.5)
    t.heartbeat(5, {}, force=True)
    assert (read_json(run.heartbeat) or {})["step"] == 5
    monkeypatch.setattr(telemetry, "HEARTBEAT_EVERY_S", 0)
    t.heartbeat(6, {})
    assert (read_json(run.heartbeat) or {})["step"] == 6


def test_a_grid_shows_every_image_once_in_rows() -> None:
    images = np.zeros((5, 8, 8, 3), np.uint8) + np.arange(1, 6, dtype=np.uint8)[:, None, None, None]
    grid = tile(images, at_least_pixels=8)
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    values, counts = np.unique(grid, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True))[1] == 64 * 3
    assert [grid[2 + 10 * (i // 3), 2 + 10 * (i % 3), 0] for i in range(5)] == [1, 2, 3, 4, 5]
    assert set(values.tolist()) == {1, 2, 3, 4, 5, 96}
