"""Runs side by side, as plain values and as a table: what differs between their configs, steps, loss, scores.

Loads nothing heavy, and asks no scheduler.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.config.section import field_keys
from ddpm.run.log import plain
from ddpm.run.paths import RunDir
from ddpm.run.records import last_validation, skim_metrics, usable
from ddpm.scoring.record import SCORE_NAMES, key_of, number, told
from launch.cluster import code
from launch.queue.naming import short
from launch.queue.sets import good_scores
from launch.terminal import columns as table
from launch.terminal import console, streams
from launch.terminal.lacking import Damage
from launch.terminal.view import columns

SMOOTHED_LINES = 10
LONGEST = 24
"""Characters of a value in a table, where there is no room for more."""
LOSS, VALIDATION = "mean loss", "validation loss"
WHICH_LOSS = f"over the last {SMOOTHED_LINES} lines of metrics.jsonl"
LEARNED = ("seed", "data", "model", "diffusion", "train")
"""Sections of the config that a model follows from: their keys get room first, and short names."""
OURS = ("run", "from", "step", "loss", LOSS, VALIDATION, "score")
"""Columns that are no keys of a config."""

Row = dict[str, Any]


def rows(runs: Sequence[RunDir]) -> list[Row]:
    """Each run, the best first: by its score, then by its loss, unless theirs are of different kinds, as which_loss()
    says: then as given. A row is plain values:

    name, path; sweep: the name of the one that it is of, or None; from: the weights that it started from, or None;
    code: the digest of what its newest job runs, or None;
    differs: {"train.lr": 1e-4, …}, what is not the same
    in all of their configs, in the config's order (of a config that cannot be read {}); step, total_steps; loss: the
    smoothed_loss(), or None; validation_loss: the newest, or None; score: None, or {"set", "step", "key", "value",
    "number", "of", "ranked"}, number and of being words, `FID 4.21` and `ddim 100, 50,000 vs train`; scores: {set:
    words} of all that hold; problem: what cannot be read, or None.

    Scores are ranked by one kind alone, all but checkpoint and seed being the same (sampler, evaluations, number of
    samples, reference, features): the one that most of the runs have. Of a run with several of it the lowest is shown;
    of one with none its newest other, not ranked.
    """
    damages = [Damage() for _ in runs]
    configs = [damage.config(run) for run, damage in zip(runs, damages, strict=True)]
    trees = [config.model_dump(mode="json") if config else None for config in configs]
    scores = [_scores(*of) for of in zip(runs, configs, damages, strict=True)]
    keys, kind = _differing([tree for tree in trees if tree]), _most_common(scores)
    found = []
    for run, damage, tree, of in zip(runs, damages, trees, scores, strict=True):
        metrics = (damage.read(partial(skim_metrics, run)) or ([],))[0]
        saved = damage.read(run.latest_step) or 0
        found.append({
            "name": run.name,
            "path": str(run.path),
            "sweep": console.sweep_of(run),
            "code": damage.read(partial(code.last_run, run)),
            "from": _came_from(usable(run).get("from")),
            "differs": {key: reading.value_at(tree, key) for key in keys} if tree else {},
            "step": max(saved, metrics[-1]["step"] if metrics else 0),
            "total_steps": tree["train"]["total_steps"] if tree else None,
            "loss": smoothed_loss(metrics),
            "validation_loss": last_validation(metrics),
            "score": _chosen(of, kind),
            "scores": {name: told(record) for name, record in of.items()},
            "problem": "; ".join(damage.told) or None,
        })  # fmt: skip
    return sorted(found, key=partial(_rank, by_loss=not _other_losses(found)))


def which_loss(found: Sequence[Row]) -> str:
    """What the column of losses is, and why the rows are not ranked by it, where they are not."""
    others = _other_losses(found)
    return WHICH_LOSS + (f"; not ranked: what is summed depends on {', '.join(others)}" if others else "")


def which_code(found: Sequence[Row]) -> str:
    """Where runs do not have the same code: who has which. "" where they do."""
    of: dict[str, list[str]] = {}
    for row in found:
        if row["code"]:
            of.setdefault(row["code"], []).append(row["name"])
    told = [f"{digest} ({', '.join(names[:4])}{', …' if names[4:] else ''})" for digest, names in of.items()]
    return f"not all have the same code: {'; '.join(told)}" if len(told) > 1 else ""


def _other_losses(found: Sequence[Row]) -> list[str]:
    """The differing keys with which a loss is another quantity: those of the noise, and of how its error is taken."""
    keys = dict.fromkeys(key for row in found for key in row["differs"])
    return [key for key in keys if key.startswith("diffusion.") and key != "diffusion.variance"]


def smoothed_loss(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean over the last SMOOTHED_LINES lines of metrics.jsonl: the number to compare runs by."""
    losses = [m["loss"] for m in metrics[-SMOOTHED_LINES:] if math.isfinite(m["loss"])]
    return sum(losses) / len(losses) if losses else None


def _came_from(record: Any) -> str | None:
    """The weights that a run started from, in short: `mine@300`."""
    if not isinstance(record, dict) or not record.get("source"):
        return None
    return Path(str(record["source"])).name + (f"@{record['step']}" if record.get("step") else "")


def _rank(row: Row, *, by_loss: bool) -> tuple[bool, float, bool, float]:
    score = row["score"] if row["score"] and row["score"]["ranked"] else None
    loss = row["loss"] or 0.0 if by_loss else 0.0
    return score is None, score["value"] if score else 0.0, row["loss"] is None, loss


