"""Lists the files in a folder or a zip by name. Must not know: what their folders mean, nor what is in them."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ddpm.data import layout
from ddpm.errors import RequestError
from ddpm.run.files import open_file

T = TypeVar("T")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
NOT_TAKEN = {".gif", ".jp2", ".j2k", ".avif", ".heic", ".heif", ".jxl", ".svg", ".tga"}
"""Kinds of pictures that are not read; their number is logged."""
MAX_IMAGE_BYTES = 256 << 20
"""Largest file of one image: ten megabytes of a zip can unpack to ten gigabytes of zeros."""
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods that zipfile unpacks in bounded pieces; with others a kilobyte may become a gigabyte at once."""
_listed: ContextVar[dict[str, Any] | None] = ContextVar("listed", default=None)


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """Within: what a path holds is listed once, however often it is asked for, as by each run of a sweep."""
    token = _listed.set({})
    try:
        yield
    finally:
        _listed.reset(token)


def list_anew() -> None:
    """Within `listed_once`: forget what was listed, as after hours of waiting."""
    (_listed.get() or {}).clear()


def once(what: str, make: Callable[[], T]) -> T:
    """What `make` gives; within `listed_once` what it gave for `what` before."""
    if (kept := _listed.get()) is None:
        return make()
    if what not in kept:
        kept[what] = make()
    found: T = kept[what]
    return found


def folder_names(path: Path) -> Iterator[str]:
    """Files below a folder, relative to it, also through links to folders, except links back to a folder above them.

    Raises RequestError for a folder that cannot be read: its images would be missing silently.
    """

    def refuse(error: OSError) -> NoReturn:
        raise RequestError(f"data.path = {path}: {error.filename}: {error.strerror}; make it readable, or remove it")

    todo = [("", path)]
    while todo:
        prefix, folder = todo.pop()
        try:
            with os.scandir(folder) as entries:  # with kinds: a million files need not be asked one by one
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            refuse(error)
        for entry in found:
            if not _is_folder(entry):
                if entry.is_symlink() or entry.is_file():  # one that leads nowhere is named when it is read
                    yield prefix + entry.name
            elif not (entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve())):
                todo.append((f"{prefix}{entry.name}/", Path(entry.path)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


UTF_8 = 0x800
"""Zip flag of a member whose name is UTF-8; macOS and others write UTF-8 names without it."""


def zip_names(path: Path) -> dict[str, str]:
    """The files in a zip: name by which zipfile opens it -> intended name (UTF-8, / between folders). Raises
    RequestError if the zip cannot be read, or an image in it is too large or there twice."""
    try:
        with open_file(path) as f, zipfile.ZipFile(f) as archive:
            files = [i for i in archive.infolist() if not i.is_dir()]
    except Exception as e:  # zipfile raises some six kinds for broken bytes
        raise RequestError(
            f"data.path = {path}: not a readable zip ({e}); copy it again, or unpack it and give the folder"
        ) from None
    for file in files:
        if suffix(file.filename) not in IMAGE_SUFFIXES:
            continue
        if file.file_size > MAX_IMAGE_BYTES:
            raise RequestError(
                f"data.path = {path}: {file.filename} would unpack to {file.file_size:,} bytes, and an image has at "
                f"most {MAX_IMAGE_BYTES:,}; remove it"
            )
        if file.compress_type not in BOUNDED:
            raise RequestError(
                f"data.path = {path}: {file.filename} is not compressed by the usual method (deflate); zip the images "
                f"again, or unpack it and give the folder"
            )
    names = [file.filename for file in files]
    layout.refuse_twice(path, [name for name in names if suffix(name) in IMAGE_SUFFIXES])
    return {file.filename: _as_meant(file) for file in files}


def _as_meant(file: zipfile.ZipInfo) -> str:
    name = file.filename
    if not file.flag_bits & UTF_8:
        with contextlib.suppress(UnicodeError):  # then it is not, and of an encoding that nobody tells
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")


def suffix(name: str) -> str:
    """The suffix of a name in small letters, with its dot; pathlib takes ten times as long to find it."""
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return f"{dot}{end}".lower() if stem and end else ""


def readable(name: str) -> str:
    """A file name as text that can be written; bytes that are not UTF-8 become \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_torchvisions(root: Path) -> bool:
    """Whether a folder has CIFAR-10's own archive, or is empty, so that it can be downloaded to it."""
    return root.is_dir() and (not any(root.iterdir()) or any(root.glob("cifar-10-*")))
