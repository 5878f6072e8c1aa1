"""Datasets that a Python package brings: CIFAR-10 by torchvision, which downloads it, and scikit-learn's digits."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ddpm.data.decoding import to_square
from ddpm.errors import EnvironmentLacks


def read_digits(size: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, as RGB."""
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise EnvironmentLacks("data.name=digits needs scikit-learn: pip install 'ddpm-hpc[digits]'") from None
    bunch = load_digits()
    for image, label in zip(bunch.images, bunch.target, strict=True):
        yield to_square(Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)), size), int(label)


def read_cifar10(root: Path, split: str, size: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """The original CIFAR-10 (Krizhevsky 2009), downloaded and MD5-checked by torchvision."""
    from PIL import Image
    from torchvision.datasets import CIFAR10

    try:
        root.mkdir(parents=True, exist_ok=True)
        dataset = CIFAR10(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as e:
        raise EnvironmentLacks(
            f"CIFAR-10 could not be had from {CIFAR10.url} ({e}); on a machine with a network put {CIFAR10.filename} "
            f"into {root}, or give another copy: data.path=FOLDER_OR_ZIP_OF_IMAGES"
        ) from None
    for image, label in zip(dataset.data, dataset.targets, strict=True):
        yield to_square(Image.fromarray(image), size), int(label)
