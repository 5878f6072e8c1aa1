"""What scripts say is what they said: help, dry runs, refusals, and what they tell of old runs."""

from __future__ import annotations

import pytest

from tests.compat.harness import Machine
from tests.compat.text import NAMES, TEXT, said


@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_what_it_said(untouched: Machine, name: str) -> None:
    assert said(untouched, name) == (TEXT / f"{name}.txt").read_text()


def test_every_kept_text_is_compared() -> None:
    assert sorted(path.stem for path in TEXT.glob("*.txt")) == sorted(NAMES)
