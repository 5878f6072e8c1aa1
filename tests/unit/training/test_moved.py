"""A run that is moved, renamed or deleted under its job: the job says so and ends, and nothing appears in its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import RunGone
from ddpm.run.paths import RunDir
from ddpm.training import telemetry
from ddpm.training.trainer import Trainer
from tests.training import Life, assert_same_end, live, make_config, make_run, poison

OPTIONS: dict[str, Any] = {"log__every_steps": 1, "log__grid_every_steps": 3, "checkpoint__every_steps": 2}


def rename(run: RunDir) -> None:
    run.path.rename(run.path.with_name("elsewhere"))


def delete(run: RunDir) -> None:
    shutil.rmtree(run.path)


@pytest.mark.parametrize("what", [rename, delete])
@pytest.mark.parametrize("beats", [False, True])
def test_a_run_that_goes_away_ends_its_job_and_no_folder_appears_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any, beats: bool
) -> None:
    """Whether a heartbeat, a line, a grid or a save comes first."""
    if beats:
        monkeypatch.setattr(telemetry, "HEARTBEAT_EVERY_S", 0.0)
    config, run, calm = make_config(**OPTIONS), make_run(tmp_path / "run"), make_run(tmp_path / "calm")
    with Life(config, run) as life:
        asked: list[int] = []

        def stop_requested() -> str | None:
            if life.trainer.at.step == 5 and not asked:
                asked.append(5)
                life.trainer.chronicle.settle()
                what(run)
            return None

        with pytest.raises(RunGone, match="was moved, renamed or deleted"):
            life.trainer.train(stop_requested)
        assert life.trainer.at.step < 8
    assert not run.path.exists()
    if what is rename:
        live(config, calm)
        live(config, RunDir(tmp_path / "elsewhere"))
        assert_same_end(RunDir(tmp_path / "elsewhere"), calm, 8)


def test_a_run_that_takes_the_name_of_one_that_was_moved_is_told_nothing_of_its_steps(tmp_path: Path) -> None:
    config, run = make_config(**{**OPTIONS, "checkpoint__every_steps": None}), make_run(tmp_path / "run")

    def moved(trainer: Trainer) -> bool:
        if trainer.at.step == 5:
            rename(run)
            (run.path / "events").mkdir(parents=True)
        return bool(trainer.at.step == 5)

    with Life(config, run) as life:
        poison(life.trainer, moved)  # so that the first thing to tell is an event
        with pytest.raises(RunGone, match="was moved, renamed or deleted"):
            life.train()
    assert [p.name for p in run.path.rglob("*")] == ["events"]
