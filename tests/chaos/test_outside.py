"""A tenth of the table of what breaks from outside, chosen anew each time: its seed is told where a cell is bad."""

from __future__ import annotations

from tools.chaos import outside


def test_a_run_broken_from_outside_ends_the_same_or_is_refused_by_name() -> None:
    row, _, tenth = outside.ROWS["outside"]
    result = row(tenth)
    print(result.fault)  # with the seed
    assert result.passed, result
