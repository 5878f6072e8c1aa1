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


@pytest.mark.parametrize("num", [1, 2051, 131_072])
def test_masks_of_dropout_equal_the_cpus_bit_for_bit(device: torch.device, num: int) -> None:
    index = torch.tensor([0, 1, 127, (1 << 33) + 1])
    here = rng.keep_mask(rng.places(KEY, index, 799_999), 7, num, 0.1)
    assert torch.equal(here, rng.keep_mask(rng.places(KEY, index.to(device), 799_999), 7, num, 0.1).cpu())


def test_a_draw_is_one_kernel(device: torch.device) -> None:
    index = torch.arange(128, device=device)
    places = rng.places(KEY, index, 1)
    draws = {
        "normal": lambda: rng.normal(KEY, index, 1, (3, 32, 32)),
        "mask": lambda: rng.keep_mask(places, 3, 131_072, 0.1),
        "word": lambda: rng.uniform_int(KEY, index, 1, 1000),
    }
    for draw in draws.values():
        draw()
    started = {}
    for name, draw in draws.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            draw()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        started[name] = sum(e.count for e in profile.key_averages() if e.device_type == on_device)
    assert started["normal"] == started["mask"] == 1 and started["word"] <= 4, started


def test_a_million_normals_have_the_bits_of_the_cpus(device: torch.device) -> None:
    index = torch.arange(400)
    here, there = rng.normal(KEY, index, 5, (3, 32, 32)), rng.normal(KEY, index.to(device), 5, (3, 32, 32))
    assert torch.equal(here, there.cpu())
