"""launch/origin.py: what --from says, and which weights that is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ddpm.errors import RequestError
from ddpm.run import generations
from ddpm.run.files import sign, write_json
from ddpm.run.paths import RunDir
from ddpm.run.records import read_run
from launch import origin
from launch.cluster.site import Site
from launch.queue import directory
from tests.training import live, make_config

CONFIG = make_config(seed=5, checkpoint__every_steps=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, of which `source` is trained. Tests leave it as it is."""
    root = tmp_path_factory.mktemp("runs")
    run, data = RunDir(root / "source"), {"cache": "", "key": None, "digest": "", "num_images": 9, "scratch": None}
    directory.create_run(run, CONFIG, directory.describe(CONFIG, Site(), run, {"data": data}))
    live(CONFIG, run)
    return root


def asked(root: Path, word: str, weights: str | None = None) -> origin.Origin:
    found = origin.asked(word, weights, str(root))
    assert found is not None
    return found


@pytest.mark.parametrize(("word", "step"), [("source", 8), ("source@4", 4), ("source@000008", 8)])
def test_a_run_is_found_by_name_and_by_path(root, word, step):
    for said in (word, str(root / word)):
        record = origin.read(asked(root, said), CONFIG).record
        assert record["step"] == step and record["source"] == str(root / "source") and record["weights"] == "ema"
    record = origin.read(asked(root, word, "model"), CONFIG).record
    assert record["weights"] == "model" and record["sha256"] == generations.verify(RunDir(root / "source"), step).sha256


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("source@5", r"run source has no checkpoint of step 5; it has \[4, 8\]"),
        ("source@best", r"--from source: run source has no scores of milestones yet: .* --all-milestones"),
        ("nowhere", r"no run 'nowhere'; .* there are: source .*and no file of weights \(\.safetensors \.pt"),
        ("source/config.yaml", r"expected a run's directory, or a file of \.safetensors"),
        ("source/checkpoints/ema-000000008.safetensors@8", "a file holds one step's weights; leave @8 out"),
    ],
)
def test_what_is_no_start_is_refused_in_words(root, word, told):
    with pytest.raises(RequestError, match=told):
        origin.read(asked(root, str(root / word) if "/" in word else word), CONFIG)


def test_words_that_say_nothing_are_refused(root):
    for word in ("", "@5"):
        with pytest.raises(RequestError, match="give a run or a file of weights"):
            asked(root, word)
    with pytest.raises(RequestError, match="--from-weights ema: goes with --from"):
        origin.asked(None, "ema", None)
    assert origin.asked(None, None, None) is None


def test_what_the_configs_differ_in_is_told(root, capsys):
    with pytest.raises(RequestError, match=r"\(16 there, 32 here\).*; model\.base_channels is 8 there and 16 here$"):
        origin.read(asked(root, "source"), make_config(model__base_channels=16))
    with pytest.raises(RequestError, match=r"class_embed.*model\.num_classes is 0 there and 10 here"):
        origin.read(asked(root, "source"), make_config(model__num_classes=10))
    assert origin.read(asked(root, "source"), make_config(diffusion__timesteps=10)).record["step"] == 8
    assert "diffusion.timesteps is 8 there and 10 here: the weights were trained for another" in capsys.readouterr().err


def test_a_run_whose_record_is_damaged_is_started_from_as_the_message_about_it_says(root, tmp_path, capsys):
    shutil.copytree(root / "source", tmp_path / "source")
    (tmp_path / "source" / "run.json").write_text("{")
    assert origin.read(asked(tmp_path, "source@4"), CONFIG).record["step"] == 4
    assert "run.json cannot be used" in capsys.readouterr().err


def test_a_run_that_exists_must_have_started_so_and_its_source_may_be_gone(root, tmp_path):
    shutil.copytree(root / "source", tmp_path / "source")
    best = {"step": 4, "sha256": generations.verify(RunDir(root / "source"), 4).sha256}
    write_json(tmp_path / "source" / "milestones.json", sign({"best": best, "curve": []}))
    start = origin.read(asked(tmp_path, "source@best"), CONFIG)
    shutil.rmtree(tmp_path / "source")
    mine = RunDir(tmp_path / "mine")
    record = directory.describe(CONFIG, Site(), mine, {"data": {"cache": "", "digest": "d"}, "labels": {"digest": "e"}})
    directory.create_run(mine, CONFIG, {**record, "from": start.record}, start=start.data)
    directory.update_run(mine, CONFIG, {**record, "run_id": "another"})  # a later submission keeps it, and the id
    assert read_run(mine)["run_id"] == record["run_id"]
    for word in ("source", "source@4", "source@best", str(tmp_path / "source")):
        origin.check_same(mine, asked(tmp_path, word))
    origin.check_same(mine, None)
    for word, weights in (("source@8", None), ("other", None), ("source", "model")):
        with pytest.raises(RequestError, match=r"run mine exists and started from the weights \(ema\) of .*source@4;"):
            origin.check_same(mine, asked(tmp_path, word, weights))
    with pytest.raises(RequestError, match="run source exists and started from its seed"):
        origin.check_same(RunDir(root / "source"), asked(root, "source"))


def test_a_run_from_before_ids_gets_that_of_its_checkpoints_or_a_new_one_where_nothing_contradicts_it(tmp_path):
    run = RunDir(tmp_path / "old")
    record = directory.describe(CONFIG, Site(), run, {"data": {"cache": "", "digest": "d"}, "labels": {}})
    directory.create_run(run, CONFIG, {key: value for key, value in record.items() if key != "run_id"})
    for step, said, then in ((1, {}, record["run_id"]), (2, {"run_id": "a"}, "a"), (3, {"run_id": "b"}, None)):
        now = {key: value for key, value in read_run(run).items() if key not in ("run_id", "self_sha256")}
        run.run_json.write_text(json.dumps(now))
        run.manifest(step).write_text(json.dumps(said))
        directory.update_run(run, CONFIG, record)
        assert read_run(run).get("run_id") == then
