"""launch/life/inputs.py: a life trains on the data that the run was submitted with, whole, or says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from ddpm.config.schema import Config
from ddpm.data import packed, whole
from ddpm.data.labels import labels_record
from ddpm.data.packed import PackedImages
from ddpm.errors import DoNotRetry, EnvironmentLacks
from ddpm.run.fence import Fence
from ddpm.run.files import DamagedFile, read_signed
from launch.cluster.environment import JobEnvironment
from launch.life import inputs
from launch.life.life import Life
from tests.images import write_zip
from tests.training import ALONE, make_config, make_run


class Here:
    """A run of folders of images, two classes, with its packed data and its record."""

    def __init__(self, tmp_path: Path, num_classes: int = 2, **data: Any) -> None:
        self.source = tmp_path / "images"
        shutil.unpack_archive(write_zip(tmp_path / "a.zip", num_images=8, splits=("train", "test")), self.source)
        there = {"data__name": "images", "data__path": str(self.source), "log__validate_every_steps": 3}
        self.config: Config = make_config(**there, model__num_classes=num_classes)
        self.cache, self.run = tmp_path / "cache", make_run(tmp_path / "run")
        self.key, self.good = packed.pack(self.config.data, "train", self.cache)
        self.images = self.good.images.copy()
        self.data = {"cache": str(self.cache), "key": self.key, "digest": self.good.digest, "scratch": None, **data}
        self.record(labels=labels_record(self.good))

    def record(self, **more: Any) -> None:
        self.run.run_json.write_text(json.dumps({"data": self.data, **more}))

    @property
    def kept(self) -> Any:
        return json.loads(self.run.run_json.read_text()).get("labels")

    def open(self, fence: Fence | None = None) -> PackedImages:
        env = JobEnvironment("local", "1", 0, "n1", 0, 1, 0, "", 0, 1, None, "")
        return inputs.packed_data(Life(self.run, lambda: None, env), self.config, ALONE, fence)  # type: ignore[arg-type]

    def flip_pixel(self) -> None:
        path = self.cache / self.key / "images.npy"
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))

    def flip_label(self) -> None:
        labels = np.load(self.cache / self.key / "labels.npy")
        labels[0] ^= 1
        np.save(self.cache / self.key / "labels.npy", labels)


DAMAGES: dict[str, tuple[Callable[[Here], object], str]] = {
    "a pixel": (Here.flip_pixel, "is damaged.*these are not the pixels"),
    "a label": (Here.flip_label, "is damaged.*these are not the labels"),
    "no meta.json": (lambda h: (h.cache / h.key / "meta.json").unlink(), "is damaged.*meta.json"),
    "gone": (lambda h: shutil.rmtree(h.cache), "is gone"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_data_that_is_damaged_or_gone_is_packed_again_by_the_job(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Here(tmp_path)
    damage, words = DAMAGES[case]
    damage(here)
    there = here.open()
    assert (there.images == here.images).all() and (there.labels == here.good.labels).all()
    out = capsys.readouterr().out
    assert all(word in out for word in words.split(".*")) and "packing it again" in out


@pytest.mark.parametrize("case", DAMAGES)
def test_where_it_cannot_be_packed_again_the_job_ends_for_good_with_what_to_do(tmp_path: Path, case: str) -> None:
    here = Here(tmp_path)
    DAMAGES[case][0](here)
    shutil.rmtree(here.source)
    with pytest.raises(
        DoNotRetry, match=r"images: does not exist.* cannot be packed again here: .*submit the run again"
    ):
        here.open()


def test_data_that_cannot_be_read_once_is_read_again_and_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, opened, times, number = Here(tmp_path), whole.open_file, [1], errno.ESTALE
    shutil.rmtree(here.source)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where nobody has marked it as read

    def failing(path: Path) -> BinaryIO:
        """A file system that fails for a moment."""
        if path.name == "images.npy" and times[0]:
            times[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return opened(path)

    monkeypatch.setattr(whole, "open_file", failing)
    assert (here.open().images == here.images).all() and "packing" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / f"ddpm-hpc-{os.getuid()}", ignore_errors=True)
    times[0] = 2
    with pytest.raises(EnvironmentLacks, match=r"Stale file handle: '.*images\.npy'.* cannot be packed again here"):
        here.open()  # and the job is tried again
    times[0], number = 1, errno.EACCES
    with pytest.raises(EnvironmentLacks, match=r"Permission denied: '.*images\.npy'.* cannot be packed again here"):
        here.open()  # as on a node that lacks a group


def test_a_flipped_label_in_a_cache_of_before_is_found_by_what_the_run_keeps_and_mended(tmp_path: Path) -> None:
    here = Here(tmp_path)
    (here.cache / here.key / "labels.json").unlink()
    here.flip_label()
    assert (here.open().labels == here.good.labels).all()
    (here.cache / here.key / "labels.json").unlink()
    here.flip_label()
    shutil.rmtree(here.source)
    with pytest.raises(DoNotRetry, match=r"does not exist.*'across' had 4 images and has 3.* cannot be packed again"):
        here.open()


def renamed(here: Here) -> None:
    """A file of each class goes to the other: the same images in the same order, with other labels."""
    shutil.rmtree(here.cache)
    here.source.joinpath("train", "across").rename(here.source / "train" / "along")


@pytest.mark.parametrize("num_classes", [2, 0])
def test_a_job_does_not_train_on_with_other_classes_unless_the_model_has_none(tmp_path: Path, num_classes: int) -> None:
    here = Here(tmp_path, num_classes)
    renamed(here)
    if num_classes:
        with pytest.raises(DoNotRetry, match=r"class 0 was 'across' and is 'along' now\. Restore it"):
            here.open()
    else:
        assert (here.open().images == here.images).all()


def test_a_run_of_before_gets_its_labels_at_its_next_start_and_they_are_compared_from_then_on(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.record(other="stays")
    fence = Fence(here.run, {"job": "1", "restart": 0, "host": "n1"}, wait_s=0)
    try:
        here.open(fence)
        assert here.kept == labels_record(here.good)
        assert json.loads(here.run.run_json.read_text())["other"] == "stays"
        renamed(here)
        with pytest.raises(DoNotRetry, match="class 0 was 'across' and is 'along' now"):
            here.open(fence)
    finally:
        fence.release()


@pytest.mark.parametrize("record", [{}, {"data": 1}, {"data": {}}, {"data": {"cache": 1, "key": "k", "digest": "d"}}])
def test_a_record_that_does_not_say_where_the_data_is_ends_the_job_in_a_sentence(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    here = Here(tmp_path)
    here.run.run_json.write_text(json.dumps(record))
    with pytest.raises(DamagedFile, match=r"run\.json .*restore it"):
        here.open()


def test_a_damaged_copy_on_scratch_is_made_anew_by_the_job(tmp_path: Path) -> None:
    here = Here(tmp_path, scratch=str(tmp_path / "scratch"))
    here.open()
    copy = tmp_path / "scratch" / "ddpm-hpc" / here.key / "images.npy"
    copy.write_bytes(copy.read_bytes()[:-1] + bytes([copy.read_bytes()[-1] ^ 1]))
    there = here.open()
    assert there.images.filename == copy and (there.images == here.images).all()  # type: ignore[attr-defined]


def test_a_scratch_whose_variable_is_not_set_here_is_said_and_the_cache_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_SCRATCH", raising=False)
    monkeypatch.chdir(tmp_path)
    here = Here(tmp_path, scratch="$LOCAL_SCRATCH")
    assert len(here.open()) == len(here.good)
    said = capsys.readouterr().out
    assert "scratch of n1 cannot be used" in said and "$LOCAL_SCRATCH is not set" in said
    assert not (tmp_path / "$LOCAL_SCRATCH").exists()
    (tmp_path / "file").touch()
    here.data["scratch"] = str(tmp_path / "file")
    here.record(labels=here.kept)
    here.open()
    assert f"scratch {tmp_path}/file/ddpm-hpc of n1 cannot be used" in capsys.readouterr().out


def test_a_record_that_lost_its_signature_is_said_once_and_signed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Here(tmp_path)
    kept = here.kept
    fence = Fence(here.run, {"job": "1", "restart": 0, "host": "n1"}, wait_s=0)
    for told in (1, 0):
        here.open(fence)
        assert capsys.readouterr().out.count("run.json is signed no more") == told
        assert read_signed(here.run.run_json)["labels"] == kept
    fence.release()


@pytest.mark.parametrize("case", ["gone", "damaged", "others", "nowhere"])
def test_a_test_split_that_is_not_as_it_was_is_packed_again_or_training_goes_on_without(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Here(tmp_path)
    key, test = packed.pack(here.config.data, "test", here.cache)
    here.data["test"] = {"key": key, "digest": test.digest if case != "others" else "0" * 64}
    here.record()
    if case == "damaged":
        np.save(here.cache / key / "images.npy", test.images[::-1])
    elif case != "others":
        shutil.rmtree(here.cache / key)
    if case == "nowhere":
        shutil.rmtree(here.source)
    env = JobEnvironment("local", "1", 0, "n1", 0, 1, 0, "", 0, 1, None, "")
    found = inputs.held_out(Life(here.run, lambda: None, env), here.config, ALONE)  # type: ignore[arg-type]
    if case in ("gone", "damaged"):
        assert found is not None and found.digest == test.digest
    else:
        assert found is None and "no validation in this life" in capsys.readouterr().out
