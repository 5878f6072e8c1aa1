"""The sample sets of a run: how they are named, what the config asks of one, what of it is missing, its score."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ddpm.config import reading
from ddpm.config.sample import FILE, Evaluate
from ddpm.config.schema import Config
from ddpm.errors import DoNotRetry, RequestError
from ddpm.run import generations
from ddpm.run.files import DamagedFile, parse_json, read_bytes, sha256_file
from ddpm.run.generations import Generation
from ddpm.run.paths import Made, RunDir, SampleSet, fit_name
from ddpm.run.state import finished_step
from ddpm.sampling.request import (
    CheckpointRef,
    Request,
    differences,
    from_config,
    precision_of,
    publish_request,
    read_request,
    samples_record,
    withdraw_request,
)
from ddpm.scoring.against import SPLITS, digest_of_split, folder_digest
from ddpm.scoring.record import Score, all_scores, best_founded_first, file_extractor_name, scores_of
from launch.cluster import code

LEAST_SCORED = 2
"""Fewest samples that can be scored: one sample has no covariance."""

# ---------------------------------------------------------------- names


def set_of(run: RunDir, config: Config, step: int, variance: str | None = None) -> str:
    """The name of the set that the config asks for at `step`: the step's own, or the chain's if that was made there."""
    own, chain = _set_name(run, config, f"step{step}", variance), _planned_set(run, config)
    return chain if not variance and _sampled_at(run, own) is None and _sampled_at(run, chain) == step else own


def own_set(run: RunDir, config: Config, step: int) -> str:
    """The name of a set of `step`, whatever the chain made there."""
    return _set_name(run, config, f"step{step}")


def chain_set(run: RunDir, config: Config) -> str:
    """The name of the set that is made when training ends, which depends on the step at which it has ended."""
    planned, step = _planned_set(run, config), finished_step(run, config)
    if step is None:
        return planned
    name = set_of(run, config, step)
    return name if _sampled_at(run, planned) or _sampled_at(run, name) else planned


def _planned_set(run: RunDir, config: Config) -> str:
    """The name of the chain's set before training has ended, when it may still end early."""
    upto = "step" if config.train.early_stop_below is None else "upto"
    return _set_name(run, config, f"{upto}{config.train.total_steps}")


def _set_name(run: RunDir, config: Config, at: str, variance: str | None = None) -> str:
    s = config.sample
    how = "" if s.clip_x_0 else "-unclipped"
    how += "" if variance in (None, config.diffusion.variance) else f"-{variance}"
    plan = None if s.class_plan is None else list(s.class_plan)

    def name(number: Callable[[float], str], eta: float, of: str) -> str:
        noise = f"-eta{number(eta)}" if eta else ""
        guided = "" if s.guidance is None else f"-guided{number(s.guidance)}"
        return f"{s.sampler}{s.steps}{noise}{guided}{of}{how}-{at}-seed{s.seed}"

    # a set that was begun when eta was no part of the name, or one class had no name of its own, or numbers had six
    # digits, goes on under its own
    any_plan = "" if plan is None else "-plan"
    for former in (name("{:g}".format, 0.0, any_plan), name("{:g}".format, s.eta, any_plan)):
        asked = _asked(run, former)
        if [asked.get(key) for key in ("eta", "guidance", "class_plan")] == [s.eta, s.guidance, plan]:
            return former
    return fit_name(name(_exactly, s.eta, _plan_name(plan)))


def _plan_name(plan: list[int] | None) -> str:
    """The part of a set's name for its class plan."""
    if plan is None:
        return ""
    labels = [label for label, count in enumerate(plan) if count]
    return f"-class{labels[0]}" if len(labels) == 1 and len(plan) > 1 else "-plan"


def _exactly(number: float) -> str:
    """A number in a name: different numbers give different text, without the + of 1e+22."""
    short = f"{number:g}"
    return (short if float(short) == number else repr(number)).replace("+", "")


