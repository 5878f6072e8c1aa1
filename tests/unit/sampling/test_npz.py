"""ddpm/sampling/shards.py reads arrays from an .npz, and no more of them than its file can hold."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from ddpm.run.files import DamagedFile
from ddpm.sampling import shards
from ddpm.sampling.shards import npz_bytes, parse_npz


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
    tracemalloc.start()
    with pytest.raises(DamagedFile, match=r"r\.npz: not a readable \.npz .*it would unpack to 209,715,\d+ bytes"):
        parse_npz(raw, "r.npz")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_what_says_less_than_it_unpacks_to_is_damaged_too() -> None:
    with pytest.raises(DamagedFile, match=r"r\.npz: not a readable \.npz"):
        parse_npz(bomb(said=1000), "r.npz")


def test_arrays_are_read_however_well_they_are_compressed() -> None:
    zeros = np.zeros((1000, 32, 32, 3), np.uint8)
    out = io.BytesIO()
    np.savez_compressed(out, a=zeros)
    assert len(out.getvalue()) * shards.MOST_TIMES < zeros.nbytes
    for raw in (out.getvalue(), npz_bytes(a=zeros)):
        assert np.array_equal(parse_npz(raw, "a.npz")["a"], zeros)
