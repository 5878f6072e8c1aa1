"""A run directory, and the fence of its one writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.run.fence import Fence
from ddpm.run.paths import RunDir
from launch.cluster import scheduler


@pytest.fixture(autouse=True)
def nameless_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever SLURM this machine has."""
    monkeypatch.setattr(scheduler, "cluster_name", lambda: "")


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