def _asked(run: RunDir, set_name: str) -> dict[str, Any]:
    """The content of the set's request.json; {} if there is none or it is damaged, which whoever continues the set
    finds out again. Raises OSError if it cannot be read."""
    try:
        record = parse_json(read_bytes(run.sample_set(set_name).request))
        Request.from_record(record if isinstance(record, dict) else {})
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError, DamagedFile):
        return {}
    return dict(record)


def _sampled_at(run: RunDir, set_name: str) -> int | None:
    """The step of the checkpoint that a set samples; None if the set is not begun."""
    return (_asked(run, set_name).get("checkpoint") or {}).get("step")


# ---------------------------------------------------------------- requests


def request_for(
    run: RunDir, config: Config, generation: Generation | CheckpointRef, variance: str | None = None
) -> Request:
    """The request that the run's config makes for one checkpoint. variance: instead of the config's."""
    at = CheckpointRef(generation.step, generation.sha256)
    return from_config(config, at, precision_of(config, run), variance)


def publish_while_kept(run: RunDir, made: Made, step: int, publish: Callable[[], object]) -> bool:
    """Have a request published while its checkpoint is there: training keeps those that a request names, but not
    before. Returns whether it is new. Raises RequestError where the checkpoint has just been removed."""
    existed = made.request.exists()
    publish()
    if not existed and not run.manifest(step).exists():
        withdraw_request(made)
        raise RequestError(
            f"the checkpoint of step {step} was just removed, as training keeps only the newest; there are "
            f"{sorted(run.steps_saved())}: give one as --step, or none for the newest"
        )
    return not existed


class SetOfAnother(RequestError):
    """A set that was made from another checkpoint than the one that this run has at its step."""


def own_request(run: RunDir, set_name: str) -> Request:
    """The request of an existing set. Raises as `read_request`, and SetOfAnother."""
    request = read_request(run.sample_set(set_name))
    if why := generations.of_another(run, request.checkpoint.step, request.checkpoint.sha256):
        raise SetOfAnother(
            f"samples/{set_name} {why}: move it away, and its score in eval/ too, or bring back the checkpoint that it "
            f"is of"
        )
    return request


def ensure_request(run: RunDir, config: Config, set_name: str) -> Request:
    """The set's request; in a chain the first job to need it publishes what the config asks of the last checkpoint.

    Raises DoNotRetry where training, which SLURM's dependency says has ended, is not done, or the set is of another's.
    """
    sample_set = run.sample_set(set_name)
    if sample_set.request.exists():
        try:
            return own_request(run, set_name)
        except SetOfAnother as e:
            raise DoNotRetry(str(e)) from None
    if finished_step(run, config) is None:
        raise DoNotRetry(
            f"training ended at step {run.latest_step()} of {config.train.total_steps}, so there is nothing "
            f"to sample for {set_name}. Go on with it: python launch/submit.py {run.quoted}; or sample what there is: "
            f"python launch/sample.py {run.quoted}"
        )
    return publish_request(sample_set, request_for(run, config, generations.verify(run, run.latest_step())))


# ---------------------------------------------------------------- what is there


def shards_to_make(run: RunDir, config: Config, set_name: str) -> list[int]:
    """Missing shards of the chain's set; all of them if the set is not begun.

    Raises RequestError if the set was begun with another request, at another step than the one at which training ends,
    or from another checkpoint than the run's.
    """
    sample_set = run.sample_set(set_name)
    if not sample_set.request.exists():
        return list(range(config.sample.shards))
    from ddpm.sampling import shards

    there = own_request(run, set_name)
    step = finished_step(run, config) or config.train.total_steps
    asked = request_for(run, config, replace(there.checkpoint, step=step))
    if there != asked:
        raise RequestError(
            f"sample set {set_name} exists with another request: {differences(there, asked)}. Ask for the "
            f"same, or make another set once training has ended: python launch/sample.py {run.quoted} --set OTHERNAME"
        )
    return shards.shards_to_make(sample_set, there)


def score_by(run: RunDir, set_name: str, evaluate: Evaluate) -> Score | None:
    """The set's valid score with this extractor against this reference, both as they are now; None if there is none."""
    return scored_by(run, evaluate)(set_name)


