"""A life that scores a sample set, once it is whole. Loads torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.run.log import counted, say
from ddpm.run.records import data_of
from ddpm.sampling.request import Request
from ddpm.sampling.shards import missing_shards
from ddpm.scoring import evaluate as scoring
from ddpm.scoring.against import open_reference
from ddpm.scoring.extractors import beside, build_extractor
from ddpm.scoring.record import key_of
from ddpm.scoring.record import told as told_of
from launch.life import devices
from launch.life.life import Life
from launch.life.pace import Pace, shown
from launch.life.showing import show_score
from launch.queue import chain, milestones
from launch.queue.sets import ensure_request


def evaluate(life: Life, set_name: str, reference: str | None, extractor: str | None, round_: str) -> int:
    """Score a set; where shards are missing and SLURM is here, have them made and come after them again.

    reference, extractor: instead of the config's.
    """
    run, env = life.run, life.env
    config = reading.of_run(run)
    request = ensure_request(run, config, set_name)

    def have_made(shards: list[int]) -> int:
        told = {"reference": reference, "extractor": extractor}
        again = tuple(word for key, value in told.items() if value for word in (f"--{key}", value))
        return life.leave(chain.fill_gaps(run, set_name, shards, again, round_, env))

    if missing := missing_shards(run.sample_set(set_name), request):
        if env.array_task:
            say(f"{set_name} lacks {counted(len(missing), 'shard')}: the first task has what is missing made")
            return life.leave(0)
        return have_made(missing)
    life.heed_stop()
    torch.set_num_threads(env.cpus)
    try:
        result = life.result_of(_scorer(life, set_name, config, request, reference, extractor))
    except scoring.BrokenSet as e:
        if not e.shards:
            raise  # nothing that computing anew would mend
        if env.array_task:
            say(f"{e}; the first task has them made")
            return life.leave(0)
        repair = f"`python launch/sample.py {run.quoted} --set {set_name}`"
        say(f"{e}; {repair} computes what is missing")
        return have_made(list(e.shards))
    if isinstance(result, int):
        return result
    if set_name.startswith("milestone"):
        _on_the_curve(life, config)
    show_score(run, config, result)
    score = key_of(result)
    say(f"scored {told_of(result)}", **{score: f"{result[score]:.4f}"})
    return life.leave(0)


def _scorer(
    life: Life, set_name: str, config: Config, request: Request, reference: str | None, extractor: str | None
) -> Callable[[], dict[str, Any]]:
    """What computes the score's record, and may be called again after a stop. Raises as `scoring.evaluate_set`."""
    run, env = life.run, life.env
    device = devices.one_device(env)
    cache = Path(data_of(run)["cache"])
    against = reference or config.evaluate.reference
    command = ["python", "launch/evaluate.py", str(run.path), "--set", set_name, "--reference", against]
    command += ["--extractor", extractor] if extractor else []
    pace, num = Pace(), request.num_samples

    def show(done: int, total: int) -> None:
        say("features", shards=f"{done}/{total}", **pace.told(done * num // total, num))

    def score() -> dict[str, Any]:
        name, size = extractor or config.evaluate.extractor, config.data.image_size
        return scoring.evaluate_set(
            run,
            set_name,
            reference=open_reference(run, config, against, life.stop),
            extractor=build_extractor(name, device, image_size=size, shared=beside(cache)),
            cache_dir=cache / "reference",
            image_size=size,
            num_classes=config.model.num_classes,
            command=command,
            progress=show,
            reference_progress=shown("features of the reference"),
            worker=life.worker,
        )

    return score


def _on_the_curve(life: Life, config: Config) -> None:
    """What a milestone scores, in milestones.json, where that is news."""
    run, env = life.run, life.env
    if (record := milestones.publish(run, config, env.token)) is None:
        return
    best = record["best"]
    say("best milestone so far", step=best["step"], **{record["score"]: f"{best[record['score']]:.4f}"})
