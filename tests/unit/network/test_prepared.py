"""ddpm/network/prepared.py: parameters cast together give the bits of autocast, and what becomes of their gradients."""

from __future__ import annotations

import torch
from torch import nn

from ddpm.network.device import autocast
from ddpm.network.prepared import Prepared
from ddpm.network.unet import UNet

CPU = torch.device("cpu")


def network() -> UNet:
    torch.manual_seed(0)
    model = UNet(image_size=8, base_channels=16, channel_mults=(1, 2), attention_resolutions=(4,), dropout=0.0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05) if not p.any() else None
    return model.to(memory_format=torch.channels_last)


def found(model: UNet, forward: object) -> list[torch.Tensor]:
    model.zero_grad()
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    with autocast("bf16", CPU):
        y = forward(x, t)  # type: ignore[operator]
    y.float().square().mean().backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_it_gives_the_bits_of_autocast() -> None:
    model = network()
    theirs, ours = found(model, model), found(model, Prepared(model, "bf16"))
    assert len(ours) == len(theirs) == 1 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradients_are_those_of_the_parameters_or_on_demand_kept_as_narrow_as_they_are() -> None:
    model = network()
    prepared = Prepared(model, "bf16")
    wide = dict(zip(model.parameters(), found(model, prepared)[1:], strict=True))
    with prepared.narrow_gradients() as narrow:
        found(model, prepared)
    assert narrow.keys() == {p for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters()}
    for p, gradient in wide.items():
        if p in narrow:
            assert p.grad is None and narrow[p].dtype == torch.bfloat16 and torch.equal(narrow[p].float(), gradient)
        else:
            assert torch.equal(p.grad, gradient)
    found(model, prepared)
    assert all(torch.equal(p.grad, gradient) for p, gradient in wide.items())


def test_in_float32_nothing_is_narrow() -> None:
    model = network()
    prepared = Prepared(model, "off")
    with prepared.narrow_gradients() as narrow:
        found(model, prepared)
    assert not narrow and all(p.grad is not None for p in model.parameters())
