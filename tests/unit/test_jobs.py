from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm.distributed import World
from launch.jobs import _compiling


def test_what_a_life_compiled_is_kept_once_it_got_past_that_and_dropped_where_it_did_not(tmp_path: Path) -> None:
    kernels, world = tmp_path / "run.v2", World(0, 1, torch.device("cpu"))
    library = kernels / "ab" / "kernel.so"

    with _compiling(kernels, world, True):
        library.parent.mkdir(parents=True)
        library.write_bytes(b"whole")
    with _compiling(kernels, world, True):
        assert library.read_bytes() == b"whole"

    with pytest.raises(OSError, match="short"), _compiling(kernels, world, True):
        library.write_bytes(b"wh")
        raise OSError("file too short")
    with _compiling(kernels, world, True):
        assert not library.exists()
    assert list(tmp_path.iterdir()) == []
