"""ddpm/data/sources.py: which folder is an image's class, and what becomes of it."""

import errno
import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddpm.config.data import Data
from ddpm.data import listing, sources
from ddpm.data.listing import folder_names
from ddpm.data.packed import PackedImages, open_source, pack
from ddpm.errors import RequestError
from tests.cli.harness import png, write_zip
from tools import unpack_data

NESTED = [f"{kind}/{season}/{i}.png" for kind in ("cat", "dog") for season in ("spring", "winter") for i in range(2)]
TINY_IMAGENET = [
    *(f"tiny-imagenet/train/{name}/images/{name}_{i}.JPEG" for name in ("n01", "n02", "n03") for i in range(2)),
    "tiny-imagenet/val/images/val_0.JPEG",
    "tiny-imagenet/test/images/test_0.JPEG",
]


def source_of(path: Path, names: list[str]) -> sources.Source:
    return sources.images(write_zip(path / "a.zip", {name: png() for name in names}))


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


def test_a_source_of_a_new_kind_is_known_by_the_content_of_its_file(tmp_path: Path) -> None:
    found = []
    for content in (b"one", b"two"):
        (tmp_path / "a.h5").write_bytes(content)
        found.append(sources.Source("mine", tmp_path / "a.h5", {"train": ["0"]}, [""]).fingerprint())
    assert found[0] != found[1]
    assert sources.Source("cifar10", tmp_path, {"train": []}, [""]).fingerprint() == "cifar10"  # as of old


def test_an_archive_that_was_written_anew_meanwhile_is_told_as_what_it_lacks(tmp_path: Path) -> None:
    source = source_of(tmp_path, ["a/0.png", "a/1.png"])
    source_of(tmp_path, ["a/1.png"])
    with pytest.raises(RequestError, match=r"a/0\.png cannot be decoded \(.*no item named"):
        list(sources.read(source, "train", 8, tmp_path))


# ---------------------------------------------------------------- files that are larger than any image


class Peak:
    """How much memory a block took, as Python allocates it."""

    def __enter__(self) -> "Peak":
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def bomb(path: Path, *, how: int = zipfile.ZIP_DEFLATED, size: int = 40 << 20, said: int | None = None) -> Path:
    """A zip of an image, and of a `size` of zeros that says to be `said` bytes."""
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("a/1.png", png())
        archive.writestr("a/2.png", bytes(size))
    if said is not None:
        raw = path.read_bytes()
        path.write_bytes(raw.replace(struct.pack("<L", size), struct.pack("<L", said)))
    return path


def test_a_member_that_unpacks_to_more_than_an_image_is_refused_by_its_name_when_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_IMAGE_BYTES", 4 << 20)
    path = bomb(tmp_path / "a.zip")
    with (
        Peak() as peak,
        pytest.raises(RequestError, match=r"a/2\.png would unpack to 41,943,040 bytes.* 4,194"),
    ):
        open_source(Data(name="images", path=str(path), image_size=8))
    assert peak.bytes < 4 << 20


@pytest.mark.parametrize("said", [40 << 20, 1000])
def test_a_member_is_unpacked_in_pieces_whatever_it_says_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: int
) -> None:
    path = bomb(tmp_path / "a.zip", said=said)
    there = open_source(Data(name="images", path=str(path), image_size=8))
    monkeypatch.setattr(listing, "MAX_IMAGE_BYTES", 4 << 20)
    with Peak() as peak, pytest.raises(RequestError, match=r"a/2\.png cannot be decoded"):
        list(sources.read(there, "train", 8, tmp_path))
    assert peak.bytes < 16 << 20


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_cannot_be_unpacked_in_pieces_is_refused_when_it_is_listed(tmp_path: Path, how: int) -> None:
    path = bomb(tmp_path / "a.zip", how=how, said=1000)
    with pytest.raises(RequestError, match=r"a/1\.png is not compressed by the usual method .* zip the images again"):
        open_source(Data(name="images", path=str(path), image_size=8))


def test_a_file_that_is_larger_than_an_image_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "1.png").open("wb") as f:
        f.truncate(10 << 30)  # sparse
    monkeypatch.setattr(listing, "MAX_IMAGE_BYTES", 4 << 20)
    there = open_source(Data(name="images", path=str(tmp_path), image_size=8))
    with Peak() as peak, pytest.raises(RequestError, match=r"a/1\.png cannot be decoded \(more than 4,194,304 bytes"):
        list(sources.read(there, "train", 8, tmp_path))
    assert peak.bytes < 16 << 20


