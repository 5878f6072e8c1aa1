"""ddpm/training/due.py: after which steps something is due."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ddpm.config.schema import Config
from ddpm.training.due import Due

STEPS = 12


def due(**keys: Any) -> Due:
    """For 12 steps of 4 of 10 images."""
    tree: dict[str, dict[str, Any]] = {
        "train": {"total_steps": STEPS, "warmup_steps": 0, "global_batch": 4},
        "checkpoint": {"every_min": None, "every_steps": None, "milestone_every_steps": None},
        "log": {"every_steps": 1, "grid_every_steps": None},
    }
    for key, value in keys.items():
        tree["checkpoint" if "milestone" in key or key in ("every_min", "every_steps") else "log"][key] = value
    return Due(Config.model_validate(tree), num_images=10)


@pytest.mark.parametrize(("what", "key", "every", "steps"), [
    ("grid", "grid_every_steps", 4, [4, 8]),  # the last is drawn anyway
    ("grid", "grid_every_steps", 1, [*range(1, STEPS)]),
    ("histogram", "histogram_every_steps", 4, [4, 8]),  # after the last there are no gradients
    ("validate", "validate_every_steps", 5, [5, 10, 12]),
    ("milestone", "milestone_every_steps", 5, [5, 10]),
    ("milestone", "milestone_every_steps", 6, [6, 12]),
    ("milestone", "milestone_every_epochs", 1, [3, 5, 8, 10]),  # with 12, 20, 32, 40 images
    ("milestone", "milestone_every_epochs", 2, [5, 10]),
])  # fmt: skip
def test_what_comes_every_so_often_comes_after_these_steps_and_never_where_it_is_not_asked_for(
    what: str, key: str, every: int, steps: list[int]
) -> None:
    asked, not_asked = getattr(due(**{key: every}), what), getattr(due(), what)
    assert [step for step in range(STEPS + 1) if asked(step)] == steps
    assert not any(not_asked(step) for step in range(STEPS + 1))


def test_the_first_step_beyond_a_whole_epoch_counts_though_no_step_ends_with_it() -> None:
    assert [step for step in range(1, STEPS + 1) if due(milestone_every_epochs=3).milestone(step)] == [8]


@pytest.mark.parametrize(("keys", "since_s", "steps"), [
    ({"every_steps": 4}, 0, [4, 8]),
    ({"every_min": 2}, 119.9, []),
    ({"every_min": 2}, 120.0, [*range(1, STEPS)]),
    ({"milestone_every_steps": 5}, math.inf, [5, 10]),
    ({"every_steps": 4, "milestone_every_epochs": 2}, math.inf, [4, 5, 8, 10]),
    ({}, math.inf, []),
])  # fmt: skip
def test_a_save_comes_by_steps_by_time_and_at_milestones_and_not_at_the_end_which_saves_by_itself(
    keys: dict[str, Any], since_s: float, steps: list[int]
) -> None:
    asked = due(**keys)
    assert [step for step in range(1, STEPS + 1) if asked.save(step, since_s)] == steps
