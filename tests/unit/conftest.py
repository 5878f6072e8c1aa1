"""A run directory, and the fence of its one writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.run.fence import Fence
from ddpm.run.paths import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    path = tmp_path / "run"
    path.mkdir()
    return RunDir(path)


@pytest.fixture
def fence(run: RunDir) -> Iterator[Fence]:
    fence = Fence(run, {"job": "17", "restart": 1, "host": "n1"}, wait_s=0)
    yield fence
    fence.release()
