"""Which cases of an expensive family run: some, drawn anew each time by a seed that is told; all with DDPM_TEST_FULL=1.

DDPM_TEST_SEED=N draws again what a run with the seed N drew.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
FULL = bool(os.environ.get("DDPM_TEST_FULL"))
SEED = os.environ.get("DDPM_TEST_SEED") or str(random.SystemRandom().randrange(1_000_000))
TOLD: list[str] = []
"""A line for each family of which some were drawn."""


def drawn(family: str, cases: Iterable[T], count: int) -> list[T]:
    """`count` of `cases`, in their order; how many depends on DDPM_TEST_FULL, which ones on the seed and the family."""
    there = list(cases)
    if FULL or count >= len(there):
        return there
    chosen = sorted(random.Random(f"{SEED} {family}").sample(range(len(there)), count))
    TOLD.append(f"{family}: {count} of {len(there)}")
    return [there[i] for i in chosen]
