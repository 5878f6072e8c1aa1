"""Maps a packed dataset from disk, and checks that nothing changed since it was packed.

All pixels are read once per machine and boot. A file that was found whole is marked by an empty file on the machine's
own disk, whose name is a digest of the boot, of the file's identity, size and times, and of the pixels: the mark need
not be read, and a changed file has none. That of an archive, whose digest nobody knows before, contains the digest.
Must not know: how data is packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.data.labels import labels_digest
from ddpm.errors import Stopped
from ddpm.run.files import (
    ARRAYS_BYTES,
    PASSING,
    SETTLED_S,
    DamagedFile,
    marks,
    open_file,
    read_bytes,
    read_signed,
    sha256_json,
    sign,
    write_bytes,
    write_json,
)
from ddpm.run.log import amount, say
from ddpm.run.stopping import StopRequested

CHUNK_BYTES = 16 << 20
TOLD_BYTES = 1 << 30
"""From this size on a line says that a file is read, since that takes seconds or minutes."""
SHA256 = re.compile("[0-9a-f]{64}")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class PackedImages:
    """A dataset in memory or mapped: images uint8 (N, H, W, 3), labels int64 (N,) (0 where there are no classes)."""

    images: np.ndarray
    labels: np.ndarray
    name: str
    split: str
    digest: str
    """sha256 over dtype, shape and bytes of `images`."""
    classes: Sequence[str] = ()
    """Their names, by label."""

    def __len__(self) -> int:
        return len(self.images)


def digest_head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    return f"{dtype} {shape}".encode()


def images_digest(images: np.ndarray) -> str:
    """sha256 over dtype, shape and bytes of an image array (N, H, W, C)."""
    digest = hashlib.sha256(digest_head(images.dtype, images.shape))
    for first in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[first : first + 4096]).data)
    return digest.hexdigest()


class Watch:
    """Watches the file whose pixels are mapped, since writing into it changes what is trained on."""

    def __init__(self, packed: PackedImages) -> None:
        self._packed = packed
        name = getattr(packed.images, "filename", None)  # a memory map has one; arrays in memory have none
        self._path = Path(name) if name else None
        self._seen = self._now()

    def damage(self) -> str:
        """For a message: that the mapped pixels were overwritten; "" if not. They are only read again if the file's
        inode, size or times have changed; a network file system may show that a minute late."""
        if (now := self._now()) != self._seen:
            if images_digest(self._packed.images) != self._packed.digest:
                return f"{self._path}: overwritten while it was mapped"
            self._seen = now
        return ""

    def _now(self) -> list[int] | None:
        try:
            return marks(self._path.stat()) if self._path else None
        except OSError:  # gone, which takes nothing from a map
            return None


# ---------------------------------------------------------------- opening


def open_packed(cache: Path, key: str, *, scratch: Path | None = None) -> PackedImages:
    """Map a packed dataset, from its copy on `scratch` if that looks whole. Everything but the pixels is checked.

    Raises OSError if it does not exist or cannot be read, DamagedFile if it is damaged.
    """
    if scratch is not None:
        with contextlib.suppress(OSError, DamagedFile):
            return open_packed(scratch, key)
    where = cache / key
    meta = read_signed(where / "meta.json")
    try:
        images = np.lib.format.open_memmap(where / "images.npy", mode="r")
        labels = np.load(io.BytesIO(read_bytes(where / "labels.npy", ARRAYS_BYTES)), allow_pickle=False)
        packed = PackedImages(images, labels, meta["name"], meta["split"], meta["digest"], meta["classes"])
        form = [images.dtype, list(images.shape), images.flags.c_contiguous, (where / "images.npy").stat().st_size]
        packed_as = [np.uint8, meta["shape"], True, meta["bytes"]]
    except OSError as e:
        e.filename = e.filename or str(where / "images.npy")
        raise
    except DamagedFile:
        raise
    except Exception as e:  # numpy, and the parser of Python that it reads headers with, raise a dozen kinds
        raise DamagedFile(f"{where}: not readable ({e}); submit again, which packs it again") from None
    if form != packed_as:
        raise DamagedFile(f"{where / 'images.npy'}: not of the size or form that was packed; submit again")
    _check_labels(where / "labels.json", packed)
    return packed


def _check_labels(digest_file: Path, packed: PackedImages) -> None:
    """Raise DamagedFile if the labels are not those that were packed; without their digest (in an old cache) only their
    form and range can be checked."""
    labels, num, classes = packed.labels, len(packed), packed.classes
    whole = labels.dtype == np.int64 and labels.shape == (num,) and num > 0
    whole = whole and -1 <= labels.min() <= labels.max() < len(classes)
    if whole:
        with contextlib.suppress(FileNotFoundError):
            whole = read_signed(digest_file).get("digest") == labels_digest(labels, classes)
    if not whole:
        raise DamagedFile(f"{digest_file.with_name('labels.npy')}: these are not the labels that were packed")


def open_verified(
    cache: Path, key: str, *, labels: Sequence[int] = (), stop_requested: StopRequested = lambda: None
) -> PackedImages:
    """`open_packed` with the pixels checked too: they are read once per machine and boot.

    labels: what the labels must be, if known from the source. An old cache gets a digest of the labels that it has.
    It is tried again after an error that may pass. Also raises Stopped.
    """
    try:
        return _open_verified(cache, key, labels, stop_requested)
    except OSError as e:
        if e.errno not in PASSING:
            raise
    return _open_verified(cache, key, labels, stop_requested)


def _open_verified(cache: Path, key: str, labels: Sequence[int], stop_requested: StopRequested) -> PackedImages:
    packed, where = open_packed(cache, key), cache / key
    if labels and packed.labels.tolist() != list(labels):
        raise DamagedFile(f"{where / 'labels.npy'}: these are not the labels of the images")
    images: Any = packed.images
    head = hashlib.sha256(digest_head(images.dtype, images.shape))
    _check_bytes(where / "images.npy", images.offset, head, packed.digest, stop_requested)
    if not (where / "labels.json").exists():
        with contextlib.suppress(OSError):  # read-only, or another job's
            write_json(where / "labels.json", sign({"digest": labels_digest(packed.labels, packed.classes)}))
    return packed


def _check_bytes(path: Path, first: int, digest: Any, expected: str, stop_requested: StopRequested) -> None:
    """Check the digest of `path` from byte `first` on, unless it was found whole before. digest: a hash of what
    precedes.

    Uses read(2) instead of the map, so that a bad block of the disk is an OSError and no SIGBUS.
    Raises DamagedFile if the digest is not `expected`; OSError; Stopped.
    """
    with open_file(path) as f:
        stat, began = os.fstat(f.fileno()), time.time()
        mark = _mark(stat, expected)
        if mark is not None and mark.exists():
            return
        _tell_of_reading(path, stat, say)
        f.seek(first)
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
            if reason := stop_requested():
                raise Stopped(reason)
    if digest.hexdigest() != expected:
        raise DamagedFile(f"{path}: these are not the pixels that were packed")
    if mark is not None and _is_settled(stat, began):
        with contextlib.suppress(OSError):
            mark.touch()


def digest_once(path: Path, tell: Tell = lambda text: None) -> str:
    """sha256 of a file, such as an archive of all images, which is read once per machine and boot. tell: is told that a
    large one is read. Raises OSError, DamagedFile."""
    with open_file(path) as f:
        stat, began = os.fstat(f.fileno()), time.time()
        mark = _mark(stat, "sha256")
        with contextlib.suppress(OSError, DamagedFile, UnicodeDecodeError):
            if mark is not None and SHA256.fullmatch(known := read_bytes(mark).decode()):
                return known
        _tell_of_reading(path, stat, tell)
        digest = hashlib.sha256()
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    if mark is not None and _is_settled(stat, began):
        with contextlib.suppress(OSError):
            write_bytes(mark, digest.hexdigest().encode(), replace=True)
    return digest.hexdigest()


def _tell_of_reading(path: Path, stat: os.stat_result, tell: Tell) -> None:
    if stat.st_size >= TOLD_BYTES:
        tell(f"reading all {amount(stat.st_size)} of {path}, as once per machine and boot")


def _is_settled(stat: os.stat_result, began: float) -> bool:
    return max(stat.st_mtime, stat.st_ctime) < began - SETTLED_S


def _mark(stat: os.stat_result, expected: str) -> Path | None:
    """The mark of a file of which `expected` is known; None if this machine has no place for marks: then it is always
    read."""
    try:
        places = Path(tempfile.gettempdir()) / f"ddpm-hpc-{os.getuid()}"  # raises where all such folders are full
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        places.mkdir(mode=0o700, exist_ok=True)
        if places.lstat().st_uid != os.getuid():
            return None  # somebody else's
    except OSError:
        return None
    return places / sha256_json([boot, *marks(stat), expected])
