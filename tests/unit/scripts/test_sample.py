"""What launch/sample.py makes of a command line."""

import re
from pathlib import Path

import pytest

from ddpm.config import reading
from ddpm.errors import RequestError
from ddpm.run.files import write_json
from ddpm.sampling.request import precision_of
from launch import export
from launch.sample import choose_generation, class_plan, parse, sampling_config
from tests.training import make_config, make_run


def test_a_number_that_the_classes_do_not_divide_is_refused_with_those_next_to_it() -> None:
    assert class_plan("balanced", 99, 3) == [33] * 3
    for num, near in ((100, "--num-samples 99 or 102"), (2, "--num-samples 3")):
        with pytest.raises(RequestError, match=f"{near}$"):
            class_plan("balanced", num, 3)


def test_the_precision_that_a_refusal_of_infinite_samples_advises_is_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    run.config.write_text(make_config().to_yaml())
    write_json(run.run_json, {"resolved": {"amp": "bf16"}})
    monkeypatch.setattr("sys.argv", ["sample.py", run.name, "--set", "other", "--precision", "fp32"])
    asked = sampling_config(parse(), run, None)
    assert (precision_of(reading.of_run(run), run), precision_of(asked, run)) == ("bf16", "fp32")


def test_the_command_that_a_run_without_checkpoints_is_told_is_one_of_that_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    told = re.escape(f"train it first (python launch/submit.py {run.quoted})")
    with pytest.raises(RequestError, match=told):
        choose_generation(run, None)
    run.config.write_text(make_config().to_yaml())
    write_json(run.run_json, {"schema": 1, "name": run.name})
    monkeypatch.setattr("sys.argv", ["export.py", str(run.path), str(tmp_path_factory.mktemp("outside") / "there")])
    with pytest.raises(RequestError, match=told):
        export.main()
