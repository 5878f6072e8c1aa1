"""Where images come from, and how each one becomes pixels: a folder, a zip, an array, CIFAR-10, scikit-learn's digits.

Opening a source only lists it: which names each split has, and the class of each. Reading it decodes one image at a
time, so that no set has to fit in memory. What is done with the pixels is packed.py's; CelebA's lists are celeba.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from ddpm.data import ahead, array_file, dataset_json, layout, library, listing
from ddpm.data.array_file import ArrayFile
from ddpm.data.decoding import Decoding, load_formats
from ddpm.data.listing import IMAGE_SUFFIXES, NOT_TAKEN, folder_names, readable, suffix, zip_names
from ddpm.data.whole import digest_once
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.files import PASSING, canonical_json, open_file, read_bytes
from ddpm.run.log import counted

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NUM_IMAGES = {
    ("cifar10", "train"): 50_000,
    ("cifar10", "test"): 10_000,
    ("celeba", "train"): 162_770,
    ("digits", "train"): 1797,
}
"""(kind, split) -> images, where none are listed: of what a library reads, and of CelebA before it is downloaded."""
RESIZE = {"crop": "centre square", "filter": "lanczos"}
"""What `to_square` does: part of every cache key, and kept in meta.json."""
PIECE_BYTES = 1 << 16
PART_IMAGES = 4
"""Number of images that a thread decodes at a time."""
SMALL_BYTES = 4096
"""Average size of files below which threads do not pay: most of the work is Python's own then."""
BACKSLASH = "\\"
HIDDEN = re.compile(r"(?:^|/)(?:\.(?!/|$)|__MACOSX)")
"""A name of which a part begins so is left out."""
PACKED = {".arrow", ".h5", ".hdf5", ".mat", ".parquet", ".pkl", ".tar", ".tfrecord"}
"""Kinds of files in which others keep images."""
AS_ARRAY = "numpy.savez('FILE.npz', images=IMAGES, labels=LABELS), uint8 (N, H, W, 3)"
SHOWN = 20
"""Number of damaged images that a message names."""
SKIP = "\n  (data.skip_damaged=true goes on without what cannot be decoded)"


@dataclass(frozen=True)
class Source:
    """Images by name, split and class. Opening it has checked that it is usable."""

    kind: str  # folder | zip | array | cifar10 | digits | celeba (not downloaded yet)
    path: Path | None
    members: dict[str, list[str]]
    """split -> names relative to `path`, sorted; none where NUM_IMAGES says how many there are."""
    classes: list[str]
    labels: dict[str, int] = field(default_factory=dict)
    """name -> index into `classes`; -1 for a class that has no training image."""
    selection: Any = None
    """Whatever else determined the images and the meaning of their labels (JSON): part of the cache key."""
    not_taken: Mapping[str, int] = field(default_factory=dict)
    """Suffix -> number of pictures of kinds that are not read."""
    array: ArrayFile | None = None
    _fingerprint: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def num_images(self, split: str) -> int:
        return len(self.members[split]) or NUM_IMAGES[self.kind, split]

    def fingerprint(self, tell: Callable[[str], None] = lambda text: None) -> Any:
        """What the cache key covers: content for files, names, sizes and times for folders; as when it was first
        asked for. tell: is told what is read."""
        if not self._fingerprint:
            self._fingerprint.append(self._taken(tell))
        return self._fingerprint[0]

    def _taken(self, tell: Callable[[str], None]) -> Any:
        if self.array is not None:
            return self.array.fingerprint(tell)
        if self.path is not None and self.path.is_file():  # a zip, or any other file
            return digest_once(self.path, tell)
        if self.kind == "folder" and self.path is not None:
            digest, begins = hashlib.sha256(), b"["  # as sha256_json of the list, which a million files make long
            for name in (name for names in self.members.values() for name in names):
                stat = _stat(f"{self.path}/{name}")
                digest.update(begins + canonical_json([readable(name), stat.st_size, stat.st_mtime_ns]))
                begins = b","
            digest.update(b"]")
            return digest.hexdigest()
        return self.kind


