"""The chaos bench's row on copies of a running run, in reduced counts; test_files.py has the mutant of its safety."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import requires
from tools.chaos import copies


@pytest.mark.long
def test_copies_of_a_running_run_end_with_its_bits_or_are_refused() -> None:
    requires(shutil.which("rsync"), "rsync is not installed: copies by cp and tar alone", "apt-get install rsync")
    row, _, reduced = copies.ROWS["copies"]
    result = row(reduced)
    assert result.passed, result
