"""An .npz to compare samples with: pytorch-fid's statistics, ours, or a batch of guided-diffusion's.

Owns what such a file must hold; whoever has read one need not guard against it. Must not know sample sets or runs.
Loads no torch before features are needed: a wrong file is refused on a login node.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm.data import array_file
from ddpm.data.packed import PackedImages, images_digest
from ddpm.errors import RequestError, shown
from ddpm.run.claims import ALONE, Worker
from ddpm.run.files import DamagedFile
from ddpm.sampling.shards import read_npz

if TYPE_CHECKING:
    from ddpm.scoring.extractors import Extractor
    from ddpm.scoring.reference import Reference

_SINGLE = np.finfo(np.float32)
"""Features have this type, which bounds their means and gives the size of rounding errors."""


@dataclass(frozen=True)
class StatisticsFile:
    """A statistics file that was read and checked; mu and sigma, if present, are float64."""

    path: Path
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]
    images: PackedImages | None
    """Images in the file, under one of array_file.IMAGES (guided-diffusion's arr_0); else None."""

    def reference(self, extractor: Extractor, cache_dir: Path | None, worker: Worker = ALONE) -> Reference:
        """With features of its images, where it has some: they are kept in `cache_dir`.

        A batch's own mu and sigma, which are Inception's and of more images than it holds, count for `inception`.
        Raises RequestError where it says that it is another extractor's, or does not fit this one.
        """
        from ddpm.scoring.reference import Reference, reference_of

        of_images = None
        if self.images is not None:
            of_images = reference_of(self.images, extractor, cache_dir, worker=worker)
            if not self._moments_count_for(extractor.name):
                return Reference(of_images.mu, of_images.sigma, self.record, of_images.features)
        self.check_fits(extractor.name, extractor.dim)
        mu, sigma = self.arrays["mu"], self.arrays["sigma"]
        digest = self.arrays.get("extractor_digest")
        if digest is not None and str(digest) != extractor.digest:
            raise RequestError(
                f"reference {self.path}: was made with another extractor, or other weights, than "
                f"evaluate.extractor={extractor.name}; give the images themselves, or write them anew with that one: "
                f"`evaluate.py --images THEM --extractor … --save-stats FILE.npz`"
            )
        features = of_images.features if of_images else self.arrays.get("features") if digest is not None else None
        return Reference(mu, sigma, self.record, features)

    def _moments_count_for(self, extractor: str) -> bool:
        return "mu" in self.arrays and (self.images is None or extractor == "inception")

    def check_fits(self, extractor: str, d: int | None) -> None:
        """Raise RequestError if its mu and sigma count for that extractor, whose features have d dimensions (None: not
        known yet), and have other ones."""
        if d is None or not self._moments_count_for(extractor) or self.arrays["mu"].shape == (d,):
            return
        mu, sigma = self.arrays["mu"], self.arrays["sigma"]
        raise RequestError(
            f"reference {self.path}: mu {mu.shape} and sigma {sigma.shape} must be ({d},) and ({d}, {d}) for "
            f"evaluate.extractor={extractor}; give the images themselves, or choose the --extractor that it was made "
            f"with"
        )


def read_statistics(path: Path) -> StatisticsFile:
    """The statistics in an .npz of ours or of pytorch-fid (keys mu, sigma), or the images in one of guided-diffusion's
    batches (arr_0; mu and sigma where they are there). Nothing is unpickled.

    Raises RequestError if the file cannot be read, holds neither, or holds what no images can have.
    """
    try:
        arrays, data = read_npz(path)
    except (OSError, DamagedFile) as e:
        raise RequestError(f"reference {path} cannot be read: {e}") from None
    batch = next((arrays[key] for key in array_file.IMAGES if key in arrays), None)
    is_batch = batch is not None and batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[-1] == 3 and batch.size
    has_moments = "mu" in arrays and "sigma" in arrays
    if not has_moments and not is_batch:
        shape = "" if batch is None else f" ({batch.dtype} {batch.shape})"
        raise RequestError(
            f"reference {path}: holds {shown(sorted(arrays))}{shape}; pytorch-fid's statistics hold mu and sigma "
            f"(`--save-stats` writes them, here and there), a batch of guided-diffusion's arr_0, uint8 (N, H, W, 3)"
        )
    if has_moments:
        checked, wrong = _moments(arrays)
        if wrong or (wrong := _wrong_beside(arrays)):
            raise RequestError(
                f"reference {path}: {wrong}; these are no statistics of images: write them anew (`--save-stats`), or "
                f"give the images"
            )
        arrays |= checked
    elif wrong := _wrong_count(arrays):
        raise RequestError(f"reference {path}: {wrong}")
    name = _name(arrays, path)
    images = None
    if is_batch and batch is not None:
        images = PackedImages(batch, np.zeros(len(batch), np.int64), name, "all", images_digest(batch))
    num = int(arrays["num"]) if "num" in arrays else len(batch) if batch is not None and not has_moments else None
    record = {"name": name, "split": None, "num_images": num, "digest": hashlib.sha256(data).hexdigest()}
    return StatisticsFile(path, arrays, record, images)


def _name(arrays: dict[str, np.ndarray], path: Path) -> str:
    """The file's own name for itself, as text."""
    said = arrays.get("name")
    name = str(said) if said is not None and said.dtype.kind == "U" and said.shape == () else path.stem
    return name.encode(errors="replace").decode()


def _moments(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """mu and sigma in float64, and what is wrong with them, or ""."""
    mu, sigma = arrays["mu"], arrays["sigma"]
    for name in ("mu", "sigma"):
        if arrays[name].dtype.kind not in "iuf":
            return {}, f"{name} is {arrays[name].dtype}, and must be real numbers"
    if mu.ndim != 1 or not len(mu) or sigma.shape != (*mu.shape, *mu.shape):
        return {}, f"mu {mu.shape} and sigma {sigma.shape} must be (d,) and (d, d)"
    with np.errstate(over="ignore"):
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    most = float(_SINGLE.max)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return {}, "mu and sigma must be finite"
    if np.abs(mu).max() > most or np.abs(sigma).max() > most**2:
        return {}, f"mu and sigma reach {np.abs(mu).max():.3g} and {np.abs(sigma).max():.3g}, beyond all features"
    rounding = len(mu) * float(_SINGLE.eps) * float(np.abs(np.diagonal(sigma)).max())
    if np.abs(sigma - sigma.T).max() > rounding:
        return {}, "sigma must be symmetric"
    if (least := float(np.linalg.eigvalsh(sigma).min())) < -rounding:
        return {}, f"sigma must be a covariance, and has the eigenvalue {least:.3g}"
    return {"mu": mu, "sigma": sigma}, ""


def _wrong_beside(arrays: dict[str, np.ndarray]) -> str:
    """What is wrong with the rest of the statistics, or ""."""
    if wrong := _wrong_count(arrays):
        return wrong
    if "features" not in arrays or "extractor_digest" not in arrays:  # else nobody reads them
        return ""
    features, d = arrays["features"], len(arrays["mu"])
    if features.dtype.kind != "f" or features.ndim != 2 or features.shape[1] != d or not len(features):
        return f"features are {features.dtype} {features.shape}, and must be float32 (n, {d})"
    return "" if np.isfinite(features).all() else "features must be finite"


def _wrong_count(arrays: dict[str, np.ndarray]) -> str:
    num = arrays.get("num")
    if num is None or (num.shape == () and num.dtype.kind in "iu" and 2 <= int(num) < 2**63):
        return ""
    said = repr(num.tolist() if num.size <= 4 else num.shape)[:60]
    return f"num = {said}: must be the number of its images, an integer, at least 2"
