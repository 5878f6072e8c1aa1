"""The chaos bench's row on copies of a running run, in reduced counts, and proof that it can fail."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import requires
from tools.chaos import copies, mutants


def test_copies_of_a_running_run_end_with_its_bits_or_are_refused() -> None:
    requires(shutil.which("rsync"), "rsync is not installed: copies by cp and tar alone", "apt-get install rsync")
    row, _, reduced = copies.ROWS["copies"]
    result = row(reduced)
    assert result.passed, result


@pytest.mark.parametrize("name", [name for name, mutant in mutants.MUTANTS.items() if mutant.row in copies.ROWS])
def test_the_row_notices_the_mutant(name: str) -> None:
    row, _, reduced = copies.ROWS[mutants.MUTANTS[name].row]
    with mutants.replaced(mutants.MUTANTS[name]):
        assert not row(reduced).passed