def write_folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png())
    return path


def test_class_folders_that_are_links_are_followed_and_links_back_are_not(tmp_path: Path) -> None:
    store = write_folder(tmp_path / "store", "dog/0.png", "dog/1.png")
    pets = write_folder(tmp_path / "pets", "cat/0.png", "emu/0.png")
    (pets / "dog").symlink_to(store / "dog")
    (pets / "cat" / "all").symlink_to(pets)
    (pets / "cat" / "self").symlink_to(pets / "cat")
    source = sources.images(pets)
    assert source.members == {"train": ["cat/0.png", "dog/0.png", "dog/1.png", "emu/0.png"]}
    assert [source.labels[name] for name in source.members["train"]] == [0, 1, 1, 2]


def test_a_link_to_nowhere_is_named_and_no_image_less(tmp_path: Path) -> None:
    pets = write_folder(tmp_path / "pets", "cat/0.png", "dog/0.png")
    (pets / "dog" / "1.png").symlink_to(tmp_path / "gone.png")
    (pets / "dog" / "2.png").symlink_to("2.png")
    (pets / "dog" / "3.png").symlink_to(pets / "cat" / "0.png" / "beyond")
    os.mkfifo(tmp_path / "fifo")
    (pets / "dog" / "4.png").symlink_to(tmp_path / "fifo")
    with pytest.raises(RequestError, match=r"\b4 of 6 images cannot be decoded") as refused:
        pack(Data(name="images", path=str(pets), image_size=8), "train", tmp_path / "cache")
    for number, why in enumerate(("No such file", "Too many levels", "Not a directory", "4.png: a FIFO"), start=1):
        assert f"dog/{number}.png ({why}" in str(refused.value)


