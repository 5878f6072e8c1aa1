"""A fortieth of the table of what breaks from outside, chosen anew each time: its seed is told where a cell is bad."""

from __future__ import annotations

import pytest

from tools.chaos import outside


def test_a_run_broken_from_outside_ends_the_same_or_is_refused_by_name() -> None:
    row, _, some = outside.ROWS["outside"]
    result = row(some)
    print(result.fault)  # with the seed
    assert result.passed, result


@pytest.mark.parametrize("name", [name for name in outside.ROWS if name != "outside"])
def test_what_is_refused_or_mended_under(name: str) -> None:
    row, _, reduced = outside.ROWS[name]
    result = row(reduced)
    assert result.passed, result
