"""Checks of array files from others, so that a small file cannot make a reader allocate much memory."""

from __future__ import annotations

import io
import math
import zipfile
from typing import IO, Any

import numpy as np

from ddpm.data.listing import BOUNDED
from ddpm.run import files

MOST_HEADER_BYTES = 64 << 10
"""Largest header of an .npy that is read: numpy itself parses no more than 10,000 bytes."""
MOST_UNPACKED_BYTES, MOST_TIMES = 64 << 20, 100
"""An .npz that unpacks to more than both, the latter times its own size, is made to fill a memory."""


def check_members(archive: zipfile.ZipFile, num_bytes: int, at_most: float = files.ARRAYS_BYTES) -> None:
    """Check an .npz of `num_bytes`. Raises ValueError if its arrays would take more memory than it can fill, or than
    `at_most` bytes."""
    whole = sum(member.file_size for member in archive.infolist())
    if whole > at_most or (whole > MOST_UNPACKED_BYTES and whole > MOST_TIMES * num_bytes):
        raise ValueError(f"it would unpack to {whole:,} bytes, which is more than arrays can be compressed")
    for member in archive.infolist():
        if member.compress_type not in BOUNDED:
            raise ValueError(f"{member.filename} is compressed as no .npz is")
        with archive.open(member) as f:
            read_header(f, member.file_size)


def unread(error: Exception) -> str:
    """Why numpy did not read an array: of one that holds objects it tells how to have them unpickled."""
    of_objects = "allow_pickle" in str(error) or "Python objects" in str(error)
    return "it holds Python's objects, and no numbers" if of_objects else str(error)


def read_header(file: IO[bytes], num_bytes: int) -> tuple[Any, bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an .npy (a file or a member of an .npz) of `num_bytes`.

    Raises ValueError if it is no .npy, or its header does not match its size: numpy would allocate before it looks for
    the bytes. The file's position is undefined afterwards.
    """
    head = io.BytesIO(file.read(MOST_HEADER_BYTES))  # else as much memory as it says that its header takes
    shape, fortran, dtype = parse_header(head)
    there = num_bytes - head.tell()
    if not all(type(length) is int for length in shape):
        raise ValueError(f"its header tells of the shape {shape}")
    if (due := math.prod(shape) * dtype.itemsize) != there and not dtype.hasobject:  # numpy refuses those itself
        raise ValueError(f"its header tells of {dtype} {shape}, which takes {due:,} bytes, and it holds {there:,}")
    return shape, fortran, dtype


def parse_header(file: IO[bytes]) -> tuple[Any, bool, np.dtype[Any]]:
    """`read_header` of a file whose header is not too long, unchecked; the file's position is then behind it."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an .npy of version {version}, which no plain array has")
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
