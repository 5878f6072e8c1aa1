"""`train` is what the run was trained on, whatever lies in its folder now; a folder is its images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.config.schema import Config
from ddpm.data.labels import labels_record
from ddpm.data.packed import PackedImages, load_folder, pack
from ddpm.errors import RequestError
from ddpm.run.files import sign, write_json
from ddpm.run.paths import RunDir
from ddpm.scoring.against import check_file, check_for_run, folder_digest, open_reference
from tests.cli.harness import png, write_zip
from tests.training import make_config, make_run


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    for split, seed in (("train", 0), ("test", 100)):
        for label, name in enumerate(("cat", "dog")):
            where = tmp_path / "pics" / split / name
            where.mkdir(parents=True)
            for i in range(3):
                (where / f"{i}.png").write_bytes(png(8, seed + 10 * label + i))
    return tmp_path / "pics"


@pytest.fixture
def config(pics: Path) -> Config:
    return make_config(data__name="images", data__path=str(pics), data__image_size=8, model__num_classes=2)


@pytest.fixture
def run(tmp_path: Path, config: Config) -> RunDir:
    made = make_run(tmp_path / "run")
    key, packed = pack(config.data, "train", tmp_path / "cache")
    data = {"cache": str(tmp_path / "cache"), "key": key, "digest": packed.digest}
    write_json(made.run_json, sign({"data": data, "labels": labels_record(packed)}), replace=True)
    return made


def opened(run: RunDir, config: Config, name: str) -> PackedImages:
    there: Any = open_reference(run, config, name, lambda: None)
    return there


def swap(pics: Path) -> None:
    for split in ("train", "test"):
        (pics / split / "cat").rename(pics / "t")
        (pics / split / "dog").rename(pics / split / "cat")
        (pics / "t").rename(pics / split / "dog")


def test_train_is_what_the_run_was_trained_on_whatever_became_of_its_folder(
    run: RunDir, config: Config, pics: Path
) -> None:
    before = opened(run, config, "train")
    swap(pics)
    after = opened(run, config, "train")
    assert after.digest == before.digest and after.labels.tolist() == before.labels.tolist() == [0, 0, 0, 1, 1, 1]
    shutil.rmtree(pics)
    check_for_run(run, config, "train")
    assert opened(run, config, "train").digest == before.digest


def test_where_the_packed_data_is_gone_it_is_packed_again_from_the_same_images_alone(
    run: RunDir, config: Config, pics: Path
) -> None:
    before, cache = opened(run, config, "train"), run.path.parent / "cache"
    shutil.rmtree(cache)
    assert opened(run, config, "train").digest == before.digest
    shutil.rmtree(cache)
    swap(pics)
    with pytest.raises(RequestError, match="is not what run run was trained on: digest"):
        opened(run, config, "train")
    shutil.rmtree(pics)
    shutil.rmtree(cache)
    with pytest.raises(
        RequestError, match=r"that the run was trained on is gone, and cannot be packed again: data\.path"
    ):
        opened(run, config, "train")


def test_classes_that_are_called_otherwise_are_no_classes_of_the_model(run: RunDir, config: Config, pics: Path) -> None:
    opened(run, config, "test")
    for split in ("train", "test"):
        (pics / split / "cat").rename(pics / split / "emu")
    with pytest.raises(RequestError, match="its classes are dog, emu, and run run was trained on cat, dog"):
        opened(run, config, "test")
    unlabelled = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 0})})
    opened(run, unlabelled, "test")


def test_the_digest_of_a_folder_is_that_of_its_images(pics: Path, tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {f"{i}.png": png(8, i) for i in range(3)})
    for path in (pics, archive):
        assert folder_digest(path) == load_folder(path).digest
    (pics / "train" / "cat" / "0.png").write_bytes(png(8, 999))
    assert folder_digest(pics) == load_folder(pics).digest
    (pics / "train" / "cat" / "0.png").write_bytes(b"no picture")
    assert folder_digest(pics) == "" and np.size(load_folder(archive).images)


def test_what_has_no_end_is_no_reference() -> None:
    with pytest.raises(RequestError, match="/dev/zero: neither a file nor a folder"):
        check_file("/dev/zero")
