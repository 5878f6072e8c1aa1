"""ddpm/sampling/request.py: what a sample set asks for, its file and its digest."""

from pathlib import Path
from typing import Any

import pytest

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling.request import (
    CheckpointRef,
    Request,
    from_config,
    precision_of,
    publish_request,
    read_request,
    samples_record,
    usual_steps,
    withdraw_request,
)
from tests.sampling import make_request, make_set
from tests.saves import Unreadable


def test_a_request_is_published_once(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    before = sample_set.request.read_bytes()
    assert publish_request(sample_set, make_request(eta=0)).digest == request.digest
    other = make_request(checkpoint=CheckpointRef(13, "cd" * 32), seed=9)
    with pytest.raises(RequestError) as e:
        publish_request(sample_set, other)
    for part in (
        "checkpoint.step is 12 there and 13 asked for",
        "checkpoint.sha256",
        "seed is 5 there and 9 asked for",
        "--set OTHERNAME",
    ):
        assert part in str(e.value)
    assert "num_samples" not in str(e.value)
    assert sample_set.request.read_bytes() == before


def test_request_json_has_the_public_form(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    record = files.read_json(sample_set.request)
    assert record is not None and list(record) == [
        "checkpoint",
        "weights",
        "sampler",
        "steps",
        "eta",
        "guidance",
        "seed",
        "num_samples",
        "shards",
        "batch",
        "precision",
        "class_plan",
        "digest",
    ]
    assert record["checkpoint"] == {"step": 12, "sha256": "ab" * 32}
    assert record.pop("digest") == files.sha256_json(record)
    assert read_request(sample_set) == request


def test_a_request_from_before_there_was_a_choice_of_clipping_keeps_its_digest() -> None:
    record = {
        "checkpoint": {"step": 12, "sha256": "ab" * 32},
        "weights": "ema",
        "sampler": "ancestral",
        "steps": 3,
        "eta": 0.0,
        "guidance": None,
        "seed": 5,
        "num_samples": 53,
        "shards": 8,
        "batch": 7,
        "precision": "fp32",
        "class_plan": None,
    }
    digest = "81248bc6c730d4f3e65ace34b9a782c7e37fe90093c4bfb0f11155f8ea3adb36"
    request = Request.from_record({**record, "digest": digest})
    assert request == make_request() and request.clip_x_0 and request.digest == digest


def test_what_is_asked_of_classes_and_clipping_survives_the_file_and_changes_the_digest(tmp_path: Path) -> None:
    request = make_request(guidance=1, class_plan=[50, 3], clip_x_0=False)
    sample_set = make_set(tmp_path / "run", request)
    record = files.read_json(sample_set.request)
    assert record is not None
    assert (record["guidance"], record["class_plan"], record["clip_x_0"]) == (1.0, [50, 3], False)
    assert read_request(sample_set) == request == make_request(guidance=1.0, class_plan=(50, 3), clip_x_0=False)
    others = [make_request(), make_request(guidance=1), make_request(class_plan=[50, 3]), make_request(clip_x_0=False)]
    others += [make_request(variance="fixed_small"), make_request(variance="fixed_large")]
    assert len({r.digest for r in [request, *others]}) == 7
    assert len({files.sha256_json(samples_record(r)) for r in [request, *others]}) == 7  # a score says it too
    assert samples_record(make_request(shards=3, batch=9)) == samples_record(make_request())


def test_a_variance_survives_the_file_that_says_it_only_where_it_was_asked_for(tmp_path: Path) -> None:
    request = make_request(variance="fixed_small")
    sample_set = make_set(tmp_path / "run", request)
    assert read_request(sample_set) == request and request.to_record()["variance"] == "fixed_small"
    assert make_request().to_record().keys() == request.to_record().keys() - {"variance"}
    needless = {**make_request().to_record(), "variance": None}
    del needless["digest"]
    with pytest.raises(DamagedFile, match="left out"):
        Request.from_record({**needless, "digest": files.sha256_json(needless)})


def test_a_request_for_a_sampler_of_other_code_is_no_damaged_one(tmp_path: Path) -> None:
    sample_set = make_set(tmp_path / "run", make_request())
    record = {**make_request().to_record(), "sampler": "heun"}
    del record["digest"]
    files.write_json(sample_set.request, {**record, "digest": files.sha256_json(record)}, replace=True)
    with pytest.raises(RequestError, match=r"does not know \(sampler = 'heun'.*submit from there with --code new") as e:
        read_request(sample_set)
    assert "damaged" not in str(e.value)


def test_a_damaged_or_missing_request_is_named(tmp_path: Path) -> None:
    sample_set = RunDir(tmp_path / "my run").sample_set("fid")
    with pytest.raises(RequestError, match=r"my run/samples/fid/request.json: no such sample set"):
        read_request(sample_set)
    publish_request(sample_set, make_request())
    text = sample_set.request.read_text()
    sample_set.request.write_text(text.replace('"seed": 5', '"seed": 6'))
    with pytest.raises(RequestError, match=r"request.json is damaged: its digest.*mv .*\.old\) and ask for the same"):
        read_request(sample_set)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 54}, "shards = 54: at most num_samples = 53"),
        ({"num_samples": 10**15, "shards": 10**9}, "num_samples = 1000000000000000: at most 1000000000"),
        ({"num_samples": 10**9, "shards": 10**9}, "shards = 1000000000: at most 1000000"),
        ({"batch": 0}, "batch = 0"),
        ({"class_plan": [50, 2]}, r"class_plan = \[50, 2\]: .* num_samples = 53; here the sum is 52"),
        ({"class_plan": [54, -1]}, r"class_plan = \[54, -1\]: must be counts of 0 or more"),
        ({"guidance": -0.5}, "guidance = -0.5: must be at least 0"),
        ({"guidance": float("nan")}, "guidance = nan"),
        ({"eta": 0.5}, "eta = 0.5: only ddim has it; with sampler = ancestral leave it out"),
        ({"sampler": "dpmpp_2m", "eta": 0.5}, "eta = 0.5: only ddim has it; with sampler = dpmpp_2m"),
        ({"variance": "small"}, "variance = 'small': use one of fixed_large, fixed_small"),
        ({"sampler": "ddim", "variance": "fixed_large"}, "variance = fixed_large: only ancestral has one; .* = ddim"),
    ],
)
def test_an_impossible_request_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_request(**changes)