def _differing(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = (key for key in field_keys(Config) if key != "name")
    return [key for key in keys if len({json.dumps(reading.value_at(tree, key)) for tree in trees}) > 1]


# ---------------------------------------------------------------- scores

Records = dict[str, dict[str, Any]]


def _scores(run: RunDir, config: Config | None, damage: Damage) -> Records:
    """Those that hold, by their names, the best founded first."""
    good = damage.read(lambda: good_scores(run, config.evaluate if config else None)) or []
    return {score.name: score.record for score in good}


Kind = tuple[int, int, int, str]


def _kind(record: Mapping[str, Any]) -> Kind:
    """What is the same of two scores that can be ranked; of those the better kind is the greater."""
    weights = (record.get("checkpoint") or {}).get("weights")
    reference = record["reference"].get("digest") or record["reference"]
    of = json.dumps([record.get("extractor"), reference, record.get("sampler"), weights], sort_keys=True)
    return -list(SCORE_NAMES).index(key_of(record)), record["num_samples"], record["nfe"], of


def _most_common(scores: Sequence[Records]) -> Kind | None:
    kinds = [{_kind(record) for record in of.values()} for of in scores]
    every = {kind for of in kinds for kind in of}
    return max(every, key=lambda kind: (sum(kind in of for of in kinds), kind), default=None)


def _chosen(of: Records, kind: Kind | None) -> Row | None:
    if not of:
        return None
    ranked = [name for name in of if _kind(of[name]) == kind]
    name = min(ranked, key=lambda name: of[name][key_of(of[name])]) if ranked else next(iter(of))
    record = of[name]
    key = key_of(record)
    words = {"number": f"{SCORE_NAMES[key]} {number(record)}"}
    words["of"] = told(record).removeprefix(words["number"]).lstrip(", ")
    step = (record.get("checkpoint") or {}).get("step")
    return {"set": name, "step": step, "key": key, "value": record[key], **words, "ranked": bool(ranked)}


# ---------------------------------------------------------------- as a table


def show(found: list[Row]) -> None:
    """Print them."""
    print("\n".join(page(found, columns())), file=streams.below(sys.stdout), flush=True)


def page(found: list[Row], width: int) -> list[str]:
    """The table, and under it what the scores in it are of, those that cannot be ranked with them, and so are not in
    it, what cannot be read, and what had no room."""
    keys = list(dict.fromkeys(key for row in found for key in row["differs"]))
    learned = [key for key in keys if key.partition(".")[0] in LEARNED]
    names = {key: key for key in keys} | dict(zip(learned, short(learned, OURS), strict=True))
    shown = [
        table.Column("run", (table.value("name"),), needed=True),
        *(table.Column(names[key], (table.value(key), table.value(key, LONGEST))) for key in keys),
        table.Column("from", (lambda row: row["from"] or "",)),
        table.Column("step", (lambda row: f"{row['step']}/{row['total_steps'] or '?'}",), right=True),
        table.Column(LOSS, (partial(_loss, "loss"),), right=True),
        table.Column(VALIDATION, (partial(_loss, "validation_loss"),), right=True),
        table.Column("score", (_score_with_set, _score)),
    ]
    flat = [{**row["differs"], **row} for row in found]
    last = [key for key in keys if key not in learned]
    by_need = ["run", "score", LOSS, *(names[key] for key in learned), "from", "step", VALIDATION, *last]
    lines, left_out = table.fitted(flat, width, shown, by_need)
    for note in _notes(found, [name for name in (*names.values(), *OURS) if name in left_out]):
        lines += textwrap.wrap(plain(note), width, subsequent_indent="  ", break_on_hyphens=False,
                               break_long_words=False)  # fmt: skip
    return lines


def _loss(key: str, row: Mapping[str, Any]) -> str:
    return "" if row[key] is None else f"{row[key]:.4f}"


def _score(row: Mapping[str, Any]) -> str:
    return _number(row) if row["score"] and row["score"]["ranked"] else ""


def _score_with_set(row: Mapping[str, Any]) -> str:
    return f"{said}, {row['score']['set']}" if (said := _score(row)) else ""


def _number(row: Mapping[str, Any]) -> str:
    """The score, with its step where that is not the run's."""
    score = row["score"]
    return str(score["number"]) + ("" if score["step"] in (None, row["step"]) else f" at step {score['step']}")


def _notes(found: list[Row], left_out: list[str]) -> Iterator[str]:
    if LOSS not in left_out and any(row["loss"] is not None for row in found):
        yield f"{LOSS}: {which_loss(found)}"
    ranked = {row["score"]["of"]: None for row in found if row["score"] and row["score"]["ranked"]}
    if ranked and "score" not in left_out:
        yield f"score: {'; '.join(ranked)}"
    if len(found) > 1 and not any(row["differs"] for row in found):
        yield "their configs do not differ"
    if told := which_code(found):
        yield told
    if left_out:
        yield f"no room for {', '.join(left_out)}: --json has all"
    for row in found:
        if (score := row["score"]) and not score["ranked"]:
            yield f"{row['name']}: {_number(row)}, {score['of']} ({score['set']}): made otherwise, so not ranked"
        if row["problem"]:
            yield f"{row['name']}: {row['problem']}"