def test_a_folder_that_cannot_be_looked_into_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may look into any: what the operating system says is put there."""
    pets = write_folder(tmp_path / "pets", "cat/0.png", "dog/0.png")
    scandir = os.scandir

    def scan(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(RequestError, match=r"pets/dog: Permission denied; make it readable"):
        sources.images(pets)


# ---------------------------------------------------------------- names that mean something else than they seem to


def test_a_name_that_is_twice_in_a_zip_is_refused_with_how_often(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name in ("cat/a.png", "cat/b.png", "cat/a.png", "cat/a.png", "notes.txt", "notes.txt"):
            archive.writestr(name, png())
    with pytest.raises(RequestError, match=r"more than once: cat/a\.png \(3 times\); make the zip anew"):
        sources.images(tmp_path / "a.zip")


@pytest.mark.parametrize("wrapper", ["", "pets/"])
@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "Val"), ("training", "validation")])
def test_splits_are_splits_however_they_are_written(tmp_path: Path, wrapper: str, train: str, test: str) -> None:
    names = [f"{wrapper}{split}/{kind}/0.png" for split in (train, test) for kind in ("cat", "dog")]
    source = source_of(tmp_path, names)
    assert source.classes == ["cat", "dog"] and source.members == {"train": names[:2], "test": names[2:]}
    assert source.selection is not None  # what was packed of the same files once is something else
    assert source_of(tmp_path, ["train/cat/0.png", "test/cat/0.png"]).selection is None


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train/cat/0.png", "test/cat/0.png", "preview.png"], r"no folder \(1\), test/ \(1\), train/ \(1\)"),
        (["ds/train/0.png", "ds/test/0.png", "ds/preview.png"], r"ds/ \(1\), ds/test/ \(1\), ds/train/ \(1\)"),
        (["ds/train/0.png", "ds/test/0.png", "preview.png"], r"ds/test/ \(1\), ds/train/ \(1\), no folder \(1\)"),
        (["ds/train/cat/0.png", "ds/train/dog/0.png", "preview.png"], r"ds/train/ \(2\), no folder \(1\)"),
        (["ds/cat/0.png", "ds/train/cat/0.png", "ds/test/cat/0.png"], r"cat/ \(1\), test/ \(1\), train/ \(1\)"),
        (["cat/train/0.png", "cat/test/0.png", "dog/0.png"], r"cat/test/ \(1\), cat/train/ \(1\), dog/ \(1\)"),
        (["boat/0.png", "train/0.png"], r"boat/ \(1\), train/ \(1\)"),
        (["cat/0.png", "cat/test/0.png"], r"cat/ \(1\), cat/test/ \(1\)"),
        (["training_set/cat/0.png", "test_set/cat/0.png"], r"test_set/ \(1\), training_set/ \(1\)"),
        (["ds/trainset/0.png", "ds/valset/0.png"], r"trainset/ \(1\), valset/ \(1\)"),
        (["ds/cifar10-test/0.png", "ds/cifar10-train/0.png", "0.png"], r"no folder \(1\), ds/ \(2\)"),
    ],
)
def test_splits_beside_other_images_are_refused_with_what_was_understood(
    tmp_path: Path, names: list[str], told: str
) -> None:
    with pytest.raises(RequestError, match=rf"cannot be told; they lie in {told}; put all into"):
        source_of(tmp_path, names)


def test_classes_that_hold_a_splits_word_are_classes(tmp_path: Path) -> None:
    names = [f"{name}/0.png" for name in ("contest", "freight train", "test tube", "valley")]
    assert source_of(tmp_path, names).classes == ["contest", "freight train", "test tube", "valley"]


def test_pictures_that_are_not_taken_are_counted_and_a_jfif_is_a_jpeg(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["cat/0.png", "cat/1.jfif", "dog/0.gif", "dog/1.GIF", "dog/2.avif", "dog/.3.jp2", "notes.txt"]
    archive = write_zip(tmp_path / "a.zip", {name: png() for name in names})
    source = sources.images(archive)
    assert source.members == {"train": names[:2]} and source.selection == {"suffixes": [".jfif"]}
    pack(Data(name="images", path=str(archive), image_size=8), "train", tmp_path / "cache")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "2 .gif, 1 .avif" in line
    with pytest.raises(RequestError, match=r"no images in this zip; .*other kinds are there \(1 \.gif\): save them as"):
        sources.images(write_zip(tmp_path / "b.zip", {"cat/0.gif": png()}))


# ---------------------------------------------------------------- folders and zips as people and their tools make them


def made(path: Path, files: dict[str, bytes], *, zipped: bool) -> Path:
    """Those files in a folder, or in a zip."""
    if zipped:
        return write_zip(path.with_suffix(".zip"), files)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def chosen(path: Path) -> Data:
    return Data(name="images", path=str(path), image_size=8)


STRAY = {
    "pets/README.txt": b"text",
    "pets/Thumbs.db": b"db",
    "pets/cat/Thumbs.db": b"db",
    "pets/.DS_Store": b"mac",
    "pets/cat/._0.png": b"mac",
    "__MACOSX/pets/cat/._0.png": b"mac",
    "__MACOSX/pets/cat/0.png": b"mac",
    "pets/dog/desktop.ini": b"ini",
}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_wrapping_folder_and_stray_files_change_nothing(tmp_path: Path, zipped: bool) -> None:
    images = {f"{kind}/{i}.png": png(8, i) for kind in ("cat", "dog") for i in range(2)}
    plain = made(tmp_path / "plain", images, zipped=zipped)
    wrapped = made(tmp_path / "wrapped", {**{f"pets/{n}": d for n, d in images.items()}, **STRAY}, zipped=zipped)
    one, other = (pack(chosen(path), "train", tmp_path / "cache")[1] for path in (plain, wrapped))
    assert one.digest == other.digest and one.classes == other.classes == ["cat", "dog"]
    assert one.labels.tolist() == other.labels.tolist() == [0, 0, 1, 1]


def test_a_zip_with_backslashes_has_the_folders_that_they_tell(tmp_path: Path) -> None:
    names = [
        f"pets\\{split}\\{kind}\\{i}.png" for split in ("Train", "Test") for kind in ("cat", "dog") for i in range(2)
    ]
    path = write_zip(tmp_path / "a.zip", {name: png(8, i) for i, name in enumerate(names)})
    source = open_source(chosen(path))
    assert source.classes == ["cat", "dog"] and source.selection["separator"] == "\\"
    assert source.members == {"train": names[:4], "test": names[4:]}
    assert pack(chosen(path), "train", tmp_path / "cache")[1].labels.tolist() == [0, 0, 1, 1]
    mixed = write_zip(tmp_path / "b.zip", {"cat/0.png": png(), "cat\\0.png": png()})
    with pytest.raises(RequestError, match=r"more than once: cat/0\.png \(2 times\)"):
        open_source(chosen(mixed))


def test_names_that_a_zip_has_in_utf_8_without_saying_so_are_read_as_meant(tmp_path: Path) -> None:
    names = ["Größe-groß/0.png", "Größe-groß/1.png", "tea/0.png", "tea/1.png"]
    # as macOS writes them: no flag, which Python sets for all that is not ASCII
    ascii_ = [name.encode().decode("ascii", "replace").replace("\ufffd", "?") for name in names]
    path = write_zip(tmp_path / "a.zip", {name: png(8, i) for i, name in enumerate(ascii_)})
    raw = path.read_bytes()
    for placeholder, name in zip(ascii_, names, strict=True):
        raw = raw.replace(placeholder.encode(), name.encode())
    path.write_bytes(raw)
    there = pack(chosen(path), "train", tmp_path / "cache")[1]
    assert there.classes == ["Größe-groß", "tea"] and there.labels.tolist() == [0, 0, 1, 1]
    assert open_source(chosen(path)).selection == {"names": "UTF-8"}  # what was packed under other names is another


def test_names_that_are_no_utf_8_are_packed_and_told(tmp_path: Path) -> None:
    files = [b"caf\xe9/\xff0.png", b"caf\xe9/\xff1.png", b"tea/\xff0.png", b"tea/\xff1.png"]
    made(tmp_path / "a", {os.fsdecode(name): png(8, i) for i, name in enumerate(files)}, zipped=False)
    there = pack(chosen(tmp_path / "a"), "train", tmp_path / "cache")[1]
    assert there.classes == ["caf\\xe9", "tea"] and there.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "a" / os.fsdecode(files[-1])).write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"tea/\\xff1\.png cannot be decoded"):
        pack(chosen(tmp_path / "a"), "train", tmp_path / "cache")


EDM = [f"{i // 4:05d}/img{i:08d}.png" for i in range(12)]
"""As dataset_tool.py writes images, a thousand to a folder."""


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("wrapper", ["", "cifar10/"])
def test_labels_of_the_dataset_tools_are_the_classes_and_their_folders_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool, wrapper: str
) -> None:
    labels = [[name, (7, 12, 3)[i % 3]] for i, name in enumerate(EDM)]
    files = {wrapper + name: png(8, i) for i, name in enumerate(EDM)}
    made(tmp_path / "a", files, zipped=zipped)

    def packed(said: object) -> PackedImages:
        beside = {f"{wrapper}dataset.json": json.dumps(said).encode()}
        path = made(tmp_path / "a", {**files, **beside} if zipped else beside, zipped=zipped)  # images keep their times
        return pack(chosen(path), "train", tmp_path / "cache")[1]

    one = packed({"labels": labels})
    assert one.classes == ["3", "7", "12"] and one.labels.tolist() == [1, 2, 0] * 4
    changed = packed({"labels": [[name, 0] for name in EDM]})
    assert changed.classes == ["0"] and changed.digest == one.digest
    assert packed({"labels": None}).classes == [""]
    assert packed({"licence": "none"}).classes == ["00000", "00001", "00002"]  # of something else
    assert "damaged" not in capsys.readouterr().out  # each of these is packed apart


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"{", r"dataset\.json: not JSON \(.*\); copy it again, or remove it"),
        (
            b'{"labels": [["00000/img00000000.png", [0, 1]]]}',
            r"a label is \[0, 1\]; expected pairs of a name and a whole",
        ),
        (
            b'{"labels": [["00000/img00000000.png", 1]]}',
            r"11 of 12 images have no label in it, such as 00000/img00000001",
        ),
        (b'{"labels": {"a": 1}}', "expected pairs of a name and a whole number"),
    ],
)
def test_labels_that_are_not_of_the_images_are_refused(tmp_path: Path, said: bytes, told: str) -> None:
    path = made(tmp_path / "a", {**{name: png() for name in EDM}, "dataset.json": said}, zipped=True)
    with pytest.raises(RequestError, match=told):
        open_source(chosen(path))


def test_a_folder_is_listed_without_a_question_about_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "pets" / "cats"
    inside.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (inside / name).touch()
    (inside / "gone.png").symlink_to("nowhere")
    (inside / "self.png").symlink_to("self.png")
    (inside / "back").symlink_to(tmp_path / "pets")
    os.mkfifo(inside / "pipe.png")
    asked: list[str] = []
    really = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(str(path)) or really(path, **how))
    found = sorted(folder_names(tmp_path / "pets"))
    assert found == ["cats/a.png", "cats/b.png", "cats/gone.png", "cats/self.png"]
    assert not [path for path in asked if path.endswith(("a.png", "b.png"))]
