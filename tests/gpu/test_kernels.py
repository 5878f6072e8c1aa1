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


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2), ("fp16", 5e-3)])
def test_output_and_gradients_are_those_of_torchs_kernels(
    device: torch.device, precision: str, tolerance: float
) -> None:
    model = network(device)
    assert fused.serve(model, device)
    x = rng.normal(rng.key(0, "x"), torch.arange(8, device=device), 0, (3, 16, 16))
    t = torch.arange(8, device=device) * 100
    places = rng.places(rng.key(0, "dropout"), torch.arange(8, device=device), 7)
    found = []
    for own in (False, True):
        model.set_own_kernels(own)
        model.zero_grad()
        forward = fused.once_cast(model, precision) if own else model
        with autocast(precision, device):
            y = forward(x, t, None, places)
        (y.float() - x).square().mean().backward()
        found.append([y.float().detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + len(list(model.parameters()))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs - ours).norm() <= tolerance * theirs.norm() + 1e-7, theirs.shape


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
