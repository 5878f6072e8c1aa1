"""CelebA in miniature, in the layout of the real one: aligned JPEGs of 178x218 pixels, and their lists."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm.config.attributes import HEADER, NAMES

NUM_IMAGES = 60
BORDER_ROWS = 16
"""Rows at top and bottom in another colour: whole blocks of the JPEG, so that nothing of it bleeds into the middle."""


def is_male(i: int) -> bool:
    return i % 2 == 1


def is_smiling(i: int) -> bool:
    return i % 3 == 0


def jpeg(i: int) -> bytes:
    """The i-th image: its number is its shade of red, on it a border of blue."""
    pixels = np.full((218, 178, 3), (4 * i, 255 - 4 * i, 0), np.uint8)
    pixels[:BORDER_ROWS] = pixels[-BORDER_ROWS - 2 :] = (0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def which(images: np.ndarray) -> list[int]:
    """The numbers of packed images."""
    return [round(float(image[..., 0].mean()) / 4) for image in images]


def write_celeba(folder: Path, *, zipped: bool = False, partition: bool = True) -> Path:
    """40 images to train, 10 to validate, 10 to test. Attributes other than Male and Smiling are thrown once."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{i + 1:06d}.jpg" for i in range(NUM_IMAGES)]
    rows = []
    for i, name in enumerate(names):
        bits = dict(zip(NAMES, rng.integers(0, 2, len(NAMES)), strict=True), Male=is_male(i), Smiling=is_smiling(i))
        rows.append(f"{name} " + " ".join(" 1" if bits[n] else "-1" for n in NAMES))
    (folder / "list_attr_celeba.txt").write_text(f"{NUM_IMAGES}\n{HEADER} \n" + "\n".join(rows) + "\n")
    if partition:
        lines = [f"{name} {0 if i < 40 else 1 if i < 50 else 2}\n" for i, name in enumerate(names)]
        (folder / "list_eval_partition.txt").write_text("".join(lines))
    if zipped:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for i, name in enumerate(names):
                archive.writestr(f"img_align_celeba/{name}", jpeg(i))
    else:
        (folder / "img_align_celeba").mkdir()
        for i, name in enumerate(names):
            (folder / "img_align_celeba" / name).write_bytes(jpeg(i))
    return folder
