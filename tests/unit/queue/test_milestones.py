"""Which sets milestones become, the curve of their scores, and the best of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.sample import Milestones, Sample
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.files import sign
from ddpm.run.paths import RunDir
from ddpm.sampling.request import CheckpointRef, publish_request, samples_record
from ddpm.scoring.record import publish_score
from launch.queue import milestones, sets


def config_of(**milestone: Any) -> Config:
    config = Config()
    wanted = {"extractor": "pixels", "milestones": Milestones(**milestone)}
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=wanted)})


def test_a_milestone_is_sampled_as_the_config_says_but_for_its_number() -> None:
    sampled = milestones.sampled_as(config_of(num_samples=600))
    assert (sampled.sample.num_samples, sampled.sample.shards, sampled.sample.batch) == (600, 2, 500)
    assert sampled.digest() == Config().digest()
    assert milestones.sampled_as(Config()).sample.num_samples == 5000
    few = Config().model_copy(update={"sample": Sample(num_samples=60, shards=2)})
    assert milestones.sampled_as(few).sample.num_samples == 60
    assert milestones.how_many(few).startswith("60 samples of each, by the config's sample.num_samples (at most 5,000")
    assert milestones.how_many(config_of(num_samples=600)) == "600 samples of each, by the config's evaluate.milestones"


def scored(run: RunDir, config: Config, step: int, value: float) -> str:
    sampled = milestones.sampled_as(config)
    name = milestones.set_name(run, sampled, step)
    request = sets.request_for(run, sampled, CheckpointRef(step, f"{step:02x}" * 32))
    publish_request(run.sample_set(name), request)
    record = {
        **samples_record(request), "frechet_distance": value, "frechet_distance_interval": [value - 1, value + 1],
        "nfe": 100, "reference": {"name": "cifar10", "split": "train", "num_images": 9, "digest": "d"},
        "extractor": {"name": "pixels"}, "command": [], "created": "",
    }  # fmt: skip
    publish_score(run, name, record)
    return name


def test_the_curve_has_each_milestone_once_and_names_the_best(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), config_of(num_samples=600)
    (tmp_path / "run.json").write_text('{"data": {"cache": "/none", "digest": "d"}}')
    assert milestones.publish(run, config, "t") is None and not run.milestones.exists()
    with pytest.raises(RequestError, match="--all-milestones"):
        milestones.best_step(run, config)
    names = [scored(run, config, step, value) for step, value in ((300, 5.0), (100, 9.0), (200, 3.0))]
    scored(run, config_of(num_samples=700), 400, 1.0)  # of another number: on another curve
    record = milestones.publish(run, config, "t")
    assert record is not None and milestones.publish(run, config, "t") is None
    assert [(p["step"], p["images"], p["frechet_distance"]) for p in record["curve"]] == [
        (100, 12800, 9.0), (200, 25600, 3.0), (300, 38400, 5.0)
    ]  # fmt: skip
    assert record["best"]["set"] == names[2] == "milestone600-ddim100-step200-seed0"
    assert record["best"]["sha256"] == f"{200:02x}" * 32 and milestones.best_step(run, config) == 200
    short = {**record, "curve": record["curve"][:1], "best": record["curve"][0]}
    run.milestones.write_text(json.dumps(sign(short)))  # an old one put back, or a sibling's
    assert milestones.best_step(run, config) == 200
    assert milestones.publish(run, config, "t") == record and json.loads(run.milestones.read_text()) == record

    shutil.rmtree(run.eval)  # then there is nothing but what the file says
    assert milestones.best_step(run, config) == 200
    run.checkpoints.mkdir()
    run.manifest(200).write_text(json.dumps(sign({"sha256": "another"})))
    with pytest.raises(RequestError, match="is of another checkpoint than this run's step 200"):
        milestones.best_step(run, config)
    run.milestones.write_text(run.milestones.read_text().replace('"step": 200', '"step": 300'))
    with pytest.raises(RequestError, match="self_sha256 does not match"):
        milestones.best_step(run, config)


def test_the_images_that_all_milestones_are_compared_with_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config, read = RunDir(tmp_path), config_of(num_samples=600), []
    (tmp_path / "run.json").write_text('{"data": {"cache": "/none"}}')
    monkeypatch.setattr(sets, "digest_of_split", lambda run, split: read.append(split) or "d")
    for step in (100, 200, 300):
        scored(run, config, step, float(step))
    record = milestones.publish(run, config, "t")
    assert record is not None and len(record["curve"]) == 3
    assert len(read) == 2  # and once more to see whether another came meanwhile
