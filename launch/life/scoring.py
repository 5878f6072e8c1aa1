"""A life that scores a sample set, once it is whole. Loads torch."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import Stopped
from ddpm.run.claims import OthersAtWork
from ddpm.run.log import say
from ddpm.run.records import data_of
from ddpm.sampling.shards import missing_shards
from ddpm.scoring import evaluate as scoring
from ddpm.scoring.against import open_reference
from ddpm.scoring.extractors import beside, build_extractor
from ddpm.scoring.record import key_of
from ddpm.scoring.record import told as told_of
from launch.life import devices
from launch.life.life import Life
from launch.life.pace import Pace
from launch.life.showing import show_score
from launch.queue import chain, milestones
from launch.queue.sets import ensure_request


def evaluate(life: Life, set_name: str, reference: str | None, extractor: str | None, round_: str) -> int:
    """Score a set; where shards are missing and SLURM is here, have them made and come after them again.

    reference, extractor: instead of the config's.
    """
    run, env = life.run, life.env
    told = {"reference": reference, "extractor": extractor}
    again = tuple(word for key, value in told.items() if value for word in (f"--{key}", value))
    config = reading.of_run(run)
    sample_set = run.sample_set(set_name)
    request = ensure_request(run, config, set_name)
    if missing := missing_shards(sample_set, request):
        if env.array_task:
            say(f"{len(missing)} shards of {set_name} are missing: the first task has them made")
            return life.leave(0)
        return life.leave(chain.fill_gaps(run, set_name, missing, again, round_, env))
    life.heed_stop()
    torch.set_num_threads(env.cpus)
    device = devices.one_device(env)
    cache = Path(data_of(run)["cache"])
    against = reference or config.evaluate.reference
    command = ["python", "launch/evaluate.py", str(run.path), "--set", set_name, "--reference", against]
    command += ["--extractor", extractor] if extractor else []
    pace, of_reference, num = Pace(), Pace(), request.num_samples

    def show(done: int, total: int) -> None:
        say("features", shards=f"{done}/{total}", **pace.told(done * num // total, num))

    def show_reference(done: int, total: int) -> None:
        say("features of the reference", images=f"{done}/{total}", **of_reference.told(done, total))

    while True:
        try:
            result = scoring.evaluate_set(
                run,
                set_name,
                reference=open_reference(run, config, against, life.stop),
                extractor=build_extractor(
                    extractor or config.evaluate.extractor,
                    device,
                    image_size=config.data.image_size,
                    shared=beside(cache),
                ),
                cache_dir=cache / "reference",
                image_size=config.data.image_size,
                num_classes=config.model.num_classes,
                command=command,
                stop_requested=life.stop,
                progress=show,
                reference_progress=show_reference,
                token=f"{env.job}.{env.restart}",
                stay=not env.array_task,
            )
        except OthersAtWork as e:  # the first task of the array merges
            say(str(e))
            return life.leave(0)
        except scoring.BrokenSet as e:
            if not e.shards:
                raise  # nothing that computing anew would mend
            if env.array_task:
                say(f"{e}; the first task has them made")
                return life.leave(0)
            repair = f"`python launch/sample.py {shlex.quote(str(run.path))} --set {set_name}`"
            say(f"{e}; {repair} computes what is missing")
            return life.leave(chain.fill_gaps(run, set_name, list(e.shards), again, round_, env))
        except Stopped as e:
            code = life.until_killed_or_on(e.reason)
            if code is None:
                continue
            return life.leave(code, e.reason)
        if set_name.startswith("milestone"):
            _on_the_curve(life, config)
        show_score(run, config, result)
        score = key_of(result)
        say(f"scored {told_of(result)}", **{score: f"{result[score]:.4f}"})
        return life.leave(0)


def _on_the_curve(life: Life, config: Config) -> None:
    """What a milestone scores, in milestones.json, where that is news."""
    run, env = life.run, life.env
    if (record := milestones.publish(run, config, f"{env.job}.{env.restart}")) is None:
        return
    best = record["best"]
    say("best milestone so far", step=best["step"], **{record["score"]: f"{best[record['score']]:.4f}"})
