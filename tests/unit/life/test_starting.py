"""launch/life/starting.py: what a life finds out and tells before it loads torch. SLURM's answers are given here."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm.run import generations
from ddpm.run.events import EventLog, read_events
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.cluster.environment import JobEnvironment
from launch.life import compiled
from launch.life.life import Life
from launch.life.preemption import StopFlag
from launch.life.starting import start_training
from tests.training import make_config

ENV = JobEnvironment("slurm", "17", 2, "n1", 0, 2, 0, "n1", 0, 1, None, "2026-11-27T09:00:00.000Z")
SHOWN = scheduler.Shown("RUNNING", 2, True, "gpu", "normal", "1:00:00", "2026-11-27T08:59:00.000Z")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text(make_config().to_yaml())
    run.run_json.write_text("{}")
    return run


@pytest.fixture
def starts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """starts(env, what SLURM shows or raises): why there is nothing to train, and the life."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    chosen: list[int] = []
    monkeypatch.setattr(compiled, "choose_folder", lambda: chosen.append(1))  # torch looks for it as it is loaded

    def start(env: JobEnvironment, shows: Any = SHOWN) -> tuple[str | None, Life]:
        def show(job: str, *, timeout_s: float) -> scheduler.Shown | None:
            if isinstance(shows, Exception):
                raise shows
            return shows

        monkeypatch.setattr(scheduler, "show", show)
        life = Life(run, StopFlag(), env)
        why = start_training(life)[1]
        assert chosen
        return why, life

    return start


FAILS = AssertionError("SLURM was asked")
SILENT = scheduler.NoAnswer("away")


@pytest.mark.parametrize(("env", "shows", "ended"), [
    (ENV, SHOWN, SHOWN.queued_at), (ENV, replace(SHOWN, queued_at=None), None), (ENV, None, None), (ENV, SILENT, None),
    (replace(ENV, restart=0), FAILS, None), (replace(ENV, scheduler="local"), FAILS, None),
])  # fmt: skip
def test_a_life_that_was_put_back_tells_when_the_nodes_of_the_one_before_were_free_again(
    run: RunDir, starts: Callable[..., Any], env: JobEnvironment, shows: Any, ended: str | None
) -> None:
    assert starts(env, shows)[0] is None
    (event,) = read_events(run)
    assert (event["event"], event["world_size"], event.get("former_life_ended")) == ("allocated", 2, ended)
    assert event["code"] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_one_rank_tells_for_all(run: RunDir, starts: Callable[..., Any]) -> None:
    assert starts(replace(ENV, rank=1), FAILS)[0] is None
    assert read_events(run) == []


def test_a_run_with_nothing_to_train_had_no_life(
    run: RunDir, starts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[RunDir] = []
    monkeypatch.setattr(generations, "read_ahead", read.append)
    run.stop_file.touch()
    assert "forbids training" in starts(ENV, FAILS)[0]
    assert read_events(run) == read == []
    run.stop_file.unlink()
    starts(ENV)
    assert read == [run]


def test_a_stop_that_comes_after_the_start_is_heeded(run: RunDir, starts: Callable[..., Any]) -> None:
    _, life = starts(ENV)
    run.stop_file.touch()
    assert life.stop() == "STOP"


def test_a_full_disk_keeps_no_life_from_training(
    run: RunDir, starts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventLog, "append", full)
    assert starts(ENV)[0] is None
    assert "event not written" in capsys.readouterr().out
