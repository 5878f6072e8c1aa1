"""FLOPs of a network, and the peak FLOP/s of a device."""

from __future__ import annotations

import re

import torch

from ddpm.config.schema import Config
from ddpm.network.build import build_model

META = torch.device("meta")
PEAKS = {
    "B200": (2250.0, 1100.0),
    "GH200": (989.0, 494.0),
    "H200 NVL": (835.0, 417.0),
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "A40": (149.7, 74.8),
    "A30": (165.0, 82.0),
    "A10": (125.0, 62.5),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100-PCIE": (112.0, 14.0),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}
"""Word in a device's name (the first match counts) -> TFLOP/s by the maker's data sheet, without sparsity: in bf16 or
fp16; in fp32, or TF32 where the device has it."""
OTHERS = r"\bMIG\b|\b(?:RTX 3090 Ti|RTX 4090 (?:D|Laptop))\b"
"""Names of what has such a word and computes less or more: a slice of a GPU, or another model."""


def inputs(config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x_t (1, C, H, W), t (1,) and labels (1,), or None without classes, on the meta device."""
    label = torch.zeros(1, dtype=torch.int64, device=META) if config.model.num_classes else None
    x_t = torch.zeros(1, config.network.in_channels, config.data.image_size, config.data.image_size, device=META)
    return x_t, torch.zeros(1, dtype=torch.int64, device=META), label


def forward_flops(config: Config) -> int:
    """Floating-point operations of one image's forward pass in convolutions and matrix products.

    A multiply-add counts as 2. Norms, activations and sums are left out, as is usual.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        build_model(config, META, "off")(*inputs(config))
    return int(counter.get_total_flops())


def peak(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device in bf16 | fp16 | off (fp32); None if it is not known."""
    for name, (half, single) in PEAKS.items() if not re.search(OTHERS, device_name) else ():
        if re.search(rf"\b{name}\b", device_name):
            return 1e12 * (single if precision == "off" else half)
    return None


def utilization(config: Config, device_name: str, precision: str) -> float | None:
    """MFU of training at one image a second on one such device; training takes three forward passes an image. None if
    the device's peak is not known."""
    most = peak(device_name, precision)
    return None if most is None else 3 * forward_flops(config) / most
