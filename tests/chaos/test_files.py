"""The chaos bench's rows without a scheduler, in reduced counts, and proof that they can fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from tests.draws import drawn
from tools.chaos import anywhere, files, mutants, outside, processes

WRITER = {**files.ROWS, **anywhere.ROWS}
QUICK = {**WRITER, **outside.ROWS}


@pytest.mark.parametrize("name", WRITER)
def test_the_writer_keeps_its_promise_under(name: str) -> None:
    row, _, reduced = WRITER[name]
    result = row(reduced)
    assert result.passed, result


def test_a_killed_trainer_loses_nothing_acknowledged_and_ends_the_same() -> None:
    row, _, reduced = processes.ROWS["kill-9"]
    result = row(reduced)
    assert result.passed, result


NOTICED = [name for name, mutant in mutants.MUTANTS.items() if mutant.row in QUICK]


@pytest.mark.parametrize("name", drawn("mutants of quick rows", NOTICED, 2))
def test_a_row_notices_the_mutant(name: str) -> None:
    mutant = mutants.MUTANTS[name]
    row, _, reduced = QUICK[mutant.row]
    with mutants.replaced(mutant):
        assert not row(reduced).passed


@pytest.mark.parametrize("name", drawn("mutated copies", mutants.MUTANTS, 1))
def test_a_copy_of_the_project_has_the_mutant_in_every_process(name: str) -> None:
    module, function = mutants.MUTANTS[name].module, mutants.MUTANTS[name].name
    look = f"import pkgutil; f = pkgutil.resolve_name('{module}:{function}'); print(f.__code__.co_filename)"
    with mutants.tree_with(PROJECT, name) as tree:
        done = subprocess.run([sys.executable, "-c", look], cwd=tree, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tree / "tools/chaos/mutants.py")
