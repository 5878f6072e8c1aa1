"""The chaos bench's rows on training lives, in reduced counts. kill-9 runs beside the rows of the writer."""

from __future__ import annotations

import pytest

from tools.chaos import processes


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in processes.ROWS if name != "kill-9"])
def test_a_run_ends_as_if_nothing_had_happened_after(name: str) -> None:
    row, _, reduced = processes.ROWS[name]
    result = row(reduced)
    assert result.passed, result
