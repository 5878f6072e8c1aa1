"""A run directory that is renamed under its jobs: each says so and ends for good, and nothing appears in its place."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import EXIT_FATAL
from ddpm.run.paths import RunDir
from tools.chaos import lives


@pytest.mark.long
def test_a_training_job_says_that_its_run_was_moved_and_the_run_goes_on_where_it_is(tmp_path: Path) -> None:
    options = ("train.total_steps=12", "checkpoint.every_steps=2", "log.every_steps=1")
    run, calm = lives.prepare(tmp_path, "run", *options), lives.prepare(tmp_path, "calm", *options)
    moved = RunDir(tmp_path / "moved")

    def move(trainer: Any) -> None:
        trainer.chronicle.settle()
        run.path.rename(moved.path)
        time.sleep(0.1)

    code = lives.ended(lives.life(run, lives.at_steps({6: move})))
    log = lives.log_of(moved).read_text()
    assert code == EXIT_FATAL and f"{run.path} was moved, renamed or deleted" in log and "Traceback" not in log, log
    assert f"it is {moved.path} now" in log and not run.path.exists()
    assert [lives.ended(lives.life(r)) for r in (moved, calm)] == [0, 0]
    assert lives.same_end(moved, calm)
