"""A run that is moved, renamed or deleted under its job: the job says so and ends, and nothing appears in its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import RunGone
from ddpm.run.paths import RunDir
from ddpm.training import telemetry
from tests.training import Life, assert_same_end, live, make_config, make_run

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
