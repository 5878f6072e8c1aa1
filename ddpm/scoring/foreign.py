"""Scores images that no run made: a folder, a zip, an .npz or an .npy.

Owns the check that all images of a set have one size. Must not know runs or sample sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm.data import sources
from ddpm.data.packed import PackedImages, load_folder
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.stopping import ShowProgress
from ddpm.scoring.extractors import Extractor
from ddpm.scoring.gather import Gathered, gather
from ddpm.scoring.reference import (
    image_features,
    image_record,
    kept_in_parts,
    of_gathered,
    publish_statistics,
    reference_of,
)
from ddpm.scoring.scores import all_scores
from ddpm.scoring.statistics_file import read_statistics


def load_images(path: Path, size: int | None = None) -> PackedImages:
    """The images of a folder, a zip or an array file.

    size: crop and resize them to this many pixels, as for packed data; None: keep them, which must all have one size.
    Raises RequestError.
    """
    try:
        return load_folder(path, size)
    except RequestError as e:
        all_of_it = "\n  (a score is of all images of a folder: to score the others alone, move these out of it)"
        raise RequestError(f"{e}{all_of_it if 'cannot be decoded' in str(e) else ''}") from None


# ---------------------------------------------------------------- their scores


def evaluate_images(
    images: PackedImages,
    reference: Path,
    extractor: Extractor,
    size: int | None = None,
    keep: Path | None = None,
    progress: ShowProgress = lambda done, total: None,
) -> dict[str, Any]:
    """Score a set of images against another, or against an .npz of statistics.

    size: what `images` were cropped and resized to, and the reference's are; the record says how. keep: a directory for
    features, in parts: a broken-off evaluation goes on, and processes that are given the same one share the work; None:
    nothing is written.
    """
    file = read_statistics(reference) if reference.suffix == ".npz" else None
    if file is not None and "mu" in file.arrays:
        if file.images is not None:
            _check_one_size(images, file.images, reference, "resize one side")
        against = file.reference(extractor, keep)
    else:
        file = None  # which may hold all of them
        others = load_images(reference, size)
        _check_one_size(images, others, reference, "give --size for both")
        against = reference_of(others, extractor, keep, progress=progress)
    return {
        **all_scores(gather_images(images, extractor, keep, progress), against, published=extractor.published),
        "num_samples": len(images),
        **({} if size is None else {"resized": {"size": size, **sources.RESIZE}}),
        "reference": against.record,
        "extractor": extractor.record,
        "created": files.now(),
    }


def _check_one_size(images: PackedImages, others: PackedImages, reference: Path, way_on: str) -> None:
    sizes = [f"{h}x{w}" for h, w in (side.images.shape[1:3] for side in (images, others))]
    if sizes[0] != sizes[1]:
        raise RequestError(f"{images.name} holds images of {sizes[0]}, {reference} of {sizes[1]}; {way_on}")


def gather_images(images: PackedImages, extractor: Extractor, keep: Path | None, progress: ShowProgress) -> Gathered:
    if keep is None or len(images) < 2:
        features = image_features(images.images, extractor, progress)
    else:
        parts = keep / f"images-{images.digest[:20]}-{extractor.digest[:20]}"
        parts.mkdir(parents=True, exist_ok=True)
        features = kept_in_parts(parts, images, extractor, progress)
    return gather(features, len(images), classifier=extractor.classifier)


def save_statistics(
    images: PackedImages,
    path: Path,
    extractor: Extractor,
    keep: Path | None = None,
    progress: ShowProgress = lambda done, total: None,
) -> None:
    """Write a set's statistics as pytorch-fid's .npz, with its features beside.

    Raises RequestError where `path` is there already, or is in no directory.
    """
    of = of_gathered(gather_images(images, extractor, keep, progress), image_record(images))
    publish_statistics(path, of, images, extractor)
