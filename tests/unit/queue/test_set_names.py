"""The name of a sample set: allowed whatever is asked for, another for each value, and that of before for old sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.files import sha256_json
from ddpm.run.paths import RunDir, check_name
from ddpm.sampling.request import CheckpointRef, publish_request, read_request
from launch.queue.sets import chain_set, request_for, set_of, shards_to_make
from tests.training import make_config, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "run")
    made.run_json.write_text("{}")
    return made


def asking(**sample: Any) -> Config:
    guided = {"model__num_classes": 10, "train__label_dropout": 0.1}
    return make_config(**guided, **{f"sample__{key}": value for key, value in sample.items()})


ODD = (1e-7, 1e22, 1e300, 5e-324, 0.0, 1.5, 2.0, 1.2345678, 1.23456789012345, 0.1 + 0.2, 0.3, 123456.7, 123456.8)


def test_every_guidance_and_eta_has_a_name_of_its_own_that_is_allowed(run: RunDir) -> None:
    guided = [set_of(run, asking(guidance=value), 8) for value in ODD]
    noisy = [set_of(run, asking(sampler="ddim", eta=value), 8) for value in (0.1, 1 / 3, 0.333333, 1e-7, 0.0)]
    assert len({*guided, *noisy}) == len(ODD) + 5
    for name in (*guided, *noisy):
        check_name(name)


def test_usual_numbers_are_named_as_ever(run: RunDir) -> None:
    assert set_of(run, asking(guidance=1.5), 8) == "ddim4-guided1.5-step8-seed0"
    assert set_of(run, asking(guidance=2), 8) == "ddim4-guided2-step8-seed0"
    assert set_of(run, asking(sampler="ddim", eta=0.5, guidance=0.25), 8) == "ddim4-eta0.5-guided0.25-step8-seed0"


def test_minus_zero_is_zero(run: RunDir) -> None:
    minus, zero = asking(guidance=-0.0, eta=-0.0), asking(guidance=0.0, eta=0.0)
    assert str(minus.sample.guidance) == str(minus.sample.eta) == "0.0"
    assert set_of(run, minus, 8) == set_of(run, zero, 8)


def test_a_name_that_would_be_too_long_is_made_to_fit_and_stays_its_own(run: RunDir) -> None:
    long = {"sampler": "ddim", "eta": 0.1 + 0.2, "clip_x_0": False, "class_plan": [4, *[0] * 9], "seed": 2**63 - 1}
    names = [
        set_of(run, asking(**long, guidance=value), 10**9) for value in (1.2345678901234567e-10, 1.234567890123e-10)
    ]
    assert len(set(names)) == 2
    for name in names:
        check_name(name)


@pytest.mark.parametrize(
    ("former", "eta", "guidance"),
    [
        ("ddim4-step8-seed0", 0.5, None),
        ("ddim4-guided1.23457-step8-seed0", 0.0, 1.2345678),
        ("ddim4-eta0.333333-step8-seed0", 1 / 3, None),
    ],
)
def test_a_set_of_before_goes_on_under_its_name(run: RunDir, former: str, eta: float, guidance: float | None) -> None:
    config = asking(sampler="ddim", eta=eta, guidance=guidance)
    assert set_of(run, config, 8) != former
    publish_request(run.sample_set(former), request_for(run, config, CheckpointRef(8, "0" * 64)))
    assert set_of(run, config, 8) == former
    assert set_of(run, asking(sampler="ddim", eta=0.25, guidance=guidance), 8) != former


def test_a_set_of_one_class_is_named_after_it_and_one_of_before_goes_on(run: RunDir) -> None:
    one, other, both = (asking(class_plan=[*plan, *[0] * 7]) for plan in ([0, 4, 0], [4, 0, 0], [2, 2, 0]))
    names = [set_of(run, config, 8) for config in (one, other, both)]
    assert names == ["ddim4-class1-step8-seed0", "ddim4-class0-step8-seed0", "ddim4-plan-step8-seed0"]
    publish_request(run.sample_set(names[2]), request_for(run, one, CheckpointRef(8, "0" * 64)))
    assert [set_of(run, config, 8) for config in (one, other, both)] == [names[2], *names[1:]]


@pytest.mark.parametrize("name", ["q.json", "q.json.damaged-98e98456"])
def test_a_new_set_is_not_called_like_a_score_of_another_and_an_old_one_goes_on(run: RunDir, name: str) -> None:
    request, sample_set = request_for(run, make_config(), CheckpointRef(8, "0" * 64)), run.sample_set(name)
    with pytest.raises(RequestError, match="a file of another set's scores is called so"):
        publish_request(sample_set, request)
    assert not sample_set.path.exists()
    publish_request(run.sample_set("old"), request)
    run.sample_set("old").path.rename(sample_set.path)
    assert publish_request(sample_set, request) == request


def signed(**body: Any) -> str:
    return json.dumps({**body, "digest": sha256_json(body)})


HOSTILE = {
    "a checkpoint of another type": signed(checkpoint=5),
    "a list": signed(checkpoint=[1, 2], eta=[], guidance={}),
    "a word for a number": None,
    "a number beyond floats": None,
    "digits without end": '{"eta": ' + "9" * 5000 + "}",
    "brackets without end": "[" * 100_000,
    **{f"{depth} brackets": '{"a": ' + "[" * depth + "]" * depth + ', "digest": ""}' for depth in range(900, 1000, 10)},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_request_is_refused_in_a_sentence(run: RunDir, case: str) -> None:
    config = make_config()
    name = chain_set(run, config)
    request = request_for(run, config, CheckpointRef(8, "0" * 64))
    publish_request(run.sample_set(name), request)
    body = {k: v for k, v in request.to_record().items() if k != "digest"}
    eta = {"a word for a number": "x", "a number beyond floats": 10**400}.get(case)
    run.sample_set(name).request.write_text(HOSTILE[case] or signed(**{**body, "eta": eta}))
    assert chain_set(run, config) == name == set_of(run, config, 8)
    for read in (lambda: read_request(run.sample_set(name)), lambda: shards_to_make(run, config, name)):
        with pytest.raises(RequestError, match=r"request\.json is damaged"):
            read()
