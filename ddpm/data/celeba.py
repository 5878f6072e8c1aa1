"""CelebA (Liu, Luo, Wang, Tang 2015, "Deep Learning Face Attributes in the Wild"): aligned faces with 40 attributes.

Owns the reading of its lists: which images there are, in which split, chosen by which attributes, with which label.
The 202,599 JPEGs stay in their zip: a folder of them costs a cluster as many inodes. Decoding is sources.py's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ddpm.config.attributes import unknown_name
from ddpm.config.data import Data
from ddpm.data.listing import zip_names
from ddpm.data.sources import Source
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.files import TMP_PREFIX
from ddpm.run.log import counted

IMAGES = "img_align_celeba"
ATTRIBUTES = "list_attr_celeba.txt"
PARTITION = "list_eval_partition.txt"
"""Each may be Kaggle's .csv: a line of headings, then commas."""
SPLITS = {"0": "train", "1": "valid", "2": "test"}
MOST_LIST_BYTES = 256 << 20
"""Largest list that is read; the real one has 27 MB."""
HOME = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


def open_source(data: Data) -> Source:
    """The images that `data` selects. Without a data.path only splits and classes are known.

    Raises RequestError for a path without CelebA, a damaged list, an attribute that the list does not have, or a
    selection that is empty or leaves a class without images.
    """
    if data.path is None:
        return Source("celeba", None, {split: [] for split in SPLITS.values()}, _classes(data))
    return _choose(data, _find(Path(data.path).expanduser()))


def download(data: Data, folder: Path) -> Source:
    """`open_source` for `folder`, after downloading the files that it lacks.

    The ids and MD5s are torchvision's; its class is not used because it also unpacks the zip. Raises EnvironmentLacks
    if a download fails.
    """
    for file in (ATTRIBUTES, PARTITION, f"{IMAGES}.zip"):
        if not (folder / file).exists():
            _fetch(file, folder)
    return _choose(data, folder)


def _fetch(file: str, folder: Path) -> None:
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import download_file_from_google_drive

    ids = {name: (file_id, md5) for file_id, md5, name in CelebA.file_list}
    tmp = folder / f"{TMP_PREFIX}{os.getpid()}"
    try:
        download_file_from_google_drive(ids[file][0], str(tmp), file, ids[file][1])
        (tmp / file).rename(folder / file)  # what has its name is whole
    except Exception as e:  # no gdown, no network, Google's quota: each has its own kinds
        raise EnvironmentLacks(
            f"CelebA's {file} could not be had from Google Drive ({e}); fetch {ATTRIBUTES}, {PARTITION} and "
            f"{IMAGES}.zip by hand ({HOME}, Align&Cropped Images) and put them into {folder}, or into any "
            f"folder and give data.path=FOLDER"
        ) from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing came


def _find(path: Path) -> Path:
    """The folder that has the lists, or Kaggle's zip of everything. Raises RequestError."""
    if path.is_file():
        if _list(path, ATTRIBUTES) is not None:
            return path
        where = "in it"
    else:
        for folder in (path, path / "celeba"):
            if _list(folder, ATTRIBUTES) is not None:
                return folder
        where = f"here nor in {path / 'celeba'}"
    raise RequestError(
        f"data.path = {path}: no {ATTRIBUTES} {where}; give the folder that holds it (or Kaggle's .csv) and "
        f"{IMAGES}.zip (or {IMAGES}/), or Kaggle's archive.zip with all of them, or leave data.path out to download "
        f"CelebA"
    )


# ---------------------------------------------------------------- lists


@dataclass(frozen=True)
class List:
    """One of CelebA's lists."""

    path: Path
    """For messages; for a list in a zip, the path as if the zip were a folder."""
    raw: bytes

    @property
    def is_csv(self) -> bool:
        return self.path.suffix == ".csv"

    @property
    def lines(self) -> list[str]:
        return self.raw.decode("utf-8-sig", errors="replace").rstrip().splitlines()


