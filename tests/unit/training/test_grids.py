"""ddpm/training/grids.py: the same pictures wherever a run was stopped, each shown once."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm.config.schema import Config
from ddpm.diffusion import schedule
from ddpm.network.build import build_model
from ddpm.run import generations
from ddpm.run.paths import RunDir
from ddpm.training import grids, ranks
from ddpm.training.trainer import Outcome
from tests.training import (
    ALONE,
    Killed,
    Life,
    assert_same_end,
    live,
    make_config,
    make_run,
    on_ranks,
    poison,
)

TOTAL = 8


def grid_of(run: RunDir, step: int) -> np.ndarray:
    with Image.open(run.grid(step)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_grid_shows_the_weights_that_the_config_samples_and_changes_no_step(tmp_path: Path, weights: str) -> None:
    plain, run = make_run(tmp_path / "plain"), make_run(tmp_path / "grids")
    options: dict[str, Any] = {"model__dropout": 0.5, "train__lr": 0.1, "checkpoint__every_steps": 1}
    live(make_config(**options), plain)
    config = make_config(**options, sample__weights=weights, log__grid_every_steps=3)
    live(config, run)
    assert_same_end(plain, run, TOTAL)
    network = build_model(config, torch.device("cpu"), "off")
    network.load_state_dict(generations.load(run, TOTAL)[weights])
    drawn = grids.draw(config, network.eval(), schedule.build(config.diffusion), "off", lambda: None)
    assert np.array_equal(grid_of(run, TOTAL), drawn) and run.grid(3).exists()


class Full:
    """In place of `eps_of`: at the steps given, the third evaluation runs out of memory."""

    def __init__(self, at: list[int], life: Life, of: Any) -> None:
        self.at, self.life, self.of = at, life, of

    def __call__(self, *of: Any) -> Any:
        eps, calls = self.of(*of), 0

        def evaluate(*given: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if self.life.trainer.at.step in self.at and calls == 3:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED\nSo many bytes")
            return eps(*given)

        return evaluate


def live_on_a_full_gpu(world: ranks.World, config: Config, run: RunDir) -> None:
    with Life(config, run, world=world) as life:
        grids.eps_of = Full([2, 4, 8], life, grids.eps_of)  # type: ignore[assignment]
        assert life.train() == Outcome(True, TOTAL)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_grid_that_does_not_fit_is_left_out_and_the_next_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], world_size: int
) -> None:
    plain, run = make_run(tmp_path / "plain"), make_run(tmp_path / "full")
    config = make_config(log__grid_every_steps=2)
    monkeypatch.setattr(grids, "eps_of", grids.eps_of)
    if world_size == 1:
        live(config, plain)
        live_on_a_full_gpu(ALONE, config, run)
    else:
        on_ranks(2, live_undisturbed, config, plain)
        on_ranks(2, live_on_a_full_gpu, config, run)
    assert_same_end(plain, run, TOTAL)
    assert [step for step in range(1, TOTAL + 1) if run.grid(step).exists()] == [6]
    told = capfd.readouterr().out
    line = "no grid: it does not fit beside the steps step={} error=cuDNN error: CUDNN_STATUS_ALLOC_FAILED\n"
    assert world_size > 1 or [told.count(line.format(step)) for step in (2, 4, 6, 8)] == [1, 1, 0, 1]


def live_undisturbed(world: ranks.World, config: Config, run: RunDir) -> None:
    with Life(config, run, world=world) as life:
        life.train()


def stop_rank_1_within_a_grid(world: ranks.World, config: Config, run: RunDir) -> None:
    with Life(config, run, world=world) as life:
        asked = 0

        def stop_requested() -> str | None:
            nonlocal asked
            asked += life.trainer.at.step == 4  # once after the step, then in its grid
            return "preempted" if world.rank == 1 and asked >= 4 else None

        assert life.trainer.train(stop_requested) == Outcome(False, 4, "preempted", True)
        assert asked == 4, "the grid went on"


def test_a_stop_asked_of_another_rank_ends_the_grid_that_rank_0_draws(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    on_ranks(2, stop_rank_1_within_a_grid, make_config(log__grid_every_steps=4), run)
    assert not run.grid(4).exists() and run.steps_saved() == [4]


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_run_draws_the_same_grids_wherever_it_was_stopped(tmp_path: Path, step: int) -> None:
    config = make_config(log__grid_every_steps=4)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    live(config, other, stops=[step])
    assert sorted(p.name for p in one.grids.iterdir()) == ["step-000000004.png", "step-000000008.png"]
    for step in (4, TOTAL):
        assert one.grid(step).read_bytes() == other.grid(step).read_bytes()


def test_after_a_rollback_a_grid_is_of_the_weights_that_were_kept_and_is_shown_once(tmp_path: Path) -> None:
    config, run = make_config(log__grid_every_steps=4, checkpoint__every_steps=4), make_run(tmp_path)
    for kill_at in (5, 5, None):
        with contextlib.suppress(Killed), Life(config, run) as life:
            poison(life.trainer, lambda t: t.at.step == 2 and t.at.attempt == 0)
            life.train(kill_at=kill_at)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [e.step for e in board.Images("samples")] == [4, 8]


@pytest.mark.parametrize("damage", ["torn", "of no kind", "bad chunk", "bad header"])
def test_a_damaged_picture_ends_no_life(tmp_path: Path, damage: str) -> None:
    config, run = make_config(log__grid_every_steps=2, checkpoint__every_steps=3), make_run(tmp_path)
    with pytest.raises(Killed), Life(config, run) as life:
        life.train(kill_at=5)
    good = run.grid(4).read_bytes()
    after = good[:8] + b"\0\0\0\5IHDR\0\0\0\1\0" + bytes(40)
    damaged = {"torn": good[:-20], "of no kind": b"", "bad chunk": good[:37] + b"\xff" + good[38:], "bad header": after}
    run.grid(4).write_bytes(damaged[damage])
    assert live(config, run).step == TOTAL


@pytest.mark.parametrize("save_every", [3, 4])
def test_tensorboard_shows_each_grid_once_though_a_life_died_after_it_drew_one(tmp_path: Path, save_every: int) -> None:
    config, run = make_config(log__grid_every_steps=2, checkpoint__every_steps=save_every), make_run(tmp_path)
    with pytest.raises(Killed), Life(config, run) as life:
        life.train(kill_at=5)
    assert run.grid(4).exists()
    live(config, run)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [e.step for e in board.Images("samples")] == [2, 4, 6, 8]