def _stat(path: str) -> os.stat_result:
    """stat of a link's target, or of the link itself if it leads nowhere: it is named where it is read."""
    try:
        return os.stat(path)  # noqa: PTH116 - pathlib's takes several times as long
    except OSError as e:
        if e.errno in PASSING:
            raise
        return os.lstat(path)


def digits() -> Source:
    return Source("digits", None, {"train": []}, [str(i) for i in range(10)])


def cifar10(path: Path | None) -> Source:
    """path: torchvision's root; None: beside the packed data."""
    return Source("cifar10", path, {"train": [], "test": []}, CIFAR10_CLASSES)


def images(path: Path) -> Source:
    """The images of a folder or zip, CLASS/NAME.png, optionally under train/ and test/ (folders inside a class belong
    to that class), or of an array file.

    Raises RequestError if there are none.
    """
    if path.is_dir():
        return _from_names("folder", path, {name: readable(name) for name in folder_names(path)})
    if path.suffix in array_file.SUFFIXES:
        return _of_array(path)
    if path.is_file() and path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
        raise RequestError(
            f"data.path = {path}: neither a folder, nor a .zip, .npz or .npy; write its images into one, for example "
            f"by {AS_ARRAY}"
        )
    return _from_names("zip", path, zip_names(path))


def _of_array(path: Path) -> Source:
    found = array_file.open_array(path)
    names = [str(i) for i in range(found.shape[0])]
    classes, labels = [""], [0] * len(names)
    if found.labels is not None:
        classes, labels = array_file.classes_of(found.labels.tolist())
    selection = {"images": found.key, "labels": found.labels is not None}
    members = {"train": names}
    return Source("array", path, members, classes, dict(zip(names, labels, strict=True)), selection, array=found)


def _from_names(kind: str, path: Path, meant: Mapping[str, str]) -> Source:
    """meant: name by which a file is opened -> its name as text, with / between folders."""
    pictures = sorted(n for n, m in meant.items() if not HIDDEN.search(m))
    images = [n for n in pictures if suffix(n) in IMAGE_SUFFIXES]
    not_taken = Counter(suffix(n) for n in pictures if suffix(n) in NOT_TAKEN)
    packed = Counter(suffix(n) for n in pictures if suffix(n) in PACKED)
    if not images:
        kinds, holds = (", ".join(f"{num} {kind}" for kind, num in of.items()) for of in (not_taken, packed))
        raise RequestError(
            f"data.path = {path}: no images in this {kind}; expected CLASS/NAME.png, optionally under "
            f"train/ and test/ (suffixes: {' '.join(sorted(IMAGE_SUFFIXES))})"
            + (f"; pictures of other kinds are there ({kinds}): save them as .png" if kinds else "")
            + (f"; of what it has ({holds}) write the images into an array: {AS_ARRAY}" if holds else "")
        )
    places = [meant[n] for n in images]
    layout.refuse_twice(path, places)
    folders = layout.folders_of(places)
    depth = layout.wrappers(folders)
    selection: dict[str, Any] = {}
    theirs = _said_beside(kind, path, {meant[n]: n for n in pictures}, places, folders, selection)
    if theirs is None:
        layout.refuse_unclear(path, folders, depth)

    @functools.cache
    def place(folder: str) -> tuple[str, list[str]]:
        """The split of a folder's images, and the folders from that of their class on."""
        below = [*PurePosixPath(folder).parts[depth:]]
        split = (below and layout.split_of(below[0])) or ""
        return split or "train", below[1:] if split else below  # a split's own folder is no class

    members: dict[str, list[str]] = {}
    class_of: dict[str, str] = {}
    nested = False
    for n in images:
        split, below = place(layout.folder_of(meant[n]))
        members.setdefault(split, []).append(n)
        class_of[n] = theirs[meant[n]] if theirs else below[0] if below else ""
        nested |= len(below) > 1
    by_number = (lambda name: int(name or 0)) if theirs else None
    classes = sorted({class_of[n] for n in members.get("train", images)}, key=by_number)
    label_of = {name: label for label, name in enumerate(classes)}
    if nested and not theirs:
        selection["class"] = "outermost folder"
    if splits := list(layout.new_splits(folders, depth)):
        selection["splits"] = splits
    if any(suffix(n) == ".jfif" for n in images):  # once they were left out
        selection["suffixes"] = [".jfif"]
    if any(suffix(n) in (".tif", ".tiff") for n in images):  # once turned ones were turned twice, some dark or negative
        selection["tiff"] = 2
    if kind == "zip" and any(BACKSLASH in n for n in images):  # once they were in no folder
        selection["separator"] = BACKSLASH
    if kind == "zip" and any(meant[n] != n.replace(BACKSLASH, "/") for n in images):  # once they had other names
        selection["names"] = "UTF-8"
    labels = {n: label_of.get(name, -1) for n, name in class_of.items()}
    return Source(kind, path, members, classes, labels, selection or None, not_taken)


