"""Pictures of a run: a grid of small images, and a PNG written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm.run.files import publishing


def write_png(path: Path, image: np.ndarray, *, may_publish: Callable[[], None] | None = None) -> None:
    """Write uint8 (H, W, 3) as a PNG, whole or not at all, replacing an earlier one."""
    path.parent.mkdir(exist_ok=True)  # never the run itself, which may have been moved away
    with publishing(path, replace=True, may_publish=may_publish) as f:
        Image.fromarray(image).save(f, format="PNG")  # type: ignore[arg-type]  # write() is all it needs


def read_png(path: Path) -> np.ndarray:
    """A PNG as an array, uint8. Raises OSError, also if the file is damaged."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (SyntaxError, ValueError) as e:  # what Pillow calls some damages
        raise OSError(f"{path}: {e}") from None


def tile(images: np.ndarray, *, columns: int | None = None, at_least_pixels: int = 64) -> np.ndarray:
    """Images uint8 (N, H, W, 3) as one grid, a thin line apart; small ones are enlarged by a whole factor.

    columns: as many as make a square unless given.
    """
    n, height, width, channels = images.shape
    factor = max(1, at_least_pixels // height)
    line = max(2, factor // 2)
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = int(np.ceil(n / columns))
    high, wide = height * factor + line, width * factor + line
    grid = np.full((rows * high + line, columns * wide + line, channels), 96, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * high + line, i % columns * wide + line
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid
