"""ddpm/data: any source becomes the same pixels once, and the batch of a step is a function of the step."""

import http.client
import io
import multiprocessing
import os
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.config.data import Data
from ddpm.data import sources
from ddpm.data.batches import Batches, Mapped, Resident, store
from ddpm.data.packed import PackedImages, images_digest, load_folder, open_packed, open_source, pack
from ddpm.errors import EnvironmentLacks, RequestError, Stopped
from ddpm.run.files import DamagedFile, read_signed
from launch import prepare
from tests.images import write_zip
from tests.training import make_config, make_images

CPU = torch.device("cpu")


def png(value: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value % 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def as_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def as_folder(path: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def images_at(path: Path, size: int = 8) -> Data:
    return Data(name="images", path=str(path), image_size=size)


MEMBERS = {
    **{f"train/{kind}/{i}.png": png(10 * i + k) for k, kind in enumerate(("cat", "dog")) for i in range(3)},
    "test/dog/9.png": png(99),
    "test/dog/.hidden.png": b"no image",
    "__MACOSX/train/cat/._0.png": b"no image",
    "README.txt": b"no image",
}


# ---------------------------------------------------------------- sources


def test_a_folder_and_a_zip_of_the_same_images_are_the_same_data(tmp_path: Path) -> None:
    folder, archive = as_folder(tmp_path / "f", MEMBERS), as_zip(tmp_path / "a.zip", MEMBERS)
    packed = [pack(images_at(p), "train", tmp_path / "cache")[1] for p in (folder, archive)]
    assert packed[0].digest == packed[1].digest
    for one in packed:
        assert one.images.shape == (6, 8, 8, 3) and one.images.dtype == np.uint8
        assert one.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert one.images[4, 0, 0].tolist() == [11, 22, 7]


@pytest.mark.parametrize("wrapper", ["", "archive/", "a/b/c/"])
def test_folders_that_wrap_everything_say_nothing(tmp_path: Path, wrapper: str) -> None:
    images = {k: v for k, v in MEMBERS.items() if k.startswith(("train", "test"))}
    archive = as_zip(tmp_path / "a.zip", {wrapper + k: v for k, v in images.items()})
    source = open_source(images_at(archive))
    assert source.classes == ["cat", "dog"]
    assert {split: len(names) for split, names in source.members.items()} == {"train": 6, "test": 1}


def test_without_splits_everything_is_for_training(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "a.zip", {f"faces/{kind}/{i}.png": png(i) for kind in "ab" for i in range(2)})
    source = open_source(images_at(archive))
    assert list(source.members) == ["train"] and source.classes == ["a", "b"]
    flat = open_source(images_at(as_zip(tmp_path / "flat.zip", {f"{i}.png": png(i) for i in range(3)})))
    assert len(flat.members["train"]) == 3


def test_the_test_split_is_apart_and_a_missing_one_is_named(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "a.zip", MEMBERS)
    _, test = pack(images_at(archive), "test", tmp_path / "cache")
    assert test.images[:, 0, 0, 0].tolist() == [99] and test.labels.tolist() == [1] and test.split == "test"
    only = as_zip(tmp_path / "b.zip", {k: v for k, v in MEMBERS.items() if k.startswith("train")})
    with pytest.raises(RequestError, match=r"no 'test' split: name one that it has: train"):
        pack(images_at(only), "test", tmp_path / "cache")


@pytest.mark.parametrize("members", [["0.png", "1.png"], ["train/0.png", "test/1.png"]])
def test_a_folder_of_a_split_is_no_class(tmp_path: Path, members: list[str]) -> None:
    archive = as_zip(tmp_path / "a.zip", {name: png() for name in members})
    source = open_source(images_at(archive))
    assert source.classes == [""] and set(source.labels.values()) == {0}


def test_images_are_cropped_to_their_middle_and_resized(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    buffer = io.BytesIO()
    wide.save(buffer, format="PNG")
    gray = io.BytesIO()
    Image.new("L", (5, 5), 77).save(gray, format="PNG")
    archive = as_zip(tmp_path / "a.zip", {"a/0.png": buffer.getvalue(), "a/1.png": gray.getvalue()})
    _, packed = pack(images_at(archive), "train", tmp_path / "cache")
    assert (packed.images[0] == (0, 0, 255)).all() and (packed.images[1] == 77).all()


def test_digits_need_no_file(tmp_path: Path) -> None:
    _, packed = pack(Data(name="digits", image_size=8), "train", tmp_path)
    assert packed.images.shape == (1797, 8, 8, 3) and sorted(set(packed.labels.tolist())) == list(range(10))
    assert packed.images.max() == 255 and packed.images.min() == 0


def test_what_was_done_to_the_pixels_is_kept_and_changes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_zip(tmp_path / "a.zip", num_images=8)
    key, packed = pack(images_at(archive, size=64), "train", tmp_path / "cache")
    meta = read_signed(tmp_path / "cache" / key / "meta.json")
    assert (meta["crop"], meta["filter"]) == ("centre square", "lanczos")
    assert meta["shape"] == [8, 64, 64, 3] == list(packed.images.shape) and meta["selection"] is None
    for change in ({"filter": "bicubic"}, {"crop": "left"}):
        monkeypatch.setattr(sources, "RESIZE", {**sources.RESIZE, **change})
        assert pack(images_at(archive, size=64), "train", tmp_path / "cache")[0] != key


def test_packing_tells_how_far_it_is_and_ends_at_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    archive = write_zip(tmp_path / "a.zip", num_images=1234)
    pack(images_at(archive), "train", tmp_path / "cache", progress=lambda *so_far: told.append(so_far))
    assert told == [(500, 1234), (1000, 1234), (1234, 1234)]


def test_a_packed_array_is_what_numpy_would_have_written(tmp_path: Path) -> None:
    key, packed = pack(images_at(write_zip(tmp_path / "a.zip", num_images=8)), "train", tmp_path / "cache")
    np.save(tmp_path / "again.npy", packed.images)
    assert (tmp_path / "cache" / key / "images.npy").read_bytes() == (tmp_path / "again.npy").read_bytes()
    assert packed.digest == images_digest(packed.images)


class Downloaded:
    """What torchvision gives for CIFAR-10, with few images."""

    url, filename = "https://somewhere", "cifar-10-python.tar.gz"

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert Path(root).is_dir() and download
        self.data = np.random.default_rng(train).integers(0, 256, (5 if train else 3, 32, 32, 3), np.uint8)
        self.targets = [9, 0, 3, 3, 1][: len(self.data)]


def test_cifar10_is_packed_as_downloaded_and_resized_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloaded)
    monkeypatch.setattr(sources, "NUM_IMAGES", {("cifar10", "train"): 5, ("cifar10", "test"): 3})
    for split, train in (("train", True), ("test", False)):
        there = Downloaded(str(tmp_path), train, True)
        _, packed = pack(Data(name="cifar10"), split, tmp_path)
        assert np.array_equal(packed.images, there.data) and packed.labels.tolist() == there.targets
    _, double = pack(Data(name="cifar10", image_size=64), "test", tmp_path)
    for image, original in zip(double.images, there.data, strict=True):
        resized = Image.fromarray(original).resize((64, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(image, np.asarray(resized))


@pytest.mark.parametrize("error", [RuntimeError("no route to host"), http.client.BadStatusLine("SSH-2.0")])
def test_a_cifar10_that_cannot_be_downloaded_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Downloaded, "__init__", fail)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloaded)
    with pytest.raises(EnvironmentLacks, match=rf"{error}.* put cifar-10-python\.tar\.gz into .*data\.path="):
        pack(Data(name="cifar10"), "train", tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["cifar10"]


# ---------------------------------------------------------------- classes


FLAT = {f"{i}.png": png(i) for i in range(3)}
CLASSES = {
    "fewer in the data": (MEMBERS, 3, r"has 2 classes \(cat, dog\); use 2, or 0"),
    "more in the data": ({f"{k}/0.png": png() for k in "abc"}, 2, r"has 3 classes \(a, b, c\); use 3, or 0"),
    "no class folders": (FLAT, 10, "has no classes, or one: .* or use 0"),
    "only splits": ({f"{s}/{k}": v for s in ("train", "test") for k, v in FLAT.items()}, 2, "has no classes, or one"),
    "one class folder": ({f"faces/{k}": v for k, v in FLAT.items()}, 2, "has no classes, or one"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_that_the_data_does_not_have_are_refused(tmp_path: Path, case: str) -> None:
    members, num_classes, wanted = CLASSES[case]
    there = {"data__name": "images", "data__path": str(as_zip(tmp_path / "a.zip", members))}
    with pytest.raises(RequestError, match=rf"^model\.num_classes = {num_classes}: the .*{wanted}"):
        prepare.check_data(make_config(**there, model__num_classes=num_classes), [])
    prepare.check_data(make_config(**there), [])


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_classes_of_the_known_sets_are_ten(name: str) -> None:
    prepare.check_data(make_config(data__name=name, model__num_classes=10), [])
    with pytest.raises(RequestError, match=r"has 10 classes \([a0]\S*, .*\); use 10, or 0"):
        prepare.check_data(make_config(data__name=name, model__num_classes=20), [])


def test_an_empty_folder_is_where_cifar10_may_be_downloaded_to(tmp_path: Path) -> None:
    source = open_source(Data(name="cifar10", path=str(tmp_path)))
    assert (source.kind, source.path) == ("cifar10", tmp_path)


# ---------------------------------------------------------------- broken ones


def test_a_path_that_cannot_serve_is_a_request_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere: does not exist; give a folder or a \.zip"):
        open_source(images_at(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"no images in this folder; expected CLASS/NAME\.png"):
        open_source(images_at(tmp_path / "empty"))
    with pytest.raises(RequestError, match="no images in this zip"):
        open_source(images_at(as_zip(tmp_path / "words.zip", {"a.txt": b"hello"})))
    (tmp_path / "set.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(RequestError, match=r"set\.h5: neither a folder, nor a \.zip, .*numpy\.savez"):
        open_source(images_at(tmp_path / "set.h5"))
    as_zip(tmp_path / "whole.zip", {"a/1.png": b"x"}).rename(tmp_path / "whole.part")
    assert open_source(images_at(tmp_path / "whole.part")).kind == "zip"
    broken = write_zip(tmp_path / "whole.zip", num_images=8)
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(RequestError, match=r"whole\.zip: not a readable zip .*copy it again"):
        open_source(images_at(broken))


def flip_bit(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize("kind", ["no image", "cut short", "empty", "damaged stored", "damaged deflated"])
def test_a_damaged_image_is_named_and_nothing_is_packed(tmp_path: Path, kind: str) -> None:
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(noise, format="BMP")
    whole = noise.getvalue()
    bad = {"no image": b"text", "cut short": whole[:1000], "empty": b""}.get(kind, whole)
    how = zipfile.ZIP_DEFLATED if kind == "damaged deflated" else zipfile.ZIP_STORED
    archive = as_zip(tmp_path / "a.zip", {"a/good.png": png(), "a/hurt.bmp": bad}, how)
    if kind.startswith("damaged"):
        raw = archive.read_bytes()
        begin = raw.index(b"a/hurt.bmp") + len(b"a/hurt.bmp")
        archive.write_bytes(raw[:begin] + bytes(200) + raw[begin + 200 :])
    with pytest.raises(RequestError, match=r"a\.zip: a/hurt\.bmp cannot be decoded .*replace or remove it"):
        pack(images_at(archive), "train", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_any_single_bit_of_an_archive_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A flipped bit never becomes other pixels in silence: it is a RequestError, or the pixels are the same."""
    members = {f"a/{i}.png": png(i) for i in range(2)}
    raw = as_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED).read_bytes()
    _, good = pack(images_at(tmp_path / "a.zip"), "train", tmp_path / "cache")
    refused = 0
    for at in range(0, len(raw), 3):
        path = tmp_path / "hurt.zip"
        path.write_bytes(flip_bit(raw, at))
        try:
            images = [image for image, _ in sources.read(open_source(images_at(path)), "train", 8, tmp_path)]
        except RequestError:
            refused += 1
        else:
            assert len(images) < 2 or (np.stack(images) == good.images).all(), at  # a name may have lost its suffix
    assert refused > 20


# ---------------------------------------------------------------- the cache


def test_a_second_pack_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, cache = write_zip(tmp_path / "a.zip", num_images=8), tmp_path / "cache"
    key, first = pack(images_at(archive), "train", cache)

    def decode(*_: Any) -> Any:
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources, "read", decode)
    again, second = pack(images_at(archive), "train", cache)
    assert again == key and second.digest == first.digest and (second.images == first.images).all()
    with pytest.raises(AssertionError, match="decoded again"):
        pack(images_at(archive, size=4), "train", cache)  # another size is another dataset


def test_changed_images_are_packed_anew(tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "f", MEMBERS)
    key, _ = pack(images_at(folder), "train", tmp_path / "cache")
    (folder / "train/cat/0.png").write_bytes(png(200) + b"more")
    other, packed = pack(images_at(folder), "train", tmp_path / "cache")
    assert other != key and packed.images[0, 0, 0, 0] == 200


def test_a_folder_whose_files_look_like_anothers_is_not_taken_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, keys = tmp_path / "cache", []
    for place, shade in (("one", 10), ("other", 90)):
        for i in range(3):
            path = tmp_path / place / "a" / f"{i}.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"P6 8 8 255\n" + bytes([shade + i]) * 192)
            os.utime(path, (1e9, 1e9))
    for _ in range(2):
        for place, shade in (("one", 10), ("other", 90)):
            key, packed = pack(images_at(tmp_path / place), "train", cache)
            assert packed.images[:, 0, 0, 0].tolist() == [shade, shade + 1, shade + 2]
            keys.append(key)
    assert keys[:2] == keys[2:] and keys[0] != keys[1] and len(list(cache.iterdir())) == 2
    assert "is of another folder with files of these names, sizes and times" in capsys.readouterr().out


def test_a_packing_that_is_stopped_or_fails_leaves_nothing_that_looks_packed(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", num_images=600)
    with pytest.raises(Stopped, match="preempted"):
        pack(images_at(archive), "train", tmp_path / "cache", stop_requested=lambda: "preempted")
    assert list((tmp_path / "cache").iterdir()) == []


def _pack(path: Path, cache: Path, digests: Any) -> None:
    digests.put(pack(images_at(path), "train", cache)[1].digest)


def test_packers_at_the_same_time_agree_and_leave_one_copy(tmp_path: Path) -> None:
    archive, cache = write_zip(tmp_path / "a.zip", num_images=300), tmp_path / "cache"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training", "torch.utils.tensorboard", "torch._dynamo"])
    digests = context.Queue()
    packers = [context.Process(target=_pack, args=(archive, cache, digests)) for _ in range(3)]
    for p in packers:
        p.start()
    assert len({digests.get(timeout=60) for _ in packers}) == 1
    for p in packers:
        p.join(60)
        assert p.exitcode == 0
    assert len(list(cache.iterdir())) == 1


def test_a_packed_array_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    key, _ = pack(images_at(write_zip(tmp_path / "a.zip", num_images=8)), "train", tmp_path)
    path = tmp_path / key / "images.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match=r"not readable .* submit again"):
        open_packed(tmp_path, key)


def test_a_folder_to_score_is_taken_as_it_is(tmp_path: Path) -> None:
    loaded = load_folder(as_folder(tmp_path / "f", MEMBERS))
    assert len(loaded) == 7 and loaded.images.shape[1:] == (8, 8, 3)
    mixed = as_folder(tmp_path / "g", {"0.png": png(), "1.png": png(size=(9, 8))})
    with pytest.raises(RequestError, match=r"images of several sizes .*8x8, 8x9"):
        load_folder(mixed)


def test_where_as_many_as_large_as_the_first_have_no_room_a_size_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(shape: Any, *of: Any, real: Any = np.empty) -> Any:
        if shape == (2, 9, 9, 3):
            raise MemoryError
        return real(shape, *of)

    path = as_folder(tmp_path / "f", {"0.png": png(0, (9, 9)), "1.png": png(1, (8, 8))})
    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(EnvironmentLacks, match=r"f: 2 images of 9x9, as its first is, .* resize them with --size"):
        load_folder(path)
    assert load_folder(path, 8).images.shape == (2, 8, 8, 3)


def test_images_to_score_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # else some are decoded ahead
    path = as_folder(tmp_path / "f", {f"{i}.png": png(i, (32, 32)) for i in range(200)})
    tracemalloc.start()
    loaded = load_folder(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded.images.nbytes < peak < 1.5 * loaded.images.nbytes


# ---------------------------------------------------------------- batches


def batches(num: int = 10, *, global_batch: int = 4, attempt: int = 0, seed: int = 3, flip: bool = True) -> Batches:
    return Batches(make_images(num), seed=seed, attempt=attempt, global_batch=global_batch, flip=flip)


@pytest.mark.parametrize(("num", "global_batch"), [(10, 4), (10, 10), (7, 16), (5, 1)])
def test_each_epoch_shows_every_image_once_across_batch_borders(num: int, global_batch: int) -> None:
    b = batches(num, global_batch=global_batch)
    steps = -(-4 * num // global_batch)
    stream = np.concatenate([b.sample_ids(k, 0, global_batch) for k in range(steps)])
    epochs = [stream[e * num : (e + 1) * num].tolist() for e in range(4)]
    assert all(sorted(e) == list(range(num)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1, "every epoch in the same order"


def test_the_batch_of_a_step_does_not_hang_on_which_were_asked_for_before() -> None:
    fresh = [batches().sample_ids(k, 0, 4).tolist() for k in range(12)]
    one = batches()
    assert [one.sample_ids(k, 0, 4).tolist() for k in range(12)] == fresh
    assert [one.sample_ids(k, 0, 4).tolist() for k in reversed(range(12))] == fresh[::-1]
    parts = [[*one.sample_ids(k, 0, 1), *one.sample_ids(k, 1, 3)] for k in range(12)]
    assert parts == fresh


def test_seed_and_attempt_change_the_order() -> None:
    orders = [batches(100, seed=s, attempt=a).sample_ids(0, 0, 4).tolist() for s, a in ((3, 0), (4, 0), (3, 1))]
    assert len({tuple(o) for o in orders}) == 3


def test_a_device_has_one_store_whether_its_number_is_given_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second copy would cost a GPU's memory twice, and might be none where the first one fits."""
    asked: list[torch.device] = []
    monkeypatch.setattr("ddpm.data.batches.store", lambda packed, on: (asked.append(on), Mapped(packed))[1])
    b, named = batches(), torch.device("cpu", 0)
    assert torch.empty(0, device=named).device != named  # as it is with cuda, whose tensors are on cuda:0
    b.rows(0, 0, 4, named)
    b.images(b.parts(0, 0, 4, named), 0, torch.arange(4, device=named))  # as a step has them
    assert asked == [CPU]


def test_rows_are_the_images_in_minus_one_to_one_flipped_or_not() -> None:
    b, plain = batches(global_batch=64), batches(global_batch=64, flip=False)
    ids = b.sample_ids(2, 0, 64)
    x_0, labels = b.rows(2, 0, 64, CPU)
    unflipped, _ = plain.rows(2, 0, 64, CPU)
    expected = torch.from_numpy(b.packed.images[ids]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(unflipped, expected, rtol=0, atol=1e-6)  # one rounding of a product
    flipped = [bool((x == u.flip(2)).all()) and not bool((x == u).all()) for x, u in zip(x_0, unflipped, strict=True)]
    for x, u, f in zip(x_0, unflipped, flipped, strict=True):
        assert torch.equal(x, u.flip(2) if f else u)
    assert 12 < sum(flipped) < 52  # 64 fair coins: six standard deviations
    assert torch.equal(b.rows(2, 0, 64, CPU)[0], x_0), "the coin of a place is thrown once"
    assert labels.tolist() == b.packed.labels[ids].tolist()
    assert x_0.dtype == torch.float32 and x_0.is_contiguous()


def test_a_dataset_on_the_device_gives_the_batches_of_one_on_the_host() -> None:
    images, ids = make_images(20), np.array([3, 19, 3, 0])
    taken = [how.take(how.parts(ids)) for how in (Resident(images, CPU), Mapped(images))]
    assert all(torch.equal(a, b) for a, b in zip(*taken, strict=True))
    assert taken[0][0].numpy().tobytes() == images.images[ids].tobytes() and taken[0][1].tolist() == [1, 1, 1, 0]


def test_a_dataset_comes_to_the_device_in_pieces_since_each_rank_of_a_node_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ddpm.data.batches.PIECE_IMAGES", 64)
    images, ids = make_images(2000), np.arange(2000)
    tracemalloc.start()
    there = Resident(images, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(there.take(there.parts(ids))[0].numpy(), images.images)
    assert peak < images.images.nbytes / 4


def test_the_digest_of_images_covers_shape_and_every_byte() -> None:
    images = make_images().images
    other = images.copy()
    other[9, 7, 7, 2] ^= 1
    digests = [images_digest(i) for i in (images, other, images.reshape(10, 4, 16, 3), images[:9])]
    assert len(set(digests)) == 4
    assert PackedImages(images, np.zeros(10, np.int64), "n", "train", digests[0]).digest == make_images().digest


def test_after_a_rollback_a_dataset_lies_on_a_gpu_again_in_memory_that_torch_has_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: Any = SimpleNamespace(images=np.zeros((100, 8, 8, 3), np.uint8))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 10, 1 << 21))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 20)
    monkeypatch.setattr("ddpm.data.batches.Resident", lambda *_: "there")
    for used, where in ((0, "there"), (1 << 20, Mapped)):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, used=used: used)
        found: Any = store(packed, torch.device("cuda"))
        assert found == where or type(found) is where
