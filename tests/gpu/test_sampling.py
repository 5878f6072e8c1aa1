"""On a GPU a request means the same bytes however its set is made: what is replayed, and when, decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from ddpm.sampling.denoiser import Replays
from tests.sampling import IN_EVERY_WAY, digests_in_every_way


@pytest.fixture(autouse=True)
def as_in_a_job_that_samples() -> Iterator[None]:
    """Which sets none of the switches that training sets."""
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
        yield
    torch.set_float32_matmul_precision(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.parametrize("name", IN_EVERY_WAY)
def test_a_unet_gives_the_same_bytes_in_every_way_that_a_set_is_made(
    device: torch.device, tmp_path: Path, name: str
) -> None:
    """Each life makes its first two evaluations kernel by kernel and replays the others, so the same samples come by
    both."""
    digests, lives = digests_in_every_way(tmp_path / "run", IN_EVERY_WAY[name], device)
    assert len(digests) == 3 and len(set(digests.values())) == 1, digests
    recorded = [replay for life in lives for replay in cast(Replays, life.eps)._recorded.values()]
    assert recorded and None not in recorded