@pytest.mark.parametrize("name", ["a b", ".hidden"])
def test_a_set_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="sample set name"):
        publish_request(SampleSet(tmp_path / name), make_request())
    assert not (tmp_path / name).exists()


def test_a_request_that_cannot_be_read_for_a_moment_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_set = make_set(tmp_path / "run", make_request())
    Unreadable(monkeypatch, {sample_set.request: 1})
    with pytest.raises(OSError, match="Input/output error"):
        read_request(sample_set)
    assert read_request(sample_set) == make_request()


def test_the_variance_that_the_config_has_anyway_is_no_other_request() -> None:
    config = Config.model_validate({"sample": {"sampler": "ancestral", "steps": 1000}})
    at = CheckpointRef(12, "ab" * 32)
    usual = from_config(config, at, "fp32")
    assert from_config(config, at, "fp32", "fixed_large") == usual
    assert from_config(config, at, "fp32", "fixed_small").digest != usual.digest


@pytest.mark.parametrize(("sampler", "timesteps", "steps"), [
    ("ddim", 1000, 40), ("dpmpp_2m", 1000, 20), ("ancestral", 1000, 1000), ("ancestral", 50, 50), ("dpmpp_2m", 45, 20),
])  # fmt: skip
def test_a_sampler_takes_the_configs_steps_if_it_is_the_configs_and_else_its_usual_number(
    sampler: str, timesteps: int, steps: int
) -> None:
    config = Config.model_validate({"diffusion": {"timesteps": timesteps}, "sample": {"sampler": "ddim", "steps": 40}})
    assert usual_steps(config, sampler) == steps


@pytest.mark.parametrize(("asked", "trained_in", "precision"), [
    ("auto", None, "fp32"), ("auto", "fp32", "fp32"), ("auto", "fp16", "fp32"), ("auto", "bf16", "bf16"),
    ("fp32", "bf16", "fp32"), ("bf16", "fp32", "bf16"),
])  # fmt: skip
def test_the_precision_of_auto_is_what_the_run_was_trained_in_on_every_machine(
    tmp_path: Path, asked: str, trained_in: str | None, precision: str
) -> None:
    config = Config.model_validate({"sample": {"precision": asked}})
    run = RunDir(tmp_path) if trained_in else None
    if run:
        run.run_json.write_text(f'{{"resolved": {{"amp": "{trained_in}"}}}}')
    assert precision_of(config, run) == precision


def test_of_a_set_that_was_never_begun_nothing_is_left(tmp_path: Path) -> None:
    for begun in (False, True):
        sample_set = make_set(tmp_path / "run", make_request())
        if begun:
            sample_set.shard(0, 8).touch()
        withdraw_request(sample_set)
        assert not sample_set.request.exists() and sample_set.path.exists() == begun