def scored_by(run: RunDir, evaluate: Evaluate) -> Callable[[str], Score | None]:
    """`score_by` of many sets of a run, by their names: images and weights that must be read for it are read once."""
    is_it = _is_against(run, evaluate.reference)

    @cache
    def extractor() -> str:
        path = Path(evaluate.extractor.removeprefix(FILE)).expanduser()
        if not evaluate.extractor.startswith(FILE):
            return evaluate.extractor
        return file_extractor_name(sha256_file(path)) if path.is_file() else ""

    def score(set_name: str) -> Score | None:
        if not _asked(run, set_name):
            return None
        good = (s for s in scores_of(run, set_name) if not wrong_with(run, s))
        by_it = (s for s in good if (s.record.get("extractor") or {}).get("name") == extractor())
        return next((s for s in by_it if is_it(s.record["reference"])), None)

    return score


def good_scores(run: RunDir, asked: Evaluate | None) -> list[Score]:
    """The scores of a run that hold, the best founded first. asked: its config's `evaluate`; None: not to be read."""
    return best_founded_first((score for score in all_scores(run) if not wrong_with(run, score)), asked)


def wrong_with(run: RunDir, score: Score) -> str:
    """Why a score does not hold, for a message: it is damaged, says to be of other samples than its set's request asks
    for, or is of another run's checkpoint; "" where it holds, or nothing tells. Raises OSError where it cannot look."""
    if score.damage:
        return score.damage
    if isinstance(at := score.record.get("checkpoint"), dict) and (
        why := generations.of_another(run, at.get("step"), at.get("sha256"))
    ):
        return f"{score.path.name} {why}"
    set_name = score.name.partition("/")[0]
    if not (asked := _asked(run, set_name)):
        return ""
    there, due = (reading.flat(r) for r in (score.record, samples_record(Request.from_record(asked))))
    wrong = [f"{key} {there[key]!r} instead of {due[key]!r}" for key in due if there.get(key, due[key]) != due[key]]
    return f"{score.path.name} is no score of samples/{set_name}: it says {', '.join(wrong)}" if wrong else ""


def _is_against(run: RunDir, asked: str) -> Callable[[dict[str, Any]], bool]:
    """A function that tells whether a score's reference is the one that is asked for. Its images decide if they are
    available, and are read once where a score is against one of its name: a folder may have changed, and another one
    may have the same name.
    """
    path = Path(asked).expanduser()
    if asked in SPLITS:
        name = {"split": asked}
    elif path.suffix == ".npz" or not path.exists():
        name = {}
    else:
        name = {"split": "all", "name": path.name}

    @cache
    def digest() -> str | None:
        if asked in SPLITS:
            return digest_of_split(run, asked)
        if not path.exists():
            return ""
        return sha256_file(path) if path.suffix == ".npz" else folder_digest(path)

    return lambda record: name.items() <= record.items() and digest() in (None, record.get("digest"))


def tell_of_other_code(run: RunDir, sample_set: SampleSet, request: Request, take: str | None) -> None:
    """Warn where shards of the set were made by other code of ddpm/ than this checkout has, which could make others; or
    than what --code asks for (`take`), if that is a digest.
    """
    from ddpm.sampling import shards  # loads numpy

    whose, here, kept = "this checkout", code.of_checkout(), None
    if take not in (None, "kept", "new"):
        whose, here = f"the code {take}", code.kept_before(run, take)
    others = [digest for digest in shards.codes(sample_set, request) if digest != code.digest(here)]
    if others:
        with contextlib.suppress(DamagedFile):
            kept = code.of_run(run)
    for digest in others:
        by = kept if kept is not None and code.digest(kept) == digest else code.earlier(run, digest)
        if by is None or not (told := code.differences(code.of_library(by), code.of_library(here))):
            continue
        of_set = f"shards of {sample_set.name} were made by the code {digest}"
        ask = "another --set and --code new" if take in (None, "kept") else "another --set"
        print(f"warning: {of_set}; {whose} has {told}. To sample with that, give {ask}", file=sys.stderr)
