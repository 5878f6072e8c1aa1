"""These tests need a GPU; elsewhere they are listed as not run. `python -m tools.gpu` runs them where there is one."""

from __future__ import annotations

import pytest
import torch

from ddpm.run.paths import RunDir
from launch.cluster import environment
from tests.conftest import requires
from tests.training import make_run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    environment.prepare_cublas()
    requires(torch.cuda.is_available(), "torch sees no GPU here", "run python -m tools.gpu on a node that has one")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that a CPU has trained."""
    from tests.gpu.test_training import CALM, Life

    run = make_run(tmp_path_factory.mktemp("cpu"))
    with Life(run, torch.device("cpu"), **CALM) as trainer:
        trainer.train(lambda: None)
    return run
