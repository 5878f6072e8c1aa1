"""ddpm/sampling/shards.py reads arrays from an .npz, and no more of them than its file can hold; so do those who read
what users give.
"""

from __future__ import annotations

import io
import os
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.data import bounded
from ddpm.errors import RequestError
from ddpm.run.files import DamagedFile
from ddpm.sampling.shards import npz_bytes, parse_npz
from ddpm.scoring.foreign import load_images
from ddpm.scoring.statistics_file import read_statistics


def bomb(said: int | None = None) -> bytes:
    """200 MB of zeros in 200 kB, which say to be `said` bytes."""
    size = 200 << 20
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mu.npy", "w") as member:
        member.write(head.getvalue())
        for _ in range(200):
            member.write(bytes(1 << 20))
    raw, whole = out.getvalue(), len(head.getvalue()) + size
    return raw if said is None else raw.replace(struct.pack("<L", whole), struct.pack("<L", said))


def test_what_would_fill_a_memory_is_damaged() -> None:
    raw = bomb()
    told = r"r\.npz: not a readable \.npz .*it would unpack to 209,715,\d+ bytes"
    with pytest.raises(DamagedFile, match=told), at_most(16 << 20):
        parse_npz(raw, "r.npz")


def test_what_says_less_than_it_unpacks_to_is_damaged_too() -> None:
    with pytest.raises(DamagedFile, match=r"r\.npz: not a readable \.npz"):
        parse_npz(bomb(said=1000), "r.npz")


def test_arrays_are_read_however_well_they_are_compressed() -> None:
    zeros = np.zeros((1000, 32, 32, 3), np.uint8)
    out = io.BytesIO()
    np.savez_compressed(out, a=zeros)
    assert len(out.getvalue()) * bounded.MOST_TIMES < zeros.nbytes
    for raw in (out.getvalue(), npz_bytes(a=zeros)):
        assert np.array_equal(parse_npz(raw, "a.npz")["a"], zeros)


# ---------------------------------------------------------------- what a user gives


def npy(shape: Any, content: bytes = b"") -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return head.getvalue() + content


def npz(member: bytes, how: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        archive.writestr("arr_0.npy", member)
    return out.getvalue()


ABSURD = {
    "huge": npy((10**13, 32, 32, 3)),
    "beyond-int64": npy((2**64, 8, 8, 3)),
    "negative": npy((-5, 8, 8, 3), bytes(960)),
    "short": npy((20, 8, 8, 3), bytes(100)),
    "true": npy((True, 8, 8, 3), bytes(192)),
    "no-header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{" * 100,
    "version-3": b"\x93NUMPY\x03\x00" + npy((1,), b"x")[8:],
    "nested": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
    "a-zip": npz(npy((2, 4, 4, 3), bytes(96))),
}
"""Of an .npy."""


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Within, no more memory is taken."""
    tracemalloc.start()
    try:
        yield
    finally:
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken < num_bytes


@pytest.mark.parametrize("case", [*ABSURD, "bzip2", "fifo", "sparse"])
def test_arrays_that_no_file_holds_are_refused_by_name_before_memory_is_taken(tmp_path: Path, case: str) -> None:
    given = {".npy": ABSURD.get(case), ".npz": npz(ABSURD.get(case, b""))}
    if case == "bzip2":  # of which zipfile unpacks four kilobytes at once
        given = {".npz": npz(npy((20 << 20,), bytes(20 << 20)), zipfile.ZIP_BZIP2)}
    for suffix, content in given.items():
        path = tmp_path / f"given{suffix}"
        if case == "fifo":
            os.mkfifo(path)
        else:
            path.write_bytes(content or b"")
        if case == "sparse":
            os.truncate(path, 60 << 30)
        readers: list[Callable[[Path], Any]] = [load_images, *([read_statistics] if suffix == ".npz" else [])]
        for read in readers:
            with pytest.raises(RequestError, match=re.escape(str(path))), at_most(16 << 20):
                read(path)


def test_images_that_a_user_gives_are_read_from_either_form(tmp_path: Path) -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.save(tmp_path / "a.npy", images)
    np.savez_compressed(tmp_path / "a.npz", images)
    for name in ("a.npy", "a.npz"):
        assert np.array_equal(load_images(tmp_path / name).images, images)
