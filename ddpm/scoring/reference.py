"""What samples are compared with: the statistics of a reference's features, kept on disk and read from files.

Owns pytorch-fid's .npz, read and written, and the cache of references by images and extractor. Must not know sample
sets or runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.data.packed import PackedImages
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.log import say
from ddpm.run.stopping import StopRequested
from ddpm.sampling.shards import npz_bytes, parse_npz
from ddpm.scoring import metrics
from ddpm.scoring.extractors import Extractor
from ddpm.scoring.features import extract
from ddpm.scoring.metrics import Moments

_CHUNK_IMAGES = 1024
"""Images whose features are held at once; part of the definition of a reference's rounding, so a constant."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: mu float64 (d,), sigma float64 (d, d), and where they come from."""

    mu: np.ndarray
    sigma: np.ndarray
    record: dict[str, Any]
    """{"name", "split", "num_images", "digest"} of the score record; null where a file does not say."""


def image_moments(
    images: np.ndarray,
    extractor: Extractor,
    *,
    stop_requested: StopRequested = lambda: None,
) -> Moments:
    """Moments of the features of images uint8 (n, H, W, 3)."""
    if len(images) < 2:
        raise RequestError(f"{len(images)} images: a score needs at least 2 on each side")
    total: Moments | None = None
    for first in range(0, len(images), _CHUNK_IMAGES):
        chunk = images[first : first + _CHUNK_IMAGES]
        moments = metrics.from_features(extract(extractor, chunk, stop_requested=stop_requested))
        total = moments if total is None else metrics.merge(total, moments)
    assert total is not None
    return total


def reference_moments(
    images: PackedImages,
    extractor: Extractor,
    cache_dir: Path,
    *,
    stop_requested: StopRequested = lambda: None,
    token: str = "",
) -> Reference:
    """Statistics of a dataset, kept in `cache_dir` under (digest of the images, digest of the extractor).

    The file is an .npz that pytorch-fid reads. A damaged one is computed again, and said.
    """
    path = cache_dir / f"reference-{images.digest[:20]}-{extractor.digest[:20]}.npz"
    try:
        arrays = parse_npz(path.read_bytes(), path.name)
        identity = [str(arrays.get(k)) for k in ("images_digest", "extractor_digest")]
        if identity != [images.digest, extractor.digest] or int(arrays["num"]) != len(images.images):
            raise DamagedFile(f"{path.name}: is of other images or another extractor")
        return Reference(arrays["mu"], arrays["sigma"], image_record(images))
    except FileNotFoundError:
        say(f"reference={path} images={len(images.images)} computing its statistics")
    except (DamagedFile, KeyError) as e:
        say(f"reference={path} damaged, computing it again: {e}")
    moments = image_moments(images.images, extractor, stop_requested=stop_requested)
    digests = {"images_digest": images.digest, "extractor_digest": extractor.digest}
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_statistics(path, moments, images.name, replace=True, token=token, **digests)
    except OSError as e:  # another's cache, or a full one
        say(f"reference={path} not kept: {e}")
    return Reference(moments.mean, metrics.covariance(moments), image_record(images))


def image_record(images: PackedImages) -> dict[str, Any]:
    """`Reference.record` of a dataset."""
    return {"name": images.name, "split": images.split, "num_images": len(images.images), "digest": images.digest}


def write_statistics(
    path: Path, moments: Moments, name: str, *, replace: bool = False, token: str = "", **extra: str
) -> None:
    """Write pytorch-fid's .npz (mu, sigma) with `num`, `name` and `extra` beside, which it ignores."""
    arrays = {"mu": moments.mean, "sigma": metrics.covariance(moments), "num": np.int64(moments.num)}
    data = npz_bytes(**arrays, name=name, **extra)
    files.write_bytes(path, data, replace=replace, token=token)


def read_statistics(path: Path, extractor: Extractor) -> Reference:
    """The statistics in an .npz of ours or of pytorch-fid (keys mu, sigma). Nothing is unpickled.

    Raises RequestError if the file is missing, no such file, or says that it is another extractor's.
    """
    try:
        data = path.read_bytes()
        arrays = parse_npz(data, path.name)
    except (OSError, DamagedFile) as e:
        raise RequestError(f"reference {path} cannot be read: {e}") from None
    mu, sigma, d = arrays.get("mu"), arrays.get("sigma"), extractor.dim
    if mu is None or sigma is None:
        raise RequestError(
            f"reference {path}: holds {sorted(arrays)}; pytorch-fid's statistics hold mu and sigma "
            f"(`python -m pytorch_fid --save-stats FOLDER FILE.npz` makes them)"
        )
    if mu.shape != (d,) or sigma.shape != (d, d) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise RequestError(
            f"reference {path}: mu {mu.shape} and sigma {sigma.shape} must be finite, ({d},) and "
            f"({d}, {d}) for evaluate.extractor={extractor.name}"
        )
    if "extractor_digest" in arrays and str(arrays["extractor_digest"]) != extractor.digest:
        raise RequestError(
            f"reference {path}: was made with another extractor, or other weights, than "
            f"evaluate.extractor={extractor.name}; give the images themselves"
        )
    record = {
        "name": str(arrays.get("name", path.stem)),
        "split": None,
        "num_images": int(arrays["num"]) if "num" in arrays else None,
        "digest": hashlib.sha256(data).hexdigest(),
    }
    return Reference(mu.astype(np.float64), sigma.astype(np.float64), record)
