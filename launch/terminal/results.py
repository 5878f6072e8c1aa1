"""What came out: of a run whose chain is done, as a table; a score in a few lines, or whole for programs."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm.config.schema import Config
from ddpm.run.events import read_events
from ddpm.run.files import read_json
from ddpm.run.log import counted, plain
from ddpm.run.paths import RunDir
from ddpm.run.records import thin_metrics
from ddpm.scoring.record import (
    SCORE_NAMES,
    all_scores,
    ends,
    key_of,
    limit,
    number,
    rounded,
    scores_of,
    told,
    with_spread,
)
from launch.queue.sets import chain_set, score_by, wrong_with
from launch.terminal import logfiles, unheard


def print_results(run: RunDir, config: Config, stages: list[str]) -> None:
    """stages: what followed training."""
    step = run.latest_step()
    name = chain_set(run, config)
    score = score_by(run, name, config.evaluate) if "evaluate" in stages else None
    metrics = [m for m in thin_metrics(run)[0] if m["step"] <= step]
    rows = {"steps": f"{step}"}
    if metrics:
        rows["images/s"] = f"{statistics.median(m['images_per_s'] for m in metrics):.0f}"
        rows["loss"] = f"{metrics[-1]['loss']:.4f}"
    if score:
        rows["score"] = told(score.record) + ("" if key_of(score.record) == "fid" else ": no FID")
        rows["score file"] = f"{score.path}"
    elif "evaluate" in stages:
        wrong = [wrong_with(run, s) for s in scores_of(run, name)]
        rows["score"] = plain("; ".join(["none that holds", *filter(None, wrong)]))
    for bound in all_scores(run):
        is_here = "bits_per_dim" in bound.record and bound.record["checkpoint"]["step"] == step
        if is_here and not wrong_with(run, bound):
            rows["likelihood"] = told(bound.record)
    if run.grid(step).exists():
        rows["grid"] = f"{run.grid(step)}"
    rows["all of it"] = plain(shlex.join(["python", "launch/report.py", str(run.path)]))
    print(f"run {run.name} is complete: {counted(step, 'step')}")
    for what, value in rows.items():
        print(f"  {what:18}{value}")


def why_not(run: RunDir, stage: str = "") -> str:
    """The end of a message that its work, or that of one stage, has ended without its result: why, which says what to
    do first; where nothing does, the same command goes on."""
    events = read_events(run)
    told = (e for e in reversed(events) if e["event"] in ("submitted", "failed"))
    reason = next((e for e in told if stage in e.get("stage", "train")), {}).get("reason")
    if not reason and not logfiles.of_run(run, None):
        return f", and no job of it has said a word: {logfiles.unheard(run)}"
    reason = reason or (None if stage else unheard.why(run, events))
    logs = f"python launch/logs.py {run.quoted} says"
    return f": {plain(str(reason))}; {logs} more" if reason else f"; {logs} why, and the same command goes on"


def print_score(record: Mapping[str, Any], path: Path | None, *, as_json: bool, classes: Sequence[str] = ()) -> None:
    """A record of scores: in a few lines on a terminal, as JSON in a pipe, or wherever it is asked for.

    path: where it is kept. classes: names by label.
    """
    if as_json or not sys.stdout.isatty():
        print(json.dumps(record, indent=1))
        print(told(record), file=sys.stderr)
        return
    print(told(record))
    for what, value in _lines(record, classes):
        print(f"  {what:18}{plain(value)}")
    if path is not None:
        print(f"  {'all of it':18}{path}")


def print_milestones(run: RunDir, *, as_json: bool) -> None:
    """Print the run's milestones.json, on a terminal as a line for each milestone."""
    record = read_json(run.milestones) or {}
    if as_json or not sys.stdout.isatty() or not record.get("curve"):
        print(run.milestones.read_text(), end="")
        return
    key = record["score"]
    print(f"{SCORE_NAMES[key]} of {record['num_samples']:,} samples each vs {record['reference']}")
    for point in record["curve"]:
        best = "  the best" if point["step"] == record["best"]["step"] else ""
        print(f"  step {point['step']:<12}{number(point)}{best}")


def _lines(record: Mapping[str, Any], classes: Sequence[str]) -> Iterator[tuple[str, str]]:
    key = key_of(record)
    if interval := ends(record):
        yield "95 %", " to ".join(interval)
    if of_many := limit(record):
        yield "in the limit", f"{SCORE_NAMES[key]} {of_many}"
    for name in ("kid", "kernel_distance", "inception_score"):
        if measure := with_spread(record, name):
            yield name.replace("_", " "), measure
    if manifold := record.get("manifold"):
        yield "manifold", ", ".join(f"{k} {manifold[k]:.2f}" for k in ("precision", "recall", "density", "coverage"))
    if each := record.get(f"{key}_per_class"):
        values = ["-" if value is None else rounded(value, None) for value in each]
        names = classes if len(classes) == len(each) else range(len(each))
        yield "by class", ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    if at := record.get("checkpoint"):
        yield "of", f"step {at['step']} ({at.get('weights', 'ema')}), seed {record.get('seed')}"