def _said_beside(
    kind: str,
    path: Path,
    pictures: Mapping[str, str],
    places: list[str],
    folders: Collection[tuple[str, ...]],
    selection: dict[str, Any],
) -> dict[str, str] | None:
    """The class of each image from a dataset.json, whose digest is added to `selection`; None if there is none.
    pictures: name as text -> name by which it is opened; places: those of the images, which lie in `folders`."""
    if (where := dataset_json.place(pictures, folders)) is None:
        return None
    try:
        if kind == "zip":
            with zipfile.ZipFile(path) as archive, archive.open(pictures[where]) as file:
                raw = file.read(dataset_json.MOST_BYTES)
        else:
            raw = read_bytes(path / pictures[where], dataset_json.MOST_BYTES)
    except Exception as e:  # zipfile raises some six kinds for broken bytes
        raise RequestError(f"data.path = {path}: {where} cannot be read ({e}); copy it again, or remove it") from None
    found = dataset_json.classes(raw, path, where, places)
    if found is not None:
        selection[dataset_json.NAME] = hashlib.sha256(raw).hexdigest()
    return found


# ---------------------------------------------------------------- decoding


def read(
    source: Source, split: str, size: int | None, downloads: Path, how: Decoding | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Each image of a split, uint8 (size, size, 3), and its label. downloads: folder for data without a path.

    how: how to decode pictures; it also counts what was done.
    Raises RequestError naming all images that cannot be decoded, EnvironmentLacks (no download, no scikit-learn).
    """
    if source.kind == "digits":
        return library.read_digits(size)
    if source.kind == "cifar10":
        return library.read_cifar10(source.path or downloads / "cifar10", split, size)
    if source.array is not None:
        return _read_array(source.array, source, size, how or Decoding())
    return _decode(source, split, size, how)


def _decode(source: Source, split: str, size: int | None, asked: Decoding | None) -> Iterator[tuple[np.ndarray, int]]:
    """`read` for a folder or a zip: by threads, in order, where the files are not too small for that to pay."""
    assert source.path is not None
    how, path, names = asked or Decoding(), source.path, source.members[split]
    archive = zipfile.ZipFile(path) if source.kind == "zip" else None
    one_at_a_time: Any = threading.Lock() if archive else contextlib.nullcontext()

    def raw(name: str) -> bytes:
        with one_at_a_time, archive.open(name) if archive else open_file(path / name) as file:
            return _all_of(file)

    def part(first: int) -> tuple[list[tuple[np.ndarray, int]], Decoding]:
        its = dataclasses.replace(how, damaged={}, converted=Counter())
        some = names[first : first + PART_IMAGES]
        return list(_pictures(source, some, raw, size, its)), its

    def num_bytes(name: str) -> int:
        return archive.getinfo(name).file_size if archive else _stat(f"{path}/{name}").st_size

    try:
        some, small = names[:: len(names) // 16 + 1], len(names) <= PART_IMAGES
        with contextlib.suppress(OSError, KeyError):  # reading it will tell
            small = small or sum(map(num_bytes, some)) < SMALL_BYTES * len(some)
        if not small:
            load_formats()
        for made, its in (map if small else ahead.in_order)(part, range(0, len(names), PART_IMAGES)):
            yield from made
            how.damaged |= its.damaged
            how.converted.update(its.converted)
    finally:
        if archive:
            archive.close()
    if how.damaged and not how.skip_damaged:
        told = told_of_damaged(how.damaged, len(names))
        raise RequestError(f"data.path = {path}: {told}" + (SKIP if asked else ""))


def _pictures(
    source: Source, names: Iterable[str], raw: Callable[[str], bytes], size: int | None, how: Decoding
) -> Iterator[tuple[np.ndarray, int]]:
    """The pixels and labels of those that can be decoded. raw: the content of the file of that name."""
    for name in names:
        try:
            content = raw(name)
        except OSError as e:
            if e.errno in PASSING:
                raise
            how.damaged[readable(name)] = e.strerror or str(e)
            continue
        except Exception as e:  # zlib and zipfile raise some ten kinds for broken bytes
            how.damaged[readable(name)] = _in_a_line(e)
            continue
        try:
            pixels = how.pixels(content, size)
        except MemoryError:
            raise EnvironmentLacks(
                f"data.path = {source.path}: {readable(name)}: to decode it takes more memory than there is here; "
                f"make it smaller, remove it, or submit where there is more"
            ) from None
        except Exception as e:  # so does Pillow, OSError among them
            how.damaged[readable(name)] = _in_a_line(e)
        else:
            yield pixels, source.labels[name]


def _read_array(array: ArrayFile, source: Source, size: int | None, how: Decoding) -> Iterator[tuple[np.ndarray, int]]:
    from PIL import Image

    for name, image in zip(source.members["train"], array.images(), strict=True):
        whole = size is None or image.shape[:2] == (size, size)
        yield image if whole else how.square(Image.fromarray(image), size), source.labels[name]


def _in_a_line(error: Exception) -> str:
    if str(error).startswith("cannot identify image file"):  # Pillow adds the address of a buffer
        return "no picture in a format that Pillow reads"
    return " ".join(str(error).split()) or type(error).__name__


def told_of_damaged(damaged: Mapping[str, str], num: int, *, skipped: bool = False) -> str:
    """For a message: which of `num` images cannot be decoded and why, at most SHOWN of them, and what to do about it.

    skipped: they are left out, so that nothing needs to be done.
    """
    if len(damaged) == 1:
        ((name, why),) = damaged.items()
        return f"{name} cannot be decoded ({why})" + ("" if skipped else "; replace or remove it")
    lines = [f"{name} ({why})" for name, why in list(damaged.items())[:SHOWN]]
    more = [f"and {len(damaged) - SHOWN} more"] if len(damaged) > SHOWN else []
    listed, todo = "\n  ".join([*lines, *more]), "" if skipped else "; replace or remove them"
    return f"{len(damaged)} of {counted(num, 'image')} cannot be decoded{todo}:\n  {listed}"


def _all_of(file: IO[bytes]) -> bytes:
    """The content of one image's file. Raises ValueError if it is empty or too large, whatever an archive's index
    says."""
    raw = bytearray()
    while piece := file.read(PIECE_BYTES):
        raw += piece
        if len(raw) > listing.MAX_IMAGE_BYTES:
            raise ValueError(f"more than {listing.MAX_IMAGE_BYTES:,} bytes")
    if not raw:
        raise ValueError("the file is empty")
    return bytes(raw)