def _list(place: Path, name: str) -> List | None:
    """CelebA's own list, or Kaggle's .csv of it, in a folder or a zip; None if there is none."""
    names = [name, PurePosixPath(name).with_suffix(".csv").name]
    if not place.is_file():
        there = [place / n for n in names if (place / n).is_file()]
        return List(there[0], there[0].read_bytes()) if there else None
    members = sorted(zip_names(place), key=len)  # the outermost, where one is there twice
    inside = [m for n in names for m in members if PurePosixPath(m).name == n and not m.startswith("__MACOSX")]
    if not inside:
        return None
    try:
        with zipfile.ZipFile(place) as archive, archive.open(inside[0]) as file:
            raw = file.read(MOST_LIST_BYTES)
    except Exception as e:  # zipfile raises some six kinds for broken bytes
        raise RequestError(f"data.path = {place}: {inside[0]} cannot be read ({e}); copy the zip again") from None
    return List(place / inside[0], raw)


def _damaged(found: List, line: int, what: str) -> RequestError:
    return RequestError(f"data.path: {found.path}, line {line}: {what}; this list is damaged: copy it again")


def _fields(of: List, line: str, values: int) -> list[str]:
    """The fields of a line: a file name, which may contain spaces, and `values` values; a damaged line gives another
    number of fields."""
    return [f.strip() for f in (line.split(",") if of.is_csv else line.strip().rsplit(None, values))]


def read_names(attributes: List) -> list[str]:
    """The attributes of a list in its order: from line 2, or line 1 of a .csv. Raises RequestError."""
    lines = attributes.lines[:2]
    if attributes.is_csv:
        names = _fields(attributes, lines[0], 0)[1:] if lines else []
    else:
        count, names = lines[0].strip() if lines else "", lines[1].split() if lines[1:] else []
        if not count.isdecimal():
            raise _damaged(attributes, 1, f"expected the number of images, found {count[:40]!r}")
    if not names:
        raise _damaged(attributes, 1 if attributes.is_csv else 2, "expected the names of the attributes")
    return names


def read_attributes(found: List, wanted: Iterable[str]) -> dict[str, tuple[bool, ...]]:
    """The `wanted` attributes of every image, by its file name. Raises RequestError naming a damaged line."""
    names = read_names(found)
    columns = [1 + names.index(name) for name in wanted]
    lines, head = found.lines, 1 if found.is_csv else 2
    rows: dict[str, tuple[bool, ...]] = {}
    for number, line in enumerate(lines[head:], start=head + 1):
        fields = _fields(found, line, len(names))
        if len(fields) != 1 + len(names) or not {"1", "-1"}.issuperset(fields[1:]):
            raise _damaged(found, number, f"expected a file name and {len(names)} times 1 or -1, found {line[:40]!r}")
        if fields[0] in rows:
            raise _damaged(found, number, f"{fields[0]} stands twice")
        rows[fields[0]] = tuple(fields[i] == "1" for i in columns)
    if head == 2 and int(lines[0]) != len(rows):
        raise _damaged(found, 1, f"it announces {counted(int(lines[0]), 'image')}, and {len(rows)} follow")
    return rows


def read_partition(found: List) -> dict[str, str]:
    """The split of every image, by its file name. Raises RequestError naming a damaged line."""
    split_of: dict[str, str] = {}
    head = 1 if found.is_csv else 0
    for number, line in enumerate(found.lines[head:], start=head + 1):
        fields = _fields(found, line, 1)
        if len(fields) != 2 or fields[1] not in SPLITS:
            raise _damaged(found, number, f"expected a file name and 0, 1 or 2, found {line[:40]!r}")
        split_of[fields[0]] = SPLITS[fields[1]]
    return split_of


# ---------------------------------------------------------------- choice


