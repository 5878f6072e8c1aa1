"""Training on a GPU by torch.compile, as test_training.py has it kernel by kernel; mostly its compiler's time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm.run.paths import RunDir
from tests.gpu.test_training import CALM, Life, assert_goes_on, assert_learns, assert_overflows, column
from tests.training import make_run


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_compiled_run_learns_what_a_run_learns_on_a_cpu(
    device: torch.device, tmp_path: Path, on_cpu: RunDir, amp: str
) -> None:
    assert_learns(device, make_run(tmp_path), on_cpu, amp, compiled=True)


def test_an_fp16_overflow_skips_the_step_of_a_compiled_run_and_lowers_the_scale(
    device: torch.device, tmp_path: Path
) -> None:
    assert_overflows(device, make_run(tmp_path), compiled=True)


def test_a_compiled_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    device: torch.device, tmp_path: Path
) -> None:
    assert_goes_on(device, tmp_path, "bf16", compiled=True)


def test_the_masks_of_a_step_cost_no_run_its_bits_at_another_micro_batch(device: torch.device, tmp_path: Path) -> None:
    """To rounding: with dropout, compiled, on the whole batch and on a quarter of it at a time."""
    losses = []
    for micro in (None, 2):
        run = make_run(tmp_path / str(micro))
        changes = {"train__global_batch": 8, "train__micro_batch": micro, "train__compile": True, "train__amp": "off"}
        with Life(run, device, **{**CALM, **changes, "model__dropout": 0.3}) as trainer:
            trainer.train(lambda: None)
        losses.append(column(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
