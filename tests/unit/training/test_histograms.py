"""ddpm/training/histograms.py: gradients by part of the network, where they are asked for, and no step is another."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm.run import generations
from ddpm.training import histograms
from ddpm.training.step import Step
from tests.training import Life, differences, live, make_config, make_run

OPTIONS: dict[str, Any] = {"log__every_steps": 4, "model__dropout": 0.5}
"""The first histogram, of step 3, is the first that TensorBoard shows of a life."""
TOTAL = 8


def shown(tensorboard: Path) -> dict[str, list[int]]:
    board = EventAccumulator(str(tensorboard), size_guidance={"histograms": 0}).Reload()
    return {tag: [e.step for e in board.Histograms(tag)] for tag in board.Tags()["histograms"]}


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_histograms_are_shown_where_asked_for_alone_and_change_no_step(tmp_path: Path, amp: str) -> None:
    plain, told = make_run(tmp_path / "plain"), make_run(tmp_path / "told")
    live(make_config(**OPTIONS, train__amp=amp), plain)
    live(make_config(**OPTIONS, train__amp=amp, log__histogram_every_steps=3), told)
    assert differences(generations.load(plain, TOTAL), generations.load(told, TOTAL)) == []
    assert shown(plain.tensorboard) == {}
    found = shown(told.tensorboard)
    assert {"gradients/conv_in", "gradients/conv_out", "gradients/time_mlp"} <= found.keys()
    assert all(steps == [3, 6] for steps in found.values())


def test_they_are_those_of_the_next_step_and_leave_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "MOST_VALUES", 10)
    with Life(make_config(**OPTIONS), make_run(tmp_path)) as life:
        step = life.trainer.step
        found = histograms.of_gradients(step)
        parameters = dict(step.state.model.named_parameters())
        assert all(p.grad is None for p in parameters.values())
        assert found.keys() == {name.partition(".")[0] for name in parameters}
        assert all(0 < values.size <= 10 for values in found.values())
        step.gradients(step.given())
        whole = parameters["conv_out.weight"].grad
        assert whole is not None and step.micro == step.share
        assert found["conv_out"][0] == pytest.approx(float(whole.flatten()[0]), rel=1e-5)
        step.state.optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("fits", [0, 2])
def test_where_not_all_images_fit_beside_the_steps_they_are_of_fewer_or_none_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fits: int
) -> None:
    tried = []
    alone = Step.gradients_alone

    def small(step: Step, num: int) -> AbstractContextManager[None]:
        tried.append(num)
        if num > fits:
            raise torch.OutOfMemoryError if num > 2 else RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return alone(step, num)

    plain, told = make_run(tmp_path / "plain"), make_run(tmp_path / "told")
    live(make_config(**OPTIONS), plain)
    monkeypatch.setattr(Step, "gradients_alone", small)
    live(make_config(**OPTIONS, log__histogram_every_steps=3), told)
    assert tried == 2 * ([4, 2, 1] if fits == 0 else [4, 2])
    assert capsys.readouterr().out.count("no histograms: not one image fits") == (2 if fits == 0 else 0)
    assert differences(generations.load(plain, TOTAL), generations.load(told, TOTAL)) == []
    assert shown(told.tensorboard).get("gradients/conv_in", []) == ([] if fits == 0 else [3, 6])
