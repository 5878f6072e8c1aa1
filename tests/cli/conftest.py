from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.harness import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A machine on which the tiny run was trained undisturbed, sampled and scored. Tests leave it as it is."""
    shell = Shell(tmp_path_factory.mktemp("finished"))
    done = shell.submit("--then", "sample,evaluate", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return shell


@pytest.fixture
def again(finished: Shell, shell: Shell) -> Shell:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished.root, shell.root)
    return shell
