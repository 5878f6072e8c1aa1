"""Samples as arrays, tensors or PIL pictures; and a grid of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm.errors import RequestError, shown
from ddpm.run.images import tile

OUTPUTS = ("numpy", "torch", "pil")


def check_output(output: str) -> None:
    """Raise RequestError for what is not one of OUTPUTS."""
    if output not in OUTPUTS:
        raise RequestError(f"output = {output!r}: use one of {', '.join(OUTPUTS)}")


def as_output(images: np.ndarray, output: str) -> np.ndarray | Tensor | list[Image.Image]:
    """Images uint8 (N, H, W, 3) as one of OUTPUTS. torch: uint8 (N, 3, H, W) on the CPU; pil: N pictures, RGB."""
    check_output(output)
    if output == "torch":
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return [Image.fromarray(image) for image in images] if output == "pil" else images


def grid(images: np.ndarray | Tensor | Sequence[Any], columns: int | None = None) -> Image.Image:
    """Images as one RGB picture, row by row with a thin line between them; small ones are enlarged by a whole factor.

    images: uint8 (N, H, W, 3), a tensor uint8 (N, 3, H, W), or a sequence of PIL pictures of one size: what
    `Model.sample` returns. columns: by default as many as make a square. RequestError for anything else.
    """
    array = _as_array(images)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
        raise RequestError(
            f"images of shape {array.shape} and type {array.dtype}: must be uint8 (N, H, W, 3), a tensor uint8 "
            f"(N, 3, H, W), or PIL pictures of one size"
        )
    if columns is not None and (isinstance(columns, bool) or not isinstance(columns, int | np.integer) or columns < 1):
        raise RequestError(f"columns = {shown(columns)}: must be a whole number of at least 1")
    return Image.fromarray(tile(array, columns=columns))


def _as_array(images: np.ndarray | Tensor | Sequence[Any]) -> np.ndarray:
    if isinstance(images, Tensor):
        return images.movedim(-3, -1).cpu().numpy() if images.ndim >= 3 else images.cpu().numpy()
    if not isinstance(images, np.ndarray):
        images = [np.asarray(x.convert("RGB")) if isinstance(x, Image.Image) else np.asarray(x) for x in images]
        if len({image.shape for image in images}) > 1:
            raise RequestError("images: these are of several sizes; a grid needs one")
    return np.asarray(images)
