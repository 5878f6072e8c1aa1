"""Images in a numpy file, .npy or .npz, with labels in it or beside it; read one at a time, whatever the file's size.

An .npz has its images under one of IMAGES, and labels, if any, under one of LABELS; labels of NAME.npy or NAME.npz may
lie in NAME-labels.npy, those of images.npy and train_images.npy in labels.npy and train_labels.npy. Must not know what
images are used for.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ddpm.data.bounded import check_members, parse_header, read_header, unread
from ddpm.data.whole import digest_once
from ddpm.errors import RequestError
from ddpm.run.files import open_file
from ddpm.run.log import counted

SUFFIXES = (".npz", ".npy")
IMAGES = ("images", "arr_0", "samples")
LABELS = ("labels", "label", "arr_1")
"""arr_0 and arr_1, numpy's default names, are those of guided-diffusion's batches."""
PIECE_BYTES = 1 << 20


class ArrayFile(NamedTuple):
    """What a file holds, by its header."""

    path: Path
    key: str | None
    """The array of an .npz that has the images; None for an .npy."""
    shape: tuple[int, int, int, int]
    """(N, H, W, 3), or (N, H, W, 1) in grey."""
    labels: np.ndarray | None
    """int64 (N,), the file's numbers; None if there are none."""
    beside: Path | None
    """The file that has the labels, if not `path`."""

    def fingerprint(self, tell: Callable[[str], None] = lambda text: None) -> Any:
        """sha256 of each file that was read. tell: is told that one is."""
        return [digest_once(self.path, tell), self.beside and digest_once(self.beside, tell)]

    def images(self) -> Iterator[np.ndarray]:
        """Each image, uint8 (H, W, 3). Raises RequestError if the file ends too early."""
        num, *shape = self.shape
        with _opened(self.path, self.key) as file:
            parse_header(file)  # which `open_array` has checked
            for index in range(num):
                raw = _read(file, math.prod(shape), self.path)
                if len(raw) < math.prod(shape):
                    raise _unreadable(self.path, f"it ends after {index} of {counted(num, 'image')}")
                image = np.frombuffer(raw, np.uint8).reshape(shape)
                yield image if shape[-1] == 3 else image.repeat(3, axis=2)

    def whole(self) -> np.ndarray:
        """All images, uint8 (N, H, W, 3); memory-mapped if the file has them in this form."""
        if self.key is None and self.shape[-1] == 3:
            return np.load(self.path, allow_pickle=False, mmap_mode="r")
        images = np.empty((*self.shape[:3], 3), np.uint8)
        for index, image in enumerate(self.images()):
            images[index] = image
        return images


def open_array(path: Path) -> ArrayFile:
    """Open `path` without reading images. Raises RequestError if it has no usable images, or labels that do not fit."""
    key, names = None, list[str]()
    try:
        if path.suffix == ".npz":
            with open_file(path) as f, zipfile.ZipFile(f) as archive:
                check_members(archive, path.stat().st_size, at_most=math.inf)  # read one image at a time
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            key = next((key for key in IMAGES if key in names), None)
            if key is None:
                raise RequestError(
                    f"data.path = {path}: holds {', '.join(names[:8]) or 'nothing'}; images must be under "
                    f"{', '.join(IMAGES[:-1])} or {IMAGES[-1]}, uint8 (N, H, W, 3)"
                )
        with _opened(path, key) as file:
            shape, fortran, dtype = read_header(file, _size(path, key))
    except OSError as e:
        raise _unreadable(path, e.strerror or str(e)) from None
    except RequestError:
        raise
    except Exception as e:  # zipfile and numpy raise a dozen kinds, depending on which bit flipped
        raise _unreadable(path, str(e)) from None
    if 0 in shape:
        raise RequestError(f"data.path = {path}: holds no images: they are {dtype} {shape}; save it again with some")
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or fortran:
        last = ", channels last" if len(shape) == 4 and shape[1] in (1, 3) else ""
        order = ", in C's order" if fortran else ""
        raise RequestError(
            f"data.path = {path}: its images are {dtype} {shape}; save them as uint8, 0 to 255, (N, H, W, 3), or in "
            f"grey (N, H, W, 1){last}{order}"
        )
    labels, beside = _labels(path, [name for name in LABELS if name in names], shape[0])
    return ArrayFile(path, key, shape, labels, beside)


# ---------------------------------------------------------------- labels


def _labels(path: Path, names: Sequence[str], num: int) -> tuple[np.ndarray | None, Path | None]:
    """The labels of `num` images, and the file that has them if it is not `path`; (None, None) if there are none.
    names: of LABELS those that an .npz has."""
    for name in names:
        with _opened(path, name) as file:
            shape, _, dtype = read_header(file, _size(path, name))
        if name == "arr_1" and not _is_plain(dtype, shape, num):
            continue
        _check(dtype, shape, num, f"{path}: {name}")
        with _opened(path, name) as file:
            parse_header(file)
            return np.frombuffer(_read(file, math.prod(shape) * dtype.itemsize, path), dtype).astype(np.int64), None
    stem = path.stem
    others = [f"{stem}-labels.npy", f"{stem}_labels.npy"]
    others += [stem.replace("images", "labels") + ".npy"] if "images" in stem else []
    for beside in (path.with_name(name) for name in others):
        if beside.is_file():
            try:
                with open_file(beside) as file:
                    read_header(file, beside.stat().st_size)
                found = np.load(beside, allow_pickle=False, mmap_mode="r")
            except (OSError, ValueError, EOFError) as e:
                raise _unreadable(beside, unread(e)) from None
            _check(found.dtype, found.shape, num, str(beside))
            return np.asarray(found, dtype=np.int64).reshape(num), beside
    return None, None


def _is_plain(dtype: np.dtype[Any], shape: tuple[int, ...], num: int) -> bool:
    return dtype.kind in "iu" and shape in ((num,), (num, 1))


def _check(dtype: np.dtype[Any], shape: tuple[int, ...], num: int, where: str) -> None:
    if not _is_plain(dtype, shape, num):
        raise RequestError(
            f"data.path: {where} is {dtype} {shape}; expected a whole number for each of {counted(num, 'image')}; save "
            f"them so, or take them away"
        )


def classes_of(values: Sequence[int]) -> tuple[list[str], list[int]]:
    """Class names, which are the distinct values in order, and the class index of each value."""
    numbers = sorted(set(values))
    index = {number: i for i, number in enumerate(numbers)}
    return [str(number) for number in numbers], [index[value] for value in values]


# ---------------------------------------------------------------- bytes


@contextlib.contextmanager
def _opened(path: Path, key: str | None) -> Iterator[IO[bytes]]:
    if key is None:
        with open_file(path) as file:
            yield file
    else:
        with open_file(path) as file, zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as member:
            yield member


def _size(path: Path, key: str | None) -> int:
    if key is None:
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{key}.npy").file_size


def _read(file: IO[bytes], num: int, path: Path) -> bytes:
    """The next `num` bytes, fewer at the end of the file. path: for messages."""
    raw = bytearray()
    try:
        while len(raw) < num and (piece := file.read(min(num - len(raw), PIECE_BYTES))):
            raw += piece
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise _unreadable(path, str(e)) from None
    return bytes(raw)


def _unreadable(path: Path, why: str) -> RequestError:
    return RequestError(f"data.path = {path} cannot be read: {' '.join(why.split())[:200]}; copy it again")
