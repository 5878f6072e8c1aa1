"""One run as plain values, whatever of it exists: what cannot be read of it is told in words beside the rest."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime, timezone
from typing import Any

from ddpm.config.schema import Config
from ddpm.errors import EXIT_BUSY, DDPMError
from ddpm.run.events import life_of, read_events_and_damage
from ddpm.run.files import DamagedFile, read_bytes, read_json, seconds, stamp
from ddpm.run.log import counted
from ddpm.run.paths import RunDir, SampleSet, listed
from ddpm.run.records import (
    BEATS_S,
    has_foreign_weights,
    last_validation,
    missing_lines,
    parse_heartbeat,
    place_of,
    skim_metrics,
    usable,
)
from ddpm.run.state import finished_step
from ddpm.sampling.request import Request, samples_record
from ddpm.scoring.record import SCORE_NAMES, all_scores, best_founded_first, sampler_words, told
from launch.cluster.scheduler import Queued, cluster_name
from launch.queue import local, nodes, work
from launch.queue.sets import wrong_with
from launch.queue.waiting import is_of, slurm_jobs
from launch.terminal import goodput, lacking, making, standing, unheard
from launch.terminal.lacking import Damage
from launch.terminal.standing import OWN_REASONS

TRAINING = ("submitted", "started", "resumed", "finished", "failed")
LIVES = ("allocated", "started", "resumed", "requeued")
"""Events that only a life that had its nodes tells."""
AT_WORK = ("running", "sampling", "scoring", "starting", "queued", "suspended", "held")
OVERDUE = 3
"""So many times the interval between saves without one, and it is told."""


def read_life(run: RunDir) -> tuple[list[dict[str, Any]], list[str]]:
    """The events of a run that can be read, and what cannot."""
    damage = Damage()
    events, odd = damage.read(lambda: read_events_and_damage(run)) or ([], [])
    return events, [*damage.told, *odd]


def describe(
    run: RunDir, queued: dict[str, Queued] | None, life: tuple[list[dict[str, Any]], list[str]] | None = None
) -> dict[str, Any]:
    """One run as plain values, whatever of it exists. queued: what SLURM has, of all runs; None: it does not answer.

    life: what read_life() has said of it, where it was asked.
    """
    damage, now = Damage(), time.time()
    closed = damage.read(lambda: listed(run.path)) is None
    every, odd = life or read_life(run)
    # a job that found the run taken says nothing about the run, except that it held nodes meanwhile
    events = [e for e in every if e["event"] != "failed" or e.get("exit_code") != EXIT_BUSY]
    beat, metrics, saved, config = _training(run, odd, damage)
    last = metrics[-1] if metrics else {}
    unknown = lacking.tell(run, every, saved, damage)
    jobs = None if queued is None else {job: queued[job] for job in slurm_jobs(run, events) if job in queued}
    here = damage.read(lambda: local.at_work(run, every)) or {}
    age = now - seconds(beat["time"]) if beat else None
    spent = goodput.breakdown(every, beat, now)
    beats = age is not None and abs(age) < BEATS_S and _is_own(run, every, beat)
    state = None if closed else damage.read(lambda: _state(run, events, config, jobs, beats, here))
    state = "ended" if state == "prepared" and unknown else state or "unreadable"
    step = max(saved, beat.get("step", 0))
    latest: dict[str, Any] = next((e for e in reversed(events) if e["event"] in TRAINING), {})  # of any stage
    failed = latest.get("event") == "failed" and state not in AT_WORK
    of_training = _made_of_it(run, config, damage)
    saving = _not_saving(events, config) if state == "running" and step > saved else None
    died = latest.get("reason") if failed else nodes.why_died(run, events)
    gone = state in ("ended", "cancelled")
    unsaid = damage.read(lambda: unheard.why(run, events, answers=queued is not None)) if gone else None
    running = dict.fromkeys(here, "PENDING" if local.is_behind(events) else "RUNNING")
    made = damage.read(lambda: making.newest(run, now)) if state == "sampling" else None
    return {
        "name": run.name,
        "path": str(run.path),
        "state": state,
        "step": step,
        "saved_step": saved,
        "total_steps": config.train.total_steps if config else 0,
        "loss": last.get("loss"),
        "validation_loss": last_validation(metrics),
        "images_per_s": made.images_per_s if made else last.get("images_per_s"),
        "epoch": last.get("epoch"),
        "expected_end": made.end(now) if made else _expected_end(config, step, last) if state == "running" else None,
        "making": {"set": made.set_name, "images": made.images, "told": made.told(now)} if made else None,
        "cluster": cluster_name() or None,
        "jobs": {**{job: told.state for job, told in (jobs or {}).items()}, **running},
        "stages": {e["job"]: e.get("stage", "train") for e in events if e["event"] == "submitted"},
        "waits": standing.waits(jobs or {}, work.to_end(run)),
        "bad_nodes": list(dict.fromkeys(str(e["bad_node"]) for e in events if e.get("bad_node"))),
        "bad_nodes_error": next((e["error"] for e in reversed(events) if e.get("bad_node") and e.get("error")), None),
        "restarts": restarts(events),
        "goodput": goodput.share(spent),
        "allocated_s": {kind: round(s, 1) for kind, s in spent.items()},
        "heartbeat_age_s": None if age is None else round(age, 1),
        "host": beat.get("host"),
        **of_training,
        "problem": "; ".join(filter(None, [died, saving, unsaid, *damage.told[: 1 if closed else None]])) or None,
    }


def _training(
    run: RunDir, odd: list[str], damage: Damage
) -> tuple[dict[str, Any], list[dict[str, Any]], int, Config | None]:
    """Its heartbeat, the last lines of its metrics, the step that is saved, its config. odd: what of its events is."""
    beat, no_beat = damage.read(lambda: parse_heartbeat(read_bytes(run.heartbeat))) or ({}, "")
    metrics, begin, no_metrics = damage.read(lambda: skim_metrics(run)) or ([], 0, "")
    saved = damage.read(run.latest_step) or 0
    config = _config(run, damage)
    for what in (*odd, no_beat, no_metrics):
        damage.tell(what)
    if config:
        if not has_foreign_weights(damage.read(lambda: usable(run)) or {}):
            damage.tell(missing_lines(metrics, config.log.every_steps, begin=begin, saved_step=saved))
        if saved > config.train.total_steps:
            damage.tell(
                f"config.yaml says {counted(config.train.total_steps, 'step')}, and {saved} are saved: it is an older "
                f"one"
            )
    return beat, metrics, saved, config


def _made_of_it(run: RunDir, config: Config | None, damage: Damage) -> dict[str, Any]:
    """Its sample sets and their scores."""
    sets = damage.read(lambda: {s.name: _set(run, s) for s in run.sample_sets()}) or {}
    damage.read(lambda: lacking.check_sets(run, damage))
    scores, told_of = damage.read(lambda: _scores(run, config, damage)) or ({}, {})
    return {
        "samples": {name: of.pop("shards") for name, of in sets.items()},
        "sets": sets,
        "scores": scores,
        "scores_told": told_of,
    }


def restarts(events: list[dict[str, Any]]) -> int:
    """How often training began again that had been ended neither by its owner nor by its last step."""
    told = [e for e in events if e.get("stage", "train") == "train" and e["event"] != "submitted"]
    own = {life_of(e) for e in told if e["event"] in ("cancelled", "finished") or e.get("reason") in OWN_REASONS}
    lives = list(dict.fromkeys(life_of(e) for e in told if e["event"] in LIVES))
    return sum(before not in own for before in lives[:-1])


def _is_own(run: RunDir, events: list[dict[str, Any]], beat: dict[str, Any]) -> bool:
    """Whether the heartbeat was written here, and is not a copy that came with the rest of the run."""
    if "inode" in beat:
        return bool(beat["inode"] == place_of(run))
    return all(is_of(run, e) for e in events if e["event"] == "submitted" and e["job"] == str(beat["job"]))


def _expected_end(config: Config | None, step: int, last: dict[str, Any]) -> str | None:
    """When training ends at the speed that it has, if it goes on without a break: a stamp."""
    speed = last.get("images_per_s") or 0
    if config is None or speed <= 0:
        return None
    left_s = (config.train.total_steps - step) * config.train.global_batch / speed
    try:
        return stamp(datetime.fromtimestamp(time.time() + left_s, timezone.utc)) if left_s > 0 else None
    except (OverflowError, ValueError):  # in a thousand years
        return None


def _not_saving(events: list[dict[str, Any]], config: Config | None) -> str | None:
    """Why what a running life does would be lost, in words: its last save was refused, or none has come for long."""
    told = [e for e in events if e["event"] in ("started", "resumed", "checkpoint", "save_failed")]
    last: dict[str, Any] = told[-1] if told else {}
    if last.get("event") == "save_failed":
        return (
            f"nothing was saved since step {last.get('step', 0)}, and what is trained since then is lost if it ends "
            f"now: {last.get('reason', 'a save failed')}"
        )
    every = config.checkpoint.every_min if config else None
    if not last or every is None:
        return None
    minutes = (time.time() - seconds(last["time"])) / 60
    late = (
        f"nothing was saved for {minutes:.0f} minutes, though a save is due every {every:g}: its log says why, unless "
        f"the disk or quota is full for that too"
    )
    return late if minutes > OVERDUE * every + 1 else None


def _scores(run: RunDir, config: Config | None, damage: Damage) -> tuple[dict[str, Any], dict[str, str]]:
    """Each score of the run that holds, by its name: its number, and a line with what it is of; the best founded
    first."""
    good, kept = [], (*SCORE_NAMES, "num_samples")
    for score in all_scores(run):
        if score.damage:
            damage.tell(f"eval/ holds no score in {score.damage}")
        elif why := wrong_with(run, score):
            damage.tell(why)
        else:
            good.append(score)
    good = best_founded_first(good, config.evaluate if config else None)
    return {s.name: {k: s.record[k] for k in kept if k in s.record} for s in good}, {
        s.name: told(s.record) for s in good
    }


def _config(run: RunDir, damage: Damage) -> Config | None:
    """The run's config; None where it cannot be read, or says no length in steps."""
    if (config := damage.config(run)) is not None and config.train.total_steps is None:
        damage.tell("its config has no length in steps")
        return None
    return config


