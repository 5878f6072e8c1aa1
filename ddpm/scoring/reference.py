"""The statistics of a reference's features, cached on disk by images and extractor.

The files are .npz that pytorch-fid reads; those that others give are read in statistics_file.py. Must not know sample
sets or runs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.data.packed import PackedImages
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.claims import ALONE, Worker
from ddpm.run.files import DamagedFile
from ddpm.run.log import counted, say
from ddpm.run.stopping import ShowProgress
from ddpm.sampling.shards import npz_bytes, read_npz
from ddpm.scoring import metrics
from ddpm.scoring.extractors import Extractor
from ddpm.scoring.features import extract, keep_all, kept_features
from ddpm.scoring.gather import Gathered, gather
from ddpm.scoring.metrics import Moments
from ddpm.scoring.record import PART_IMAGES


@dataclass(frozen=True)
class Reference:
    """A reference: mu float64 (d,), sigma float64 (d, d), and where they come from."""

    mu: np.ndarray
    sigma: np.ndarray
    record: dict[str, Any]
    """{"name", "split", "num_images", "digest"} for the score record; None for what a file does not say."""
    features: np.ndarray | None = None
    """Features float32 (n, d), those of manifold.chosen; None if only statistics are known."""
    classes: list[Moments | None] = field(default_factory=list)
    """Moments by label, if they were asked for."""


# ---------------------------------------------------------------- images


def image_features(
    images: np.ndarray,
    extractor: Extractor,
    progress: ShowProgress,
    worker: Worker = ALONE,
) -> Iterator[np.ndarray]:
    """Features of images uint8 (n, H, W, 3), in parts."""
    if len(images) < 2:
        raise RequestError(f"{counted(len(images), 'image')}: a score needs at least 2 on each side")
    for first in range(0, len(images), PART_IMAGES):
        yield extract(extractor, images[first : first + PART_IMAGES], stop_requested=worker.stop_requested)
        progress(min(first + PART_IMAGES, len(images)), len(images))


def of_gathered(gathered: Gathered, record: dict[str, Any]) -> Reference:
    moments = gathered.moments
    return Reference(moments.mean, metrics.covariance(moments), record, gathered.chosen, gathered.classes)


def _identity(images: PackedImages, extractor: Extractor) -> dict[str, str]:
    """What features or their statistics are of."""
    return {"images_digest": images.digest, "extractor_digest": extractor.digest}


def reference_of(
    images: PackedImages,
    extractor: Extractor,
    cache_dir: Path | None,
    *,
    by_class: bool = False,
    progress: ShowProgress = lambda done, total: None,
    worker: Worker = ALONE,
) -> Reference:
    """Statistics of a dataset, kept in `cache_dir` under (digest of the images, digest of the extractor).

    The file is an .npz that pytorch-fid reads. Features are kept in parts beside it: a stop loses little, and
    statistics by class are made of them, and processes that compute them at once share the parts. What is damaged is
    computed again, and said. cache_dir None: nothing is kept. progress(done, total): of images, whenever features of
    some are there. Raises Stopped, OthersAtWork.
    """
    if cache_dir is None:
        features = image_features(images.images, extractor, progress, worker)
        return of_gathered(gather(features, len(images), grouped=False), image_record(images))
    path = cache_dir / f"reference-{images.digest[:20]}-{extractor.digest[:20]}.npz"
    identity = _identity(images, extractor)
    if not by_class:
        try:
            arrays, _ = read_npz(path)
            if {k: str(arrays.get(k)) for k in identity} != identity or int(arrays["num"]) != len(images.images):
                raise DamagedFile(f"{path.name}: is of other images or another extractor")
            return Reference(arrays["mu"], arrays["sigma"], image_record(images), arrays["features"])
        except FileNotFoundError:
            say(f"reference={path} images={len(images.images)} computing its statistics")
        except (DamagedFile, KeyError, TypeError, ValueError) as e:  # KeyError: from before features were kept
            say(f"reference={path} not usable, computing it again: {e}")
    num = len(images.images)
    if num < 2:
        raise RequestError(f"{images.name}: {counted(num, 'image')}: a score needs at least 2 on each side")
    classes: dict[str, Any] = {"labels": images.labels, "num_classes": len(images.classes)} if by_class else {}
    parts = path.with_suffix("")
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if not os.access(parts, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parts))
    except OSError as e:  # another's cache
        say(f"reference={path} not kept: {e}")
        made = image_features(images.images, extractor, progress, worker)
        return of_gathered(gather(made, num, grouped=False, **classes), image_record(images))
    features = kept_in_parts(parts, images, extractor, progress, worker)
    made_of = of_gathered(gather(features, num, grouped=False, **classes), image_record(images))
    write_statistics(path, made_of, replace=True, token=worker.token, **identity)
    return made_of


def kept_in_parts(
    directory: Path,
    images: PackedImages,
    extractor: Extractor,
    progress: ShowProgress,
    worker: Worker = ALONE,
) -> Iterator[np.ndarray]:
    """Features of a dataset, in parts that are kept in `directory`, and shared among the processes that make them.

    All are there when this returns. Raises OthersAtWork, Stopped.
    """

    parts = [images.images[first : first + PART_IMAGES] for first in range(0, len(images), PART_IMAGES)]
    identity = _identity(images, extractor)
    places = {
        index: (directory / f"features-{index:05d}.npy", {"part": index, "num": len(part), **identity})
        for index, part in enumerate(parts)
    }

    def features_of(index: int) -> np.ndarray:
        return kept_features(*places[index], parts[index], extractor, worker)

    def show(there: set[int]) -> None:
        progress(sum(len(parts[index]) for index in there), len(images))

    keep_all(directory, places, features_of, show, worker)
    return map(features_of, places)


def check_size(images: PackedImages, size: int) -> None:
    """Raise RequestError if a reference's images have another size than the samples: the score would measure that."""
    height, width = images.images.shape[1:3]
    if (height, width) != (size, size):
        raise RequestError(
            f"reference = {images.name}: its images are {height}x{width}, the samples {size}x{size}; statistics of "
            f"them at that size can be one: `evaluate.py --images {images.name} --size {size} --save-stats FILE.npz`"
        )


def image_record(images: PackedImages) -> dict[str, Any]:
    """`Reference.record` of a dataset."""
    return {"name": images.name, "split": images.split, "num_images": len(images.images), "digest": images.digest}


# ---------------------------------------------------------------- files


def write_statistics(path: Path, of: Reference, *, replace: bool = False, token: str = "", **extra: str) -> None:
    """Write pytorch-fid's .npz (mu, sigma) with `num`, `name`, `features` and `extra` beside, which it ignores."""
    arrays = {"mu": of.mu, "sigma": of.sigma, "num": np.int64(of.record["num_images"])}
    data = npz_bytes(**arrays, features=of.features, name=of.record["name"], **extra)
    files.write_bytes(path, data, replace=replace, token=token)


def publish_statistics(path: Path, of: Reference, images: PackedImages, extractor: Extractor, token: str = "") -> None:
    """Write the statistics to a user's path, unless the same are there already. Raises RequestError for another
    file."""
    identity = _identity(images, extractor)
    try:
        write_statistics(path, of, replace=False, token=token, **identity)
    except FileExistsError:
        with suppress(OSError, DamagedFile):
            arrays, _ = read_npz(path)
            if {k: str(arrays.get(k)) for k in identity} == identity:
                return
        raise RequestError(f"{path}: exists, and is left as it is; name another file, or remove it") from None
