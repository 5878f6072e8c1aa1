"""ddpm/data/scratch.py: a copy on a node's own disk is whole or is passed over, and what was killed does not stay."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.data import Data
from ddpm.data.packed import PackedImages, open_packed, pack
from ddpm.data.scratch import copy_to_scratch
from ddpm.errors import Stopped
from ddpm.run.files import TMP_PREFIX
from tests.images import write_zip


def packed_at(cache: Path) -> tuple[str, PackedImages]:
    archive = write_zip(cache.with_name("a.zip"), num_images=8)
    return pack(Data(name="images", path=str(archive), image_size=8), "train", cache)


def test_scratch_gets_the_same_data_once(tmp_path: Path) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    key, packed = packed_at(cache)
    scratch.mkdir()
    copy_to_scratch(cache, key, scratch)
    copy_to_scratch(cache, key, scratch)
    assert open_packed(scratch, key).digest == packed.digest
    assert [p.name for p in scratch.iterdir()] == [key]


def thinned(copy: Path) -> None:
    (copy / "images.npy").unlink()


def cut(name: str) -> Callable[[Path], None]:
    def damage(copy: Path) -> None:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])

    return damage


@pytest.mark.parametrize("damage", [thinned, cut("images.npy"), cut("labels.npy"), cut("meta.json")])
def test_a_copy_on_scratch_that_is_not_whole_is_made_anew_or_passed_over(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    key, packed = packed_at(cache)
    copy_to_scratch(cache, key, scratch)
    damage(scratch / key)
    passed_over = open_packed(cache, key, scratch=scratch)
    assert passed_over.images.filename == cache / key / "images.npy"  # type: ignore[attr-defined]
    copy_to_scratch(cache, key, scratch)
    again = open_packed(cache, key, scratch=scratch)
    assert again.images.filename == scratch / key / "images.npy"  # type: ignore[attr-defined]
    for one in (passed_over, again):
        assert one.digest == packed.digest and (one.images == packed.images).all()
        assert (one.labels == packed.labels).all()
    assert [p.name for p in scratch.iterdir()] == [key]


def test_a_copy_on_scratch_without_room_leaves_nothing_that_is_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    key, packed = packed_at(cache)
    copy_to_scratch(cache, key, scratch)
    thinned(scratch / key)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("shutil.copymode", refuse)
        with pytest.raises(OSError, match="No space left"):
            copy_to_scratch(cache, key, scratch)
    assert list(scratch.iterdir()) == []
    assert open_packed(cache, key, scratch=scratch).digest == packed.digest


def test_a_copy_that_is_told_to_stop_stops_and_leaves_nothing(tmp_path: Path) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    key, _ = packed_at(cache)
    with pytest.raises(Stopped, match="preempted"):
        copy_to_scratch(cache, key, scratch, stop_requested=lambda: "preempted")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("there_is", "age_s", "stays"), [(True, 7200, False), (False, 7200, False), (True, 60, True)])
def test_what_a_copy_that_was_killed_left_is_removed_by_a_later_job_and_a_copy_under_way_is_not(
    tmp_path: Path, there_is: bool, age_s: int, stays: bool
) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    key, _ = packed_at(cache)
    if there_is:
        copy_to_scratch(cache, key, scratch)
    half = scratch / f"{TMP_PREFIX}{key}.123-abcd"
    half.mkdir(parents=True)
    (half / "images.npy").write_bytes(b"half")
    for path in (half / "images.npy", half):
        os.utime(path, (time.time() - age_s,) * 2)
    copy_to_scratch(cache, key, scratch)
    assert half.exists() == stays and (scratch / key).exists()
