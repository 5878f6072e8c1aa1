"""Images that tests train on: made here in a second, so that no test needs a download."""

from __future__ import annotations

import io
import os
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


NUM_KINDS = 10


def picture(i: int) -> np.ndarray:
    """The i-th of endless pictures, uint8 (32, 32, 3): a disc on a ramp of two colours, with stripes over both.

    There are NUM_KINDS kinds, i % NUM_KINDS, by the number of stripes; colours, places and contrasts vary freely, so
    that edges, areas and texture have to be told from noise as in a photograph.
    """
    rng = np.random.default_rng(i)
    y, x = np.mgrid[:32, :32] / 32
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x * np.cos(angle) + y * np.sin(angle) + 1.5)[..., None] / 3
    one, other, disc = rng.uniform(0, 255, (3, 3))
    pixels = one * ramp + other * (1 - ramp)
    middle_x, middle_y, radius = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.15, 0.4)
    pixels = np.where(np.hypot(x - middle_x, y - middle_y)[..., None] < radius, disc, pixels)
    stripes = np.sin(2 * np.pi * (1 + i % NUM_KINDS) * (x * np.sin(angle) + y * np.cos(angle)))
    return (pixels + rng.uniform(5, 40) * stripes[..., None]).clip(0, 255).astype(np.uint8)


def given_or_made(where: Path) -> Path:
    """Images to train on, a folder or zip with ten classes: $DDPM_TEST_IMAGES, else a zip of pictures in `where`."""
    if given := os.environ.get("DDPM_TEST_IMAGES"):
        return Path(given)
    path = where / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(1000):
            buffer = io.BytesIO()
            Image.fromarray(picture(i)).save(buffer, format="PNG")
            archive.writestr(zipfile.ZipInfo(f"train/{i % NUM_KINDS}/{i:04d}.png"), buffer.getvalue())
    return path
