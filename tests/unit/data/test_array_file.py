"""Images in .npz and .npy: as data, as images to score, as a reference."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.config.data import Data
from ddpm.data import sources
from ddpm.data.array_file import open_array
from ddpm.data.packed import PackedImages, load_folder, open_source, pack
from ddpm.errors import RequestError
from ddpm.scoring import foreign
from ddpm.scoring.extractors import build_extractor
from ddpm.scoring.statistics_file import read_statistics

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([7, 3, 3, 7, 9, 3, 7, 7, 9, 9, 3, 7])


def packed(path: Path, size: int = 8) -> PackedImages:
    return pack(Data(name="images", path=str(path), image_size=size), "train", path.parent / "cache")[1]


def saved(path: Path, **arrays: Any) -> Path:
    (np.savez_compressed if "compressed" in path.name else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("key", ["images", "arr_0", "samples"])
@pytest.mark.parametrize("name", ["a.npz", "compressed.npz"])
def test_an_npz_is_packed_as_it_is(tmp_path, key, name):
    there = packed(saved(tmp_path / name, **{key: IMAGES}))
    assert np.array_equal(there.images, IMAGES) and there.labels.tolist() == [0] * 12 and there.classes == [""]


def test_an_npy_is_packed_as_it_is_and_read_anew_where_it_changes(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    assert np.array_equal(packed(tmp_path / "a.npy").images, IMAGES)
    np.save(tmp_path / "a.npy", IMAGES[::-1].copy())
    assert np.array_equal(packed(tmp_path / "a.npy").images, IMAGES[::-1])


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
@pytest.mark.parametrize(
    ("images", "labels"),
    [
        *(("images", "labels"), ("arr_0", "arr_1"), ("samples", "label")),
        *(("a", "a-labels"), ("a", "a_labels"), ("images", "labels.npy"), ("train_images", "train_labels")),
    ],
)
def test_labels_in_it_or_beside_it_are_its_classes(tmp_path, images, labels, shape):
    given = LABELS.reshape(shape).astype(np.int32)
    if images in ("arr_0", "samples") or labels == "labels":
        path = saved(tmp_path / "a.npz", **{images: IMAGES, labels: given})
    else:
        path = tmp_path / f"{images}.npy"
        np.save(path, IMAGES)
        np.save(tmp_path / f"{labels.removesuffix('.npy')}.npy", given)
    there = packed(path)
    assert there.classes == ["3", "7", "9"] and [there.classes[i] for i in there.labels] == list(map(str, LABELS))
    assert packed(path).digest == there.digest


def test_grey_becomes_rgb_and_other_sizes_are_cut_as_pictures_are(tmp_path, capsys):
    np.save(tmp_path / "grey.npy", IMAGES[..., :1])
    assert np.array_equal(packed(tmp_path / "grey.npy").images, IMAGES[..., :1].repeat(3, axis=3))
    np.save(tmp_path / "wide.npy", IMAGES[:, 1:7])
    assert packed(tmp_path / "wide.npy").images.shape == (12, 8, 8, 3)
    assert "of 12 pictures: 12 cropped to their middle, 12 enlarged" in capsys.readouterr().out


def torn(path: Path) -> Path:
    np.save(path, IMAGES)
    path.write_bytes(path.read_bytes()[:-5])
    return path


def lying(path: Path) -> Path:
    """An .npz whose header tells of a thousand times its images."""
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(raw, {"descr": "|u1", "fortran_order": False, "shape": (12000, 8, 8, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", raw.getvalue() + IMAGES.tobytes())
    return path


def flipped(path: Path, at: int, **arrays: Any) -> Path:
    raw = bytearray(saved(path, **arrays).read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    return path


MANY = np.zeros((20_000, 1, 1, 3), np.uint8)
"""So many that their labels are more than is read of each array for its header."""


WRONG = {
    "channels first": (lambda p: saved(p, images=IMAGES.transpose(0, 3, 1, 2)), r"\(12, 3, 8, 8\); .*, channels last"),
    "floats": (
        lambda p: saved(p, images=IMAGES / 255),
        r"its images are float64 \(12, 8, 8, 3\); save them as uint8, 0 to 255",
    ),
    "objects": (lambda p: saved(p, images=np.array([{}])), "its images are object"),
    "Fortran's order": (lambda p: saved(p, images=np.asfortranarray(IMAGES)), "in C's order"),
    "none": (lambda p: saved(p, images=IMAGES[:0]), r"holds no images: they are uint8 \(0, 8, 8, 3\)"),
    "statistics": (lambda p: saved(p, mu=np.zeros(3), sigma=np.eye(3)), "holds mu, sigma; images must be under images"),
    "labels of others": (
        lambda p: saved(p, images=IMAGES, labels=LABELS[:5]),
        r"labels is int64 \(5,\); expected a wh",
    ),
    "one-hot": (lambda p: saved(p, images=IMAGES, labels=np.eye(12)), r"labels is float64 \(12, 12\); expected"),
    "labels of objects": (
        lambda p: saved(p, images=IMAGES, labels=np.array([{}] * 12)),
        r"labels is object \(12,\); expected a whole number",
    ),
    "no zip": (lambda p: p.write_bytes(b"no zip") and p, "cannot be read: File is not a zip file; copy it again"),
    "torn": (lambda p: torn(p.with_suffix(".npy")), r"takes 2,304 bytes, and it holds 2,299; copy it"),
    "lying": (lying, r"takes 2,304,000 bytes, and it holds 2,304; copy it"),
    "a flipped bit": (lambda p: flipped(p, 1500, images=IMAGES), "Bad CRC-32 .*copy it again"),
    "one of its labels": (
        lambda p: flipped(p, -1000, images=MANY, labels=np.arange(20_000)),
        "Bad CRC-32 for file 'labels.npy'; copy it again",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_holds_no_images_is_refused_in_words(tmp_path, case):
    make, told = WRONG[case]
    path = make(tmp_path / "a.npz")
    with pytest.raises(RequestError, match=told):
        packed(path)
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_second_array_that_is_no_labels_is_not_read(tmp_path):
    path = flipped(tmp_path / "a.npz", -1000, arr_0=IMAGES, arr_1=np.zeros(20_000))
    assert open_array(path).labels is None


def test_an_array_is_scored_as_its_pictures_are(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    saved(tmp_path / "b.npz", samples=IMAGES[::-1], labels=LABELS)
    extractor = build_extractor("pixels", "cpu")
    for reference in (tmp_path / "b.npz", tmp_path / "a.npy"):
        score = foreign.evaluate_images(load_folder(tmp_path / "a.npy"), reference, extractor)
        assert score["frechet_distance"] == pytest.approx(0, abs=1e-6) and score["reference"]["num_images"] == 12
    assert foreign.load_images(tmp_path / "b.npz", 4).images.shape == (12, 4, 4, 3)
    assert np.array_equal(foreign.load_images(tmp_path / "b.npz").images, IMAGES[::-1])
    batch = read_statistics(tmp_path / "b.npz").images
    assert batch is not None and np.array_equal(batch.images, IMAGES[::-1])


def test_images_are_read_one_at_a_time_however_many_there_are(tmp_path, monkeypatch):
    path = saved(tmp_path / "compressed.npz", images=IMAGES)
    monkeypatch.setattr("ddpm.run.files.ARRAYS_BYTES", 100)  # as of what is read whole
    items = sources.read(open_source(Data(name="images", path=str(path), image_size=8)), "train", 8, tmp_path)
    image, label = next(items)
    assert np.array_equal(image, IMAGES[0]) and label == 0
