"""Images that tests train on: made here in a second, so that no test needs a download."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_zip(
    path: Path, *, num_images: int = 400, size: int = 16, splits: tuple[str, ...] = ("train", "test")
) -> Path:
    """A zip of SPLIT/CLASS/NNNN.png: two classes of noisy colour gradients, the same bytes each time."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 160, size)
    with zipfile.ZipFile(path, "w") as archive:
        for split in splits:
            for i in range(num_images if split == "train" else num_images // 4):
                kind = ("across", "down")[i % 2]
                base = ramp[None, :, None] if kind == "across" else ramp[:, None, None]
                pixels = base + rng.integers(0, 96, size=(1, 1, 3)) * np.ones((size, size, 1))
                buffer = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
                archive.writestr(zipfile.ZipInfo(f"{split}/{kind}/{i:04d}.png"), buffer.getvalue())
    return path
