"""ddpm/network/weights.py: files of weights from elsewhere are read, or refused in a sentence."""

from __future__ import annotations

import json
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ddpm.errors import RequestError
from ddpm.network.weights import read_pickled, read_safetensors


def framed(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensors(num: int, **of_each: Any) -> bytes:
    each = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], **of_each}
    return json.dumps({f"a{i}": each for i in range(num)}).encode()


HOSTILE = {
    "empty": b"",
    "shorter than a length": b"1234567",
    "a header beyond the file": framed(b"{}", 10**6),
    "a header of 2^63": framed(b"{}", 2**63),
    "a header of 101 MB": framed(b" " * (101 << 20)),
    "a hundred thousand tensors": framed(tensors(200_000)),
    "brackets": framed(b"[" * 100_000),
    "objects in objects": framed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "no JSON": framed(b"hello"),
    "no UTF-8": framed(b'{"\\xff": 1}'),
    "tensors beyond the file": framed(tensors(1, shape=[1000], data_offsets=[0, 4000])),
    "a shape beyond all bounds": framed(tensors(1, shape=[2**40, 2**40])),
    "an unknown type": framed(tensors(1, dtype="X9")),
    "a list of metadata": framed(b'{"__metadata__": [1]}'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_file_of_weights_is_refused_in_a_sentence_and_at_once(tmp_path: Path, case: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(HOSTILE[case])
    began = time.process_time()
    with pytest.raises(RequestError, match=r"w\.safetensors: not a readable \.safetensors file") as e:
        read_safetensors(path)
    assert time.process_time() - began < 2
    assert len(str(e.value)) < 500 and "\n" not in str(e.value)


def test_what_is_no_file_at_all_is_refused_too(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RequestError, match="not a readable"):
            read_safetensors(path)


@pytest.mark.filterwarnings("error")
def test_a_pickle_of_more_than_weights_is_refused_without_torchs_advice(tmp_path: Path) -> None:
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=4))):
        save({"a": torch.zeros(1), "b": tmp_path}, tmp_path / "evil.pt")
        with pytest.raises(
            RequestError, match=r"evil\.pt: holds more than weights; have it exported as \.safetensors$"
        ):
            read_pickled(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    ("said", "step"), [("20", 20), (None, 0), ("", 0), ("last", 0), ("1.5", 0), ("-3", 0), ("9" * 5000, 0)]
)
def test_a_step_that_is_no_number_is_not_known(tmp_path: Path, said: str | None, step: int) -> None:
    path, weight = tmp_path / "w.safetensors", torch.arange(3.0)
    save_file({"a": weight}, path, metadata={} if said is None else {"step": said})
    state, found = read_safetensors(path)
    assert found == step and torch.equal(state["a"], weight)
