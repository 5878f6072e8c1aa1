"""Digests by which runs, data and caches are known: a run of an earlier commit is refused where they change."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.compat.harness import FIXTURE, RUNS, Machine, config_digests, packed, read, submit
from tests.conftest import requires

DIGESTS = read(FIXTURE / "digests.json")
"""By `FILE` or `FILE OVERRIDE …`."""


@pytest.fixture(scope="module")
def digests(untouched: Machine) -> dict[str, str]:
    asked = {name: (name.split()[0], name.split()[1:]) for name in DIGESTS}
    frozen: dict[str, tuple[str, list[str]]] = {n: (str(untouched.root / n / "config.yaml"), []) for n in RUNS}
    given: dict[str, tuple[str, list[str]]] = {f"{n}.yaml": (str(FIXTURE / f"{n}.yaml"), []) for n in RUNS}
    return config_digests(untouched, {**asked, **frozen, **given})


@pytest.mark.parametrize("name", DIGESTS, ids=list(DIGESTS))
def test_a_config_keeps_its_digest(digests: dict[str, str], name: str) -> None:
    assert digests[name] == DIGESTS[name]


@pytest.mark.parametrize("name", RUNS)
def test_an_old_runs_config_has_the_digest_that_it_was_submitted_with(
    digests: dict[str, str], prepared: Machine, name: str
) -> None:
    old = read(FIXTURE / name / "run.json")["config_digest"]
    assert digests[name] == digests[f"{name}.yaml"] == old
    assert read(prepared.root / name / "run.json")["config_digest"] == old


def test_images_are_packed_to_the_same_pixels_under_the_same_keys(prepared: Machine, expected: dict[str, Any]) -> None:
    old = {key: meta for key, meta in expected["packed"].items() if meta["name"] == "images"}
    assert len(old) == 2 and packed(prepared) == old  # train and test
    for name in RUNS:
        record, before = (read(run / name / "run.json")["data"] for run in (prepared.root, FIXTURE))
        assert {k: v for k, v in record.items() if k != "cache"} == {k: v for k, v in before.items() if k != "cache"}


def test_digits_are_packed_to_the_same_pixels_under_the_same_key(tmp_path: Path, expected: dict[str, Any]) -> None:
    requires(importlib.util.find_spec("sklearn"), "no scikit-learn here", "tools/env.sh test")
    machine = Machine(tmp_path / "machine")
    run = submit(machine, "configs/quickstart.yaml", "--prepare")
    assert packed(machine) == {key: meta for key, meta in expected["packed"].items() if meta["name"] == "digits"}
    assert read(run / "run.json")["config_digest"] == DIGESTS["configs/quickstart.yaml"]
