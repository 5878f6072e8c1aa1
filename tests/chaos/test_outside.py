"""Rows of what breaks from outside."""

from __future__ import annotations

import pytest

from tools.chaos import outside


@pytest.mark.parametrize("name", [name for name in outside.ROWS if name != "outside"])
def test_what_is_refused_or_mended_under(name: str) -> None:
    row, _, reduced = outside.ROWS[name]
    result = row(reduced)
    assert result.passed, result
