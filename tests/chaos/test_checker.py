"""The checker of chaos runs finds nothing in a sound run, and each fault in one that has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm.run.paths import RunDir
from tools.chaos import checker
from tools.chaos.cluster import Cluster
from tools.chaos.files import Result

Lines = list[dict[str, Any]]


def told(event: str, step: int, *, restart: int = 0, second: int) -> dict[str, Any]:
    return {"event": event, "time": f"2026-01-01T00:00:{second:02}.000Z", "job": "17", "restart": restart, "step": step}


def sound() -> tuple[Lines, Lines]:
    """Events and curve of a run of 10 steps that was killed after its save of step 4, and rolled back once."""
    events = [
        told("started", 0, second=1), told("checkpoint", 4, second=2),
        told("allocated", 4, restart=1, second=3), told("resumed", 4, restart=1, second=4),
        told("checkpoint", 8, restart=1, second=5), told("rollback", 9, restart=1, second=6),
        told("checkpoint", 8, restart=1, second=7), told("checkpoint", 10, restart=1, second=8),
        told("finished", 10, restart=1, second=9), told("requeued", 10, second=10),
    ]  # fmt: skip
    return events, [{"step": step, "loss": 1 / step} for step in (3, 6, 9, 10)]


def run_of(root: Path, events: Lines, curve: Lines) -> RunDir:
    run = RunDir(root / "run")
    run.events.mkdir(parents=True)
    run.run_json.write_text("{}")
    run.config.write_text("log: {every_steps: 3}\ntrain: {total_steps: 10}\n")
    for restart in (0, 1):
        lines = [json.dumps(e) + "\n" for e in events if e["restart"] == restart]
        (run.events / f"17.{restart}.jsonl").write_text("".join(lines))
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in curve))
    return run


def test_a_sound_run_is_found_sound(tmp_path: Path) -> None:
    run_of(tmp_path, *sound())
    checker.check(tmp_path)


FAULTS: dict[str, Callable[[Lines, Lines], object]] = {
    "the curve goes from step 6 to 6": lambda events, curve: curve.insert(1, curve[1]),
    "the curve goes from step 9 to 6": lambda events, curve: curve.insert(1, curve.pop(2)),
    "the curve lacks step 3": lambda events, curve: curve.pop(0),
    "the curve lacks step 9": lambda events, curve: curve.pop(2),
    "the curve has step 7": lambda events, curve: curve.insert(2, {"step": 7, "loss": 1}),
    "checkpoint at step 6 out of the dead life 17.0": lambda events, curve: events.append(
        told("checkpoint", 6, second=5)
    ),
    "resumed at step 2 after step 4 was saved": lambda events, curve: events[3].update(step=2),
    "checkpoint at step 8 after step 10 was saved": lambda events, curve: events.append(
        told("checkpoint", 8, restart=1, second=9)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(tmp_path: Path, fault: str) -> None:
    events, curve = sound()
    FAULTS[fault](events, curve)
    run_of(tmp_path, events, curve)
    with pytest.raises(checker.Unsound, match=fault):
        checker.check(tmp_path)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_runs_of_a_row_on_slurm_are_looked_at_when_it_is_over(tmp_path: Path, fault: str | None) -> None:
    """And a row whose own counts are right fails by them."""

    def row(site: Cluster, count: int) -> Result:
        events, curve = sound()
        if fault:
            FAULTS[fault](events, curve)
        site.runs += 1
        run_of(tmp_path, events, curve).path.rename(tmp_path / f"sbatch{site.runs}")
        return Result("", "", "", True)

    site = Cluster(None, tmp_path, "sbatch", runs=4)  # type: ignore[arg-type]
    if fault is None:
        assert site.row(row, 1).passed
    else:
        with pytest.raises(checker.Unsound, match=f"run sbatch5: .*{fault}"):
            site.row(row, 1)
    with pytest.raises(AssertionError, match="run 6 of the row is not there"):
        site.row(lambda site, count: setattr(site, "runs", 6) or Result("", "", "", True), 1)


def test_what_is_saved_may_go_back_after_a_rollback_alone(tmp_path: Path) -> None:
    events, curve = sound()
    del events[5]
    events[5]["step"] = 6
    run_of(tmp_path, events, curve)
    with pytest.raises(checker.Unsound, match="checkpoint at step 6 after step 8 was saved"):
        checker.check(tmp_path)
