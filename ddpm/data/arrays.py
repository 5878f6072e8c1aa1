"""Writes the arrays of a packed dataset, one image at a time, as .npy files with their digests.

Must not know where images come from, nor where the dataset will be.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.data.labels import labels_digest
from ddpm.data.whole import digest_head
from ddpm.errors import RequestError
from ddpm.run.files import sign, write_json

Item = tuple[np.ndarray, int]
"""An image, uint8 (H, W, 3), and its label."""


def write_arrays(where: Path, items: Iterator[Item], shape: tuple[int, ...], classes: Sequence[str]) -> dict[str, Any]:
    """Write images.npy, labels.npy and labels.json into `where`, one image at a time: CelebA at 128x128 is 8 GB.

    Returns what meta.json records of the images. The labels' digest has its own file, labels.json, because it is added
    to old caches that have none.
    """
    labels = []
    digest = hashlib.sha256(digest_head(np.dtype(np.uint8), shape))
    with (where / "images.npy").open("wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for image, label in items:
            digest.update(image.tobytes())
            f.write(image.tobytes())
            labels.append(label)
        num_bytes = f.tell()
        f.flush()
        os.fsync(f.fileno())
    if len(labels) != shape[0]:  # some were left out
        shape = (len(labels), *shape[1:])
        digest = _shortened(where / "images.npy", shape, num_bytes)
    indices = np.asarray(labels, dtype=np.int64)
    with (where / "labels.npy").open("wb") as f:
        np.save(f, indices)
        f.flush()
        os.fsync(f.fileno())
    write_json(where / "labels.json", sign({"digest": labels_digest(indices, classes)}))
    return {"num_images": len(labels), "shape": list(shape), "digest": digest.hexdigest(), "bytes": num_bytes}


def _shortened(path: Path, shape: tuple[int, ...], num_bytes: int) -> Any:
    """Correct the number of images in the header of images.npy, and return its digest. RequestError if it is 0."""
    if not shape[0]:
        raise RequestError("data.skip_damaged=true: not one image can be decoded; leave it out to see why")
    with path.open("r+b") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
        header = f.tell()
        assert header + math.prod(shape) == num_bytes, "a header that has grown"
        os.fsync(f.fileno())
        digest = hashlib.sha256(digest_head(np.dtype(np.uint8), shape))
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest
