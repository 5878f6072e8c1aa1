"""ddpm/run/images.py: pictures of a run."""

import numpy as np

from ddpm.run.images import tile


def test_a_grid_shows_every_image_once_in_rows() -> None:
    images = np.zeros((5, 8, 8, 3), np.uint8) + np.arange(1, 6, dtype=np.uint8)[:, None, None, None]
    grid = tile(images, at_least_pixels=8)
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    values, counts = np.unique(grid, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True))[1] == 64 * 3
    assert [grid[2 + 10 * (i // 3), 2 + 10 * (i % 3), 0] for i in range(5)] == [1, 2, 3, 4, 5]
    assert set(values.tolist()) == {1, 2, 3, 4, 5, 96}
    assert tile(images, columns=5, at_least_pixels=8).shape == (10 + 2, 5 * 10 + 2, 3)
