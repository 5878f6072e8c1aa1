"""ddpm/data/sources.py: which folder is an image's class, and what becomes of it."""

from pathlib import Path

import numpy as np
import pytest

from ddpm.config.data import Data
from ddpm.data import sources
from ddpm.data.packed import PackedImages, open_source, pack
from tests.cli.harness import png, write_zip
from tools import unpack_data

NESTED = [f"{kind}/{season}/{i}.png" for kind in ("cat", "dog") for season in ("spring", "winter") for i in range(2)]
TINY_IMAGENET = [
    *(f"tiny-imagenet/train/{name}/images/{name}_{i}.JPEG" for name in ("n01", "n02", "n03") for i in range(2)),
    "tiny-imagenet/val/images/val_0.JPEG",
    "tiny-imagenet/test/images/test_0.JPEG",
]


def source_of(path: Path, names: list[str]) -> sources.Source:
    return sources.folder_or_zip(write_zip(path / "a.zip", {name: png() for name in names}))


@pytest.mark.parametrize("wrapper", ["", "pets/", "train/", "pets/train/"])
def test_folders_in_a_class_are_of_that_class(tmp_path: Path, wrapper: str) -> None:
    source = source_of(tmp_path, [wrapper + name for name in NESTED])
    assert source.classes == ["cat", "dog"]
    assert source.labels == {wrapper + name: int(name.startswith("dog")) for name in NESTED}


def test_tiny_imagenet_has_the_classes_of_its_training_images(tmp_path: Path) -> None:
    source = source_of(tmp_path, TINY_IMAGENET)
    assert source.classes == ["n01", "n02", "n03"]
    assert [source.labels[name] for name in TINY_IMAGENET] == [0, 0, 1, 1, 2, 2, -1, -1]


def test_nested_classes_are_packed_apart_from_what_was_packed_by_the_innermost_folder(tmp_path: Path) -> None:
    assert source_of(tmp_path, NESTED).selection is not None
    plain = source_of(tmp_path, ["cat/0.png", "dog/0.png", "test/cat/1.png"])
    assert plain.selection is None and plain.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("names", "there"),
    [
        (NESTED, {f"{'cat' if i < 4 else 'dog'}/{i:06d}.png" for i in range(8)}),
        (["0.png", "1.png"], {"000000.png", "000001.png"}),
        (["0.png", "cat/1.png"], {"000000.png", "cat/000001.png"}),
    ],
)
def test_images_are_unpacked_by_the_class_that_they_are_trained_with(
    tmp_path: Path, names: list[str], there: set[str]
) -> None:
    archive = write_zip(tmp_path / "a.zip", {name: png() for name in names})
    chosen = Data(name="images", path=str(archive), image_size=8)
    _, packed = pack(chosen, "train", tmp_path / "cache")
    unpack_data.unpack(packed, tmp_path / "out", list(range(len(packed))), open_source(chosen).classes)
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")} == there


def test_an_image_whose_folder_is_no_class_is_unpacked_without_one(tmp_path: Path) -> None:
    images = PackedImages(np.zeros((2, 8, 8, 3), np.uint8), np.array([1, -1]), "x", "test", "")
    unpack_data.unpack(images, tmp_path / "out", [0, 1], ["cat", "dog"])
    assert (tmp_path / "out" / "dog" / "000000.png").exists() and (tmp_path / "out" / "000001.png").exists()
