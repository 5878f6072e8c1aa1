"""ddpm/training/progress.py: the sums of which a line of metrics is made."""

from __future__ import annotations

import math

import torch

from ddpm.training.progress import Window
from ddpm.training.ranks import World
from tests.training import ALONE, CPU


def add(window: Window, *losses_and_norms: tuple[float, float]) -> None:
    for loss, norm in losses_and_norms:
        window.add(torch.tensor(loss), torch.tensor(norm))
        window.steps += 1


def sums(window: Window) -> tuple[float, float, int]:
    return float(window.loss), float(window.grad_norm), window.steps


def test_a_line_sums_its_own_steps_and_no_norm_that_is_no_number() -> None:
    window = Window.empty(CPU)
    add(window, (1.0, 2.0), (3.0, math.inf), (0.5, math.nan), (0.5, 4.0))
    assert sums(window) == (5.0, 6.0, 4)
    window.begin()
    add(window, (0.25, 8.0))
    assert sums(window) == (0.25, 8.0, 1)


def test_a_window_goes_on_where_it_was_saved_and_at_another_world_size_with_each_ranks_mean() -> None:
    window = Window.empty(CPU)
    add(window, (1.0, 2.0), (3.0, 4.0))
    again = Window.restored(window.state_dict(ALONE), ALONE)
    assert sums(again) == sums(window)
    add(again, (1.0, 1.0))
    assert sums(window) == (4.0, 6.0, 2)  # a copy
    of_two = {"loss": torch.tensor([1.0, 5.0]), "grad_norm": torch.tensor(6.0), "steps": 2}
    assert sums(Window.restored(of_two, World(1, 2, CPU))) == (5.0, 6.0, 2)
    assert sums(Window.restored(of_two, ALONE)) == (3.0, 6.0, 2)
