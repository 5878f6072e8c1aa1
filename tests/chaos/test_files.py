"""The chaos bench's rows without a scheduler, in reduced counts, and proof that they can fail."""

from __future__ import annotations

import pytest

from tools.chaos import files, mutants, processes


@pytest.mark.parametrize("name", files.ROWS)
def test_the_writer_keeps_its_promise_under(name: str) -> None:
    row, _, reduced = files.ROWS[name]
    result = row(reduced)
    assert result.passed, result


def test_a_killed_trainer_loses_nothing_acknowledged_and_ends_the_same() -> None:
    row, _, reduced = processes.ROWS["kill-9"]
    result = row(reduced)
    assert result.passed, result


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_row_notices_the_mutant(name: str) -> None:
    row, broken = mutants.MUTANTS[name]
    with broken():
        assert not files.ROWS[row][0](files.ROWS[row][2]).passed
