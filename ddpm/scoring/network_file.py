"""A network of the user's own, from a file: what `file:PATH` names. Must not know what its features are for."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.config.sample import FILE
from ddpm.errors import RequestError
from ddpm.network.weights import why_unreadable
from ddpm.run import files


def load(path: Path, device: torch.device, image_size: int) -> tuple[Any, str, int]:
    """TorchScript, or what torch.export has saved as .pt2; the sha256 of the file; and the number of features.

    The network takes x (B, 3, H, W) float32 in [0, 1], of the images' own size, with any B, and makes features (B, d).
    Raises RequestError where it does not.
    """
    x = torch.zeros(2, 3, image_size, image_size, device=device)
    try:
        sha256 = files.sha256_file(path)
    except OSError as e:
        raise RequestError(f"{FILE}{path} cannot be used: {e.strerror}") from None
    network = _read(path)
    try:
        network = network.to(device)
        with torch.inference_mode():
            features = network(x)
    except Exception as e:  # anybody's network, read by three libraries
        raise RequestError(f"{FILE}{path} cannot be used: {' '.join(str(e).split())[:300]}") from None
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
        raise RequestError(f"{FILE}{path}: of x {tuple(x.shape)} it makes no features (2, d)")
    return network, sha256, features.shape[1]


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out, and what many have
            return torch.jit.load(path, map_location="cpu").eval()
    except Exception as e:  # zipfile, torch and what torch wraps raise a dozen kinds
        why = "holds something else, as weights alone" if zipfile.is_zipfile(path) else why_unreadable(path, e)
        raise RequestError(
            f"{FILE}{path} cannot be used: it {why}; save the network itself, by torch.jit.script(network).save(FILE), "
            f"or by torch.export.save to a name that ends in .pt2"
        ) from None
