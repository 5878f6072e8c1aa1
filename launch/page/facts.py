"""Reads a run once for its page: whatever of it exists, and in words what of it cannot be read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import DDPMError
from ddpm.run.files import DamagedFile, read_bytes, read_json
from ddpm.run.forms import RUN_TOO
from ddpm.run.paths import RunDir
from ddpm.run.records import read_heartbeat, thin_metrics
from ddpm.scoring.record import Score
from launch.queue.sets import good_scores
from launch.terminal.lacking import Damage
from launch.terminal.overview import read_life

SHOWN_BYTES = 64 << 10
"""Most of config.yaml's text that is shown."""


@dataclass(frozen=True)
class Facts:
    run: RunDir
    row: dict[str, Any]
    """As `overview.describe` has it."""
    record: dict[str, Any]
    """What in run.json is of the form that it should have."""
    config: Config | None
    config_text: str
    events: list[dict[str, Any]]
    beat: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Each `every`-th line of metrics.jsonl, and some more."""
    every: int
    scores: list[Score]
    """The scores that hold: those of many samples first, then those of late steps, then the new ones."""
    damage: tuple[str, ...]
    made: float
    """Unix time."""


def read(run: RunDir, row: dict[str, Any]) -> Facts:
    """row: the run's, of `overview.describe`."""
    damage = Damage()
    damage.tell(row["problem"] or "")
    text = damage.read(lambda: read_bytes(run.config, SHOWN_BYTES)) or b""
    metrics, every = damage.read(lambda: thin_metrics(run)) or ([], 1)
    config = _config(run)
    return Facts(
        run=run,
        row=row,
        record=_record(run),
        config=config,
        config_text=text.decode(errors="replace").strip(),
        events=read_life(run)[0],
        beat=read_heartbeat(run),
        metrics=metrics,
        every=every,
        scores=damage.read(lambda: good_scores(run, config.evaluate if config else None)) or [],
        damage=tuple(damage.told),
        made=time.time(),
    )


def _record(run: RunDir) -> dict[str, Any]:
    """Unlike a job, a page shows what is left of a run.json that was edited; the row says what is wrong with it."""
    trees = ("versions", "labels")
    return {
        key: value
        for key, value in (read_json(run.run_json) or {}).items()
        if (key not in RUN_TOO or RUN_TOO[key](value)) and (key not in trees or isinstance(value, dict))
    }


def _config(run: RunDir) -> Config | None:
    """The run's config; None if it cannot be read, which the row says."""
    try:
        return reading.load(run.config)
    except (DDPMError, DamagedFile, OSError):
        return None
