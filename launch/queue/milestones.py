"""Milestones that are sampled and scored during training: their sets and jobs, the curve of scores, the best one."""

from __future__ import annotations

import re
from typing import Any, cast

from ddpm.config import reading
from ddpm.config.sample import Milestones
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import files, generations
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir, fit_name
from ddpm.sampling.request import publish_request, read_request
from ddpm.sampling.shards import shards_to_make
from ddpm.scoring.record import key_of
from launch.cluster.job import Job
from launch.cluster.site import Site
from launch.queue import sets


def steps(run: RunDir) -> list[int]:
    """Steps of milestones and of the end (those with EMA weights), ascending."""
    return sorted(step for step in run.steps_saved() if run.ema_weights(step).exists())


def when(config: Config) -> str:
    """For a message: when milestones are saved."""
    steps, epochs = config.checkpoint.milestone_every_steps, config.checkpoint.milestone_every_epochs
    every = [f"{n} {unit}" for n, unit in ((steps, "steps"), (epochs, "epochs")) if n]
    return f"one comes every {' and every '.join(every)}, and at the end" if every else "one comes at the end"


def sampled_as(config: Config) -> Config:
    """The config with its `sample` section as for milestones: without `evaluate.milestones` at most a set's samples."""
    asked, usual = config.evaluate.milestones, Milestones().num_samples
    num = asked.num_samples if asked else max(sets.LEAST_SCORED, min(usual, config.sample.num_samples))
    shards = min(config.sample.shards, -(-num // config.sample.batch))
    sample = config.sample.model_copy(update={"num_samples": num, "shards": shards, "class_plan": None})
    return config.model_copy(update={"sample": sample})


def how_many(config: Config) -> str:
    """Samples of each, in words, and what says so."""
    key = "evaluate.milestones" if config.evaluate.milestones else "sample.num_samples"
    more = f" (at most {Milestones().num_samples:,}; evaluate.milestones, at submission, asks for others)"
    num = sampled_as(config).sample.num_samples
    return f"{num:,} samples of each, by the config's {key}{'' if config.evaluate.milestones else more}"


def set_name(run: RunDir, config: Config, step: int) -> str:
    """The name of a milestone's set. config: from `sampled_as`."""
    return fit_name(f"milestone{config.sample.num_samples}-{sets.own_set(run, config, step)}")


def is_set_of_one(name: str) -> bool:
    """Whether a set has a name from `set_name`."""
    return re.match(r"milestone\d+-", name) is not None


def jobs_of(run: RunDir, config: Config, site: Site, *, dry_run: bool = False) -> list[tuple[int, list[Job]]]:
    """For each milestone without a score: its step, and the jobs that make its missing samples and score them.

    Publishes their requests unless `dry_run`, so that training keeps their checkpoints. Raises RequestError.
    """
    sampled, chains, stop, score_of = sampled_as(config), [], run.stop_mark(), sets.scored_by(run, config.evaluate)
    for step in steps(run):
        name = set_name(run, sampled, step)
        if score_of(name) is not None:
            continue
        where = run.sample_set(name)
        if where.request.exists():
            request = sets.own_request(run, name)
        else:
            request = sets.request_for(run, sampled, generations.choose(run, step))
            if not dry_run:
                publish_request(where, request)
        missing = shards_to_make(where, request)
        make = [Job("sample", run, site, name, tuple(missing), despite=stop)] if missing else []
        chains.append((step, [*make, Job("evaluate", run, site, name, despite=stop)]))
    return chains


# ---------------------------------------------------------------- the curve


def publish(run: RunDir, config: Config, token: str) -> dict[str, Any] | None:
    """Write milestones.json for all milestones with a score; returns its content, None if it did not change."""
    record, changed = _curve(run, config), None
    while record is not None and record != _there(run):
        files.write_json(run.milestones, record, replace=True, token=token)
        record, changed = _curve(run, config), record  # another evaluation may have ended meanwhile
    return changed


def asked_step(run: RunDir, asked: int | str | None) -> int | None:
    """What --step asks for, with `best` as a number. Raises RequestError as `best_step`."""
    return best_step(run, reading.of_run(run)) if asked == "best" else cast("int | None", asked)


def best_step(run: RunDir, config: Config) -> int:
    """The step of the milestone with the best score, by the score files; without any, by milestones.json.

    Raises RequestError if there is none, or it is of another run's checkpoint.
    """
    try:
        best = (_curve(run, config) or files.read_signed(run.milestones))["best"]
        if why := generations.of_another(run, best["step"], best.get("sha256")):
            raise DamagedFile(f"the best in {run.milestones.name} {why}")
        return int(best["step"])
    except (FileNotFoundError, DamagedFile) as e:
        why = "has no scores of milestones yet" if isinstance(e, FileNotFoundError) else f"tells no best step ({e})"
        raise RequestError(f"run {run.name} {why}: python launch/evaluate.py {run.quoted} --all-milestones") from None


def points(run: RunDir) -> list[dict[str, Any]]:
    """The points of the curve in milestones.json, by step."""
    return (_there(run) or {}).get("curve", [])


def _there(run: RunDir) -> dict[str, Any] | None:
    try:
        return files.read_signed(run.milestones)
    except (FileNotFoundError, DamagedFile):
        return None


def _curve(run: RunDir, config: Config) -> dict[str, Any] | None:
    sampled, points, score_of = sampled_as(config), {}, sets.scored_by(run, config.evaluate)
    for where in run.sample_sets():
        if not where.name.startswith(f"milestone{sampled.sample.num_samples}-") or not where.request.exists():
            continue
        at = read_request(where).checkpoint
        is_now = where.name == set_name(run, sampled, at.step)
        if is_now and (score := score_of(where.name)):
            key = key_of(score.record)
            value = {k: score.record[k] for k in (key, f"{key}_interval") if k in score.record}
            images = at.step * config.train.global_batch
            points[at.step] = {"step": at.step, "images": images, **value, "sha256": at.sha256, "set": where.name}
    if not points:
        return None
    curve = [points[step] for step in sorted(points)]
    of = {"score": key, "num_samples": sampled.sample.num_samples, **config.evaluate.model_dump(exclude={"milestones"})}
    return files.sign({**of, "best": min(curve, key=lambda point: point[key]), "curve": curve})