def _choose(data: Data, folder: Path) -> Source:
    """The source that results from the lists in `folder`, which may be a zip, and the attributes asked for."""
    attributes, partition = _list(folder, ATTRIBUTES), _list(folder, PARTITION)
    assert attributes is not None  # by which the folder was found
    if wrong := unknown_name(data.attributes, data.label_attributes, read_names(attributes)):
        raise RequestError(f"{wrong} (in {attributes.path})")
    wanted = dict(data.attributes)
    rows = read_attributes(attributes, [*wanted, *data.label_attributes])
    split_of = read_partition(partition) if partition else dict.fromkeys(rows, "train")
    if unsplit := sorted(rows.keys() - split_of.keys()):
        where = partition.path if partition else PARTITION
        raise RequestError(
            f"data.path: {where} lacks {len(unsplit)} of {counted(len(rows), 'image')} ({unsplit[0]}, …): copy it again"
        )
    values = tuple(wanted.values())
    chosen = sorted(name for name, bits in rows.items() if bits[: len(values)] == values)
    if not any(split_of[name] == "train" for name in chosen):
        each = ", ".join(
            f"{name}={str(value).lower()}: {sum(bits[i] == value for bits in rows.values())}"
            for i, (name, value) in enumerate(wanted.items())
        )
        raise RequestError(
            f"data.attributes = {wanted}: of {counted(len(rows), 'image')} {len(chosen)} are left, none of them for "
            f"training{f' ({each})' if each else ''}; ask for less"
        )
    images, place = _images(folder, rows)
    members: dict[str, list[str]] = {}
    labels: dict[str, int] = {}
    for name in chosen:
        members.setdefault(split_of[name], []).append(place[name])
        labels[place[name]] = sum(bit << i for i, bit in enumerate(rows[name][len(values) :]))
    classes = _classes(data)
    have = {labels[name] for name in members["train"]}
    if empty := [classes[label] for label in range(len(classes)) if label not in have]:
        raise RequestError(
            f"data.label_attributes = {list(data.label_attributes)}: no training image is left for "
            f"{' nor for '.join(empty)}; choose other attributes for the labels, or filter by fewer"
        )
    selection = {
        "attributes": wanted,
        "label_attributes": list(data.label_attributes),
        "lists": [hashlib.sha256(found.raw).hexdigest() if found else None for found in (attributes, partition)],
    }
    return Source("zip" if images.is_file() else "folder", images, members, classes, labels, selection)


def _classes(data: Data) -> list[str]:
    """A name for each label, whose bit i is attribute i of data.label_attributes; one class if there are none."""
    names = data.label_attributes
    return [
        ",".join(f"{name}={label >> i & 1}" for i, name in enumerate(names)) or "all"
        for label in range(2 ** len(names))
    ]


def _images(folder: Path, listed: Iterable[str]) -> tuple[Path, dict[str, str]]:
    """The zip or folder with the images, and the name in it of each listed image. RequestError if one is missing."""
    # the zip first: a folder beside it may be half unpacked
    for images in (folder,) if folder.is_file() else (folder / f"{IMAGES}.zip", folder / IMAGES):
        if images.exists():
            break
    else:
        raise RequestError(f"data.path: no {IMAGES}.zip nor {IMAGES}/ in {folder}, beside {ATTRIBUTES}; put one there")
    if (doubled := images / IMAGES).is_dir():  # as Kaggle's zip unpacks
        images = doubled
    names = zip_names(images) if images.is_file() else [p.name for p in images.iterdir()]
    if folder.is_file():
        names = [name for name in names if IMAGES in PurePosixPath(name).parts[:-1] and not name.startswith("__MACOSX")]
    place = {name.rpartition("/")[2]: name for name in names}
    if missing := sorted(set(listed) - place.keys()):
        raise RequestError(
            f"data.path: {images} lacks {len(missing)} of the images in {ATTRIBUTES} ({missing[0]}, …): "
            f"copy it again, whole"
        )
    return images, place
