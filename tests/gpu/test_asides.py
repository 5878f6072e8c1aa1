"""What is computed beside the steps on a GPU, histograms and a validation loss, changes no bit of later steps, and no
other step waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.run import generations
from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir
from ddpm.training.ranks import World
from tests.training import Life, differences, make_config, make_images, make_run

TOTAL = 24
ASIDE = {"log__histogram_every_steps": 6, "log__validate_every_steps": 8}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_histograms_and_validation_change_no_bit_and_no_other_step_waits(
    device: torch.device, tmp_path: Path, amp: str
) -> None:
    def trained(name: str, **asides: int) -> tuple[RunDir, list[tuple[int, set[str]]]]:
        options: dict[str, Any] = {"train__total_steps": TOTAL, "train__amp": amp, "train__deterministic": True}
        options |= {
            "train__lr": 1e-4,
            "model__base_channels": 32,
            "model__dropout": 0.1,
            "log__every_steps": 8,
            **asides,
        }
        run, told = make_run(tmp_path / name), list[tuple[int, set[str]]]()
        held_out = make_images(20) if asides else None
        life = Life(make_config(**options), run, world=World(0, 1, device), images=make_images(50), held_out=held_out)
        with life:
            trainer, show = life.trainer, life.trainer.chronicle.histograms

            def histograms(step: int, values: Mapping[str, np.ndarray]) -> None:
                told.append((step, {part for part, of_part in values.items() if of_part.size and of_part.any()}))
                show(step, values)

            def stop_requested() -> None:
                step = trainer.at.step  # up to here; what is due after it comes next
                calm = 5 <= step < TOTAL and step % 6 and step % 8
                torch.cuda.set_sync_debug_mode("error" if calm else "default")

            trainer.chronicle.histograms = histograms  # type: ignore[method-assign]
            try:
                assert trainer.train(stop_requested).finished
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert trainer.step._replay is not None
        return run, told

    (plain, nothing), (told_of, told) = trained("plain"), trained("told", **ASIDE)
    assert differences(generations.load(plain, TOTAL), generations.load(told_of, TOTAL)) == []
    assert nothing == [] and [step for step, _ in told] == [6, 12, 18]
    assert all({"conv_in", "encoder", "decoder", "conv_out"} <= parts for _, parts in told)
    losses = [line.get("validation_loss") for line in read_jsonl(told_of.metrics)]
    assert len(losses) == 3 and all(loss and np.isfinite(loss) for loss in losses)