def _set(run: RunDir, of: SampleSet) -> dict[str, Any]:
    """Its shards; the step that it is of, None where its request cannot be read; in words what it is of."""
    asked, done = read_json(of.request) or {}, of.num_published()
    num = asked.get("shards")
    found: dict[str, Any] = {"shards": f"{done}/{num if isinstance(num, int) else '?'}", "step": None}
    found["told"] = "request.json is missing or damaged"
    with contextlib.suppress(DamagedFile, DDPMError):
        request = Request.from_record(asked)
        made = making.newest(run, time.time(), of.name) if done < request.shards else None
        how = sampler_words(samples_record(request)["sampler"])
        images = f"{made.images if made else 0:,} of " if done < request.shards else ""
        words = f"step {request.checkpoint.step}, {how}, {counted(request.steps, 'step')}, {images}"
        words += counted(request.num_samples, "image", ",")
        found |= {"step": request.checkpoint.step, "told": words}
    return found


def _state(
    run: RunDir,
    events: list[dict[str, Any]],
    config: Config | None,
    jobs: dict[str, Queued] | None,
    beats: bool,
    here: dict[str, tuple[int, list[str]]],
) -> str:
    """How the run stands, by its directory, SLURM and this machine's processes: standing.py has the words."""
    finished = config is not None and finished_step(run, config) is not None
    stages = {stage for _, of_one in here.values() for stage in of_one}
    at_work = "train" in stages, bool(stages)
    behind = bool(stages) and local.is_behind(events)
    seen = events, jobs, finished, run.is_stopped(), beats, *at_work
    facts = standing.Facts(*seen, cluster=cluster_name(), behind=behind)
    return standing.word(facts)
