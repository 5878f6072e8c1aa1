"""The network that a config describes, with its initial weights."""

from __future__ import annotations

from dataclasses import asdict

import torch

from ddpm.config.schema import Config
from ddpm.network.unet import UNet


def build_model(config: Config, device: torch.device, precision: str) -> UNet:
    """The configured network on `device`, in training mode, in the memory layout that is fastest for `precision` (fp32,
    bf16, fp16, off). Its initial weights, float32, are a function of the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UNet(fused_attention=device.type == "cuda", **asdict(config.network))
    model = model.to(device)
    if device.type == "cuda" or precision not in ("bf16", "fp16"):
        model = model.to(memory_format=torch.channels_last)
    return model
