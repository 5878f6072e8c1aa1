"""launch/life/training.py: what comes before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm.run.paths import RunDir
from ddpm.training.trainer import Outcome
from launch.life import training
from launch.life.preemption import StopFlag
from tests.training import ALONE


def test_how_many_images_fit_is_found_and_kept_where_kernels_are_compiled_for_the_next_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    @contextmanager
    def compiling(*_: object) -> Iterator[None]:
        told.append("compiling")
        yield
        told.append("compiled")

    monkeypatch.setattr(training, "_compiling", compiling)
    monkeypatch.setattr(training, "_leave_together", lambda life, world, code, reason="": code)
    monkeypatch.setattr(training, "read_run", lambda run: {"resolved": {"amp": "bf16"}})
    monkeypatch.setattr(training, "_keep", lambda run, fence, resolved: told.append(resolved))
    trainer: Any = SimpleNamespace(
        warm=False, config=None, fit=lambda: 8, warm_up=lambda stop: told.append("warm"),
        train=lambda stop: Outcome(True, 8),
    )  # fmt: skip
    monkeypatch.setattr(training, "score_milestones", lambda *_: None)
    life: Any = SimpleNamespace(run=RunDir(tmp_path), stop=StopFlag())
    assert training._until_the_end(life, ALONE, trainer, object()) == 0  # type: ignore[arg-type]
    assert told == ["compiling", {"amp": "bf16", "micro_batch": 8}, "warm", "compiled"]
