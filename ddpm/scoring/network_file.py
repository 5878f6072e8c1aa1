"""A network of the user's own, from a file: what `file:PATH` names. Must not know what its features are for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.config.sample import FILE
from ddpm.errors import RequestError
from ddpm.run import files


def load(path: Path, device: torch.device, image_size: int) -> tuple[Any, str, int]:
    """TorchScript, or what torch.export has saved as .pt2; the sha256 of the file; and the number of features.

    The network takes x (B, 3, H, W) float32 in [0, 1], of the images' own size, with any B, and makes features (B, d).
    Raises RequestError where it does not.
    """
    x = torch.zeros(2, 3, image_size, image_size, device=device)
    try:
        sha256 = files.sha256_file(path)
        if path.suffix == ".pt2":
            network: Any = torch.export.load(path).module()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out, and what many have
                network = torch.jit.load(path, map_location="cpu").eval()
        network = network.to(device)
        with torch.inference_mode():
            features = network(x)
    except Exception as e:  # anybody's network, read by three libraries
        raise RequestError(f"{FILE}{path} cannot be used: {' '.join(str(e).split())[:300]}") from None
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
        raise RequestError(f"{FILE}{path}: of x {tuple(x.shape)} it makes no features (2, d)")
    return network, sha256, features.shape[1]
