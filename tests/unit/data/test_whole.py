"""A packed cache is whole when it is used: every damage is found, said, and packed again, and nobody's map changes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.config.data import Data
from ddpm.data import packed, sources, whole
from ddpm.data.packed import PackedImages, open_packed, open_verified, pack
from ddpm.data.scratch import copy_to_scratch
from ddpm.errors import Stopped
from ddpm.run.files import DamagedFile, read_signed, sha256_file, sign, write_json
from tests.images import write_zip

FILES = ("images.npy", "labels.npy", "labels.json", "meta.json")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(name="images", path=str(write_zip(tmp_path / "a.zip", num_images=8)), image_size=8)


def flip(name: str, at: int) -> Callable[[Path], None]:
    def damage(there: Path) -> None:
        content = bytearray((there / name).read_bytes())
        content[at] ^= 0x01
        (there / name).write_bytes(content)

    return damage


def half(name: str) -> Callable[[Path], None]:
    return lambda there: os.truncate(there / name, (there / name).stat().st_size // 2)


def empty(name: str) -> Callable[[Path], None]:
    return lambda there: os.truncate(there / name, 0)


def garbage(name: str) -> Callable[[Path], None]:
    def damage(there: Path) -> None:
        (there / name).write_bytes(np.random.default_rng(0).bytes((there / name).stat().st_size))

    return damage


def folder_of_that_name(name: str) -> Callable[[Path], None]:
    def damage(there: Path) -> None:
        (there / name).unlink()
        (there / name).mkdir()

    return damage


def gone(*names: str) -> Callable[[Path], None]:
    def damage(there: Path) -> None:
        for name in names:
            (there / name).unlink()

    return damage


def short_labels(there: Path) -> None:
    np.save(there / "labels.npy", np.load(there / "labels.npy")[:-1])


def other_shape(there: Path) -> None:
    np.save(there / "images.npy", np.load(there / "images.npy").transpose(0, 2, 1, 3).reshape(8, 4, 16, 3))


def a_file_of_the_keys_name(there: Path) -> None:
    shutil.rmtree(there)
    there.write_bytes(b"")


def deeply_nested(there: Path) -> None:
    (there / "meta.json").write_text("[" * 100_000)


def not_of_ours(there: Path) -> None:
    (there / "meta.json").unlink()
    write_json(there / "meta.json", sign({"name": "images"}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a pixel": flip("images.npy", -1),
    "the first pixel": flip("images.npy", 128),
    "a label": flip("labels.npy", -8),
    "the labels' header": flip("labels.npy", 20),
    "the pixels' magic": flip("images.npy", 1),
    "a bit of meta.json": flip("meta.json", 20),
    **{f"half of {name}": half(name) for name in FILES},
    **{f"{name} empty": empty(name) for name in FILES},
    **{f"garbage as {name}": garbage(name) for name in FILES},
    **{f"a folder as {name}": folder_of_that_name(name) for name in FILES},
    **{f"no {name}": gone(name) for name in FILES if name != "labels.json"},
    "labels alone left by an age purge": gone("images.npy", "meta.json"),
    "nothing left but the folder": gone(*FILES),
    "short labels": short_labels,
    "another shape of as many pixels": other_shape,
    "a file where the folder was": a_file_of_the_keys_name,
    "a meta.json of a thousand brackets": deeply_nested,
    "a meta.json of something else": not_of_ours,
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_cache_is_said_and_packed_again(
    tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    cache = tmp_path / "cache"
    key, before = pack(data, "train", cache)
    images, labels = before.images.copy(), before.labels.copy()
    DAMAGES[case](cache / key)
    again, after = pack(data, "train", cache)
    assert again == key and after.digest == before.digest
    assert np.array_equal(after.images, images) and np.array_equal(after.labels, labels)
    assert f"{cache / key} is damaged: packing it again" in capsys.readouterr().out
    pack(data, "train", cache)
    assert "damaged" not in capsys.readouterr().out


def test_digits_are_not_taken_from_other_images(tmp_path: Path, data: Data) -> None:
    digits = Data(name="digits", image_size=8)
    key, good = pack(digits, "train", tmp_path)
    shutil.rmtree(tmp_path / key)
    (tmp_path / pack(data, "train", tmp_path)[0]).rename(tmp_path / key)
    _, again = pack(digits, "train", tmp_path)
    assert (again.name, again.digest) == ("digits", good.digest)


def test_any_byte_of_a_header_that_changes_is_noticed_or_harmless(tmp_path: Path, data: Data) -> None:
    key, good = pack(data, "train", tmp_path)
    path = tmp_path / key / "images.npy"
    original, images = path.read_bytes(), good.images.copy()
    for at in range(128):
        for bit in (0x01, 0x80):
            path.write_bytes(original[:at] + bytes([original[at] ^ bit]) + original[at + 1 :])
            try:
                opened = open_verified(tmp_path, key)
            except DamagedFile:
                continue
            assert np.array_equal(opened.images, images), at


def test_who_has_damaged_data_mapped_keeps_its_bytes(tmp_path: Path, data: Data) -> None:
    key, _ = pack(data, "train", tmp_path / "cache")
    flip("images.npy", -1)(tmp_path / "cache" / key)
    reader = open_packed(tmp_path / "cache", key)
    seen = reader.images.copy()
    _, repaired = pack(data, "train", tmp_path / "cache")
    pack(data, "train", tmp_path / "cache")
    assert np.array_equal(reader.images, seen) and not np.array_equal(repaired.images, seen)
    (aside,) = (tmp_path / "cache").glob(".tmp-*.damaged-*")  # a node that has it mapped over a network needs the file
    assert np.array_equal(np.load(aside / "images.npy"), seen)


def _repack(data: Data, cache: Path, start: Any, answers: Any) -> None:
    start.wait()
    _, there = pack(data, "train", cache)
    answers.put((there.digest, int(there.images.astype(np.int64).sum())))


def test_several_that_repack_at_once_agree_and_leave_one_whole_copy(tmp_path: Path, data: Data) -> None:
    cache = tmp_path / "cache"
    key, good = pack(data, "train", cache)
    expected = (good.digest, int(good.images.astype(np.int64).sum()))
    flip("images.npy", -1)(cache / key)
    context = multiprocessing.get_context("spawn")
    start, answers = context.Event(), context.Queue()
    packers = [context.Process(target=_repack, args=(data, cache, start, answers)) for _ in range(3)]
    for p in packers:
        p.start()
    start.set()
    assert [answers.get(timeout=60) for _ in packers] == [expected] * 3
    for p in packers:
        p.join(60)
        assert p.exitcode == 0
    assert open_verified(cache, key).digest == good.digest
    assert [p.name for p in cache.iterdir() if ".damaged-" not in p.name] == [key]


# ---------------------------------------------------------------- read once per machine and boot


class Clock:
    """The time that the check reads, an hour from now: files that were written just now have settled then."""

    @staticmethod
    def time() -> float:
        return time.time() + 3600


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine of its own, whose clock is an hour ahead."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(whole, "time", Clock)


def reads(cache: Path, key: str) -> int:
    """How often a verified opening asks whether to stop: once for each chunk that it reads."""
    asked = []
    open_verified(cache, key, stop_requested=lambda: asked.append(1))
    return len(asked)


def test_what_was_found_whole_is_not_read_again_until_it_changes(tmp_path: Path, data: Data, later: None) -> None:
    key, _ = pack(data, "train", tmp_path / "cache")
    assert [reads(tmp_path / "cache", key) for _ in range(3)] == [1, 0, 0]
    path = tmp_path / "cache" / key / "images.npy"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    time.sleep(0.02)
    flip("images.npy", -1)(tmp_path / "cache" / key)
    os.utime(path, ns=times)  # as a tool that hides that it wrote
    with pytest.raises(DamagedFile, match="not the pixels that were packed"):
        open_verified(tmp_path / "cache", key)


def test_a_map_that_somebody_writes_into_is_told_and_one_that_is_touched_or_moved_is_not(
    tmp_path: Path, data: Data
) -> None:
    key, there = pack(data, "train", tmp_path / "cache")
    file, watch = tmp_path / "cache" / key / "images.npy", whole.Watch(there)
    assert watch.damage() == ""
    file.touch()
    assert watch.damage() == ""
    with file.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(bytes([file.read_bytes()[-1] ^ 1]))
    assert watch.damage() == f"{file}: overwritten while it was mapped"
    file.parent.rename(tmp_path / "aside")  # as another job does that finds it damaged
    assert "overwritten" in watch.damage()
    pack(data, "train", tmp_path / "cache")
    assert "overwritten" in watch.damage()
    watch = whole.Watch(open_packed(tmp_path / "cache", key))
    file.parent.rename(tmp_path / "again")
    assert watch.damage() == ""


def test_what_was_written_just_now_is_not_trusted_to_be_unchanged(tmp_path: Path, data: Data) -> None:
    key, _ = pack(data, "train", tmp_path / "cache")
    assert [reads(tmp_path / "cache", key) for _ in range(2)] == [1, 1]


def no_room() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")


@pytest.mark.parametrize("place", [lambda: "/nowhere", no_room])
def test_a_machine_without_a_place_for_marks_reads_each_time(
    tmp_path: Path, data: Data, later: None, monkeypatch: pytest.MonkeyPatch, place: Callable[[], str]
) -> None:
    key, _ = pack(data, "train", tmp_path / "cache")
    monkeypatch.setattr("tempfile.gettempdir", place)
    assert [reads(tmp_path / "cache", key) for _ in range(2)] == [1, 1]


def test_reading_can_be_stopped(tmp_path: Path, data: Data) -> None:
    key, _ = pack(data, "train", tmp_path / "cache")
    with pytest.raises(Stopped, match="preempted"):
        open_verified(tmp_path / "cache", key, stop_requested=lambda: "preempted")


# ---------------------------------------------------------------- caches of before, copies on scratch


def as_before_labels_had_a_digest(cache: Path, key: str) -> None:
    (cache / key / "labels.json").unlink()


def test_a_cache_of_before_is_used_as_it_is_and_gets_its_labels_digest(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    key, before = pack(data, "train", cache)
    kept = read_signed(cache / key / "labels.json")
    capsys.readouterr()
    as_before_labels_had_a_digest(cache, key)
    with monkeypatch.context() as no_decoding:
        no_decoding.setattr(sources, "read", lambda *_: pytest.fail("decoded again"))
        _, after = pack(data, "train", cache)
    assert after.digest == before.digest and read_signed(cache / key / "labels.json") == kept
    assert capsys.readouterr().out == ""
    flip("labels.npy", -8)(cache / key)
    pack(data, "train", cache)
    assert "not the labels that were packed" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["a pixel", "a label", "short labels", "half of images.npy", "no meta.json"])
def test_a_damaged_cache_of_before_is_noticed_too(
    tmp_path: Path, data: Data, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key, before = pack(data, "train", tmp_path)
    as_before_labels_had_a_digest(tmp_path, key)
    DAMAGES[case](tmp_path / key)
    _, after = pack(data, "train", tmp_path)
    assert after.digest == before.digest and (after.labels == before.labels).all()
    assert "is damaged: packing it again" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["a pixel", "a label", "short labels", "another shape of as many pixels"])
def test_a_damaged_copy_on_scratch_is_made_anew(tmp_path: Path, data: Data, case: str) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    key, good = pack(data, "train", cache)
    copy_to_scratch(cache, key, scratch)
    DAMAGES[case](scratch / key)
    copy_to_scratch(cache, key, scratch)
    copy: PackedImages = packed.open_packed(cache, key, scratch=scratch)
    assert copy.images.filename == scratch / key / "images.npy"  # type: ignore[attr-defined]
    assert (copy.images == good.images).all() and (copy.labels == good.labels).all()


def test_a_disk_that_gives_back_something_else_leaves_no_copy(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    key, _ = pack(data, "train", cache)
    copymode = shutil.copymode

    def damaging(source: Path, target: Path) -> None:
        copymode(source, target)
        if Path(target).name == "images.npy":
            flip("images.npy", -1)(Path(target).parent)

    monkeypatch.setattr("shutil.copymode", damaging)
    with pytest.raises(DamagedFile, match="not the pixels"):
        copy_to_scratch(cache, key, scratch)
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("later")
def test_an_archive_is_read_once_and_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, told = write_zip(tmp_path / "a.zip", num_images=4), []
    monkeypatch.setattr(whole, "TOLD_BYTES", 0)

    def digest() -> str:
        return whole.digest_once(archive, told.append)

    first = digest()
    assert digest() == first == sha256_file(archive) and len(told) == 1
    archive.write_bytes(archive.read_bytes() + b"more")
    assert digest() == sha256_file(archive) != first and len(told) == 2
    for mark in (tmp_path / "tmp").glob("*/*"):
        mark.write_text("0" * 63)  # torn
    assert digest() == sha256_file(archive) and len(told) == 3
