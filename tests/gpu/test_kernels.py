"""The network by this project's kernels is the network by torch's, and a replayed evaluation is one that is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddpm.diffusion import rng
from ddpm.network import fused
from ddpm.network.device import autocast
from ddpm.network.unet import UNet
from ddpm.network.weights import cast_once
from ddpm.sampling.denoiser import Replays, eps_of


def network(device: torch.device) -> UNet:
    torch.manual_seed(0)
    model = UNet(image_size=16, base_channels=64, channel_mults=(1, 2, 3), attention_resolutions=(8,), dropout=0.2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05) if not p.any() else None
    return model.to(device).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_output_and_gradients_are_as_near_to_the_exact_ones_as_those_of_torchs_kernels(
    device: torch.device, precision: str
) -> None:
    model = network(device)
    assert fused.serve(model, device)
    x = rng.normal(rng.key(0, "x"), torch.arange(8, device=device), 0, (3, 16, 16))
    t = torch.arange(8, device=device) * 100
    places = rng.places(rng.key(0, "dropout"), torch.arange(8, device=device), 7)

    def found(own: bool, precision: str, dtype: torch.dtype) -> list[torch.Tensor]:
        model.to(dtype).set_own_kernels(own)
        model.zero_grad()
        forward = fused.for_training(model, precision) if own else model
        with autocast(precision, device):
            y = forward(x.to(dtype), t, None, places)
        (y.float() - x).square().mean().backward()
        return [y.double().detach(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]

    theirs = found(False, precision, torch.float32)
    ours = found(True, precision, torch.float32)
    exact = found(False, "fp32", torch.float64)
    assert len(exact) == len(ours) == 1 + len(list(model.parameters()))
    for e, a, b in zip(exact, theirs, ours, strict=True):
        assert (b - e).norm() <= 2 * (a - e).norm() + 1e-6 * e.norm(), (tuple(e.shape), (a - e).norm(), (b - e).norm())


def test_replayed_evaluations_have_the_bits_of_others(device: torch.device) -> None:
    model = network(device).eval()
    model.set_own_kernels(True)
    cast_once(model, "bf16")
    eps = eps_of(model, "bf16")
    replays = Replays(eps)
    for i in range(5):
        with torch.inference_mode():
            x = rng.normal(rng.key(0, "x"), torch.arange(8, device=device), i, (3, 16, 16))
            t = torch.full((8,), 10 * i, device=device)
            assert torch.equal(replays(x, t, None), eps(x, t, None)), i
    assert list(replays._recorded.values()) != [None] and replays._recorded
