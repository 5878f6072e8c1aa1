"""The fixture's runs, gone on with by today's code: once for all tests, which leave them as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compat.harness import FIXTURE, TEST_SPLIT_TOO, Machine, read, submit
from tests.compat.text import with_runs
from tests.conftest import requires

COMPARISONS = ["bit for bit", "within a tolerance"]


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    """What the commit that made the fixture ended with."""
    return dict(read(FIXTURE / "expected.json.xz"))


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The runs as they were left, on a machine of this session's."""
    return with_runs(tmp_path_factory.mktemp("untouched") / "machine")


@pytest.fixture(scope="session")
def kind(untouched: Machine) -> dict[str, str]:
    return untouched.kind()


@pytest.fixture(params=COMPARISONS)
def exact(request: pytest.FixtureRequest, expected: dict[str, Any], kind: dict[str, str]) -> bool:
    """How a test compares: with the digests, where this machine computes as the fixture's did, and with the values."""
    if request.param != COMPARISONS[0]:
        return False
    theirs = expected["kind"]
    differing = [key for key in theirs if kind[key] != theirs[key]]
    other = ", ".join(f"{key} {kind[key] or 'unknown'}, not {theirs[key]}" for key in differing)
    requires(not other, f"the fixture's bits are those of another machine ({other})", "run it on one of that kind")
    return True


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The killed run, gone on with by the entry of every job; its data has to be packed again."""
    machine = Machine(tmp_path_factory.mktemp("trained") / "machine")
    run = machine.bring("killed")
    machine("-m", "launch.jobs", "train", str(run))
    return run


@pytest.fixture(scope="session")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run: its half-made set finished and scored, its small set scored again."""
    machine = Machine(tmp_path_factory.mktemp("completed") / "machine")
    run = machine.bring("sampled")
    machine("launch/sample.py", "sampled", "--set", "half", "--wait")
    machine("launch/evaluate.py", "sampled", "--set", "half", "--wait")
    (run / "eval" / "small.json").unlink()
    machine("-m", "launch.jobs", "evaluate", str(run), "small")
    return run


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, submitted again with more steps."""
    machine = Machine(tmp_path_factory.mktemp("extended") / "machine")
    machine.bring("sampled")
    return submit(machine, str(machine.home / "sampled.yaml"), "train.total_steps=30", "--wait")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Both splits of the images packed for a new run, by the configs that the fixture's runs were submitted with."""
    machine = Machine(tmp_path_factory.mktemp("prepared") / "machine")
    machine.bring_inputs()
    for name in ("killed", "sampled"):
        submit(machine, str(machine.home / f"{name}.yaml"), *TEST_SPLIT_TOO)
    return machine
