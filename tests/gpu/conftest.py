"""These tests need a GPU; elsewhere they are listed as not run. `python -m tools.gpu` runs them where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import requires


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    requires(torch.cuda.is_available(), "torch sees no GPU here", "run python -m tools.gpu on a node that has one")
    return torch.device("cuda")
