"""Randomness on a GPU is the CPU's, bit for bit: a run means the same images, timesteps and noise wherever it goes."""

from __future__ import annotations

import pytest
import torch

from ddpm.diffusion import rng

KEY = rng.key(3, "test")


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 5, 7), (1,)])
@pytest.mark.parametrize("step", [0, 799_999, (1 << 40) + 5])
def test_normals_equal_the_cpus_bit_for_bit(device: torch.device, shape: tuple[int, ...], step: int) -> None:
    index = torch.tensor([0, 1, 127, 128, 49_999, (1 << 33) + 1])
    here, there = rng.normal(KEY, index, step, shape), rng.normal(KEY, index.to(device), step, shape)
    assert there.device.type == "cuda"
    assert torch.equal(here.view(torch.int32), there.cpu().view(torch.int32))


def test_timesteps_flips_and_dropped_labels_equal_the_cpus(device: torch.device) -> None:
    index = torch.arange(1000)
    for draw in (
        lambda i: rng.uniform_int(KEY, i, 17, 1000),
        lambda i: rng.coin(KEY, i, 17),
        lambda i: rng.bernoulli(KEY, i, 17, 0.1),
    ):
        assert torch.equal(draw(index), draw(index.to(device)).cpu())


def test_a_million_normals_have_the_bits_of_the_cpus(device: torch.device) -> None:
    index = torch.arange(400)
    here, there = rng.normal(KEY, index, 5, (3, 32, 32)), rng.normal(KEY, index.to(device), 5, (3, 32, 32))
    assert torch.equal(here, there.cpu())
