"""From verified shards to a score: merges a sample set's features, refuses what is not whole, writes eval/SET.json.

Owns the refusals, the reference statistics and the score record. Must not know jobs or schedulers: a refusal names the
shards and the command that repairs them, and whoever called decides. Shards are merged in order of their index, so a
score does not depend on who computed them, or when.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm import metrics, rundir
from ddpm.errors import DDPMError, RequestError
from ddpm.features import Extractor, extract, shard_features
from ddpm.metrics import Moments
from ddpm.run.stopping import ShowProgress, StopRequested
from ddpm.rundir import DamagedFile, RunDir, SampleSet
from ddpm.sampleset import (
    Request,
    npz_bytes,
    parse_npz,
    read_manifest,
    read_request,
    repair_command,
    withdraw_shard,
)

if TYPE_CHECKING:
    from ddpm.data.packed import PackedImages

log = logging.getLogger(__name__)

_CHUNK_IMAGES = 1024
"""Images whose features are held at once; part of the definition of a reference's rounding, so a constant."""


class BrokenSet(DDPMError):
    """A sample set that cannot be scored; `shards` are the ones to compute again."""

    def __init__(self, message: str, shards: Sequence[int]) -> None:
        super().__init__(message)
        self.shards = list(shards)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: mu float64 (d,), sigma float64 (d, d), and where they come from."""

    mu: np.ndarray
    sigma: np.ndarray
    record: dict[str, Any]
    """{"name", "split", "num_images", "digest"} of the score record; null where a file does not say."""


# ---------------------------------------------------------------- a set's shards


def check_set(sample_set: SampleSet, request: Request) -> list[dict[str, Any]]:
    """The manifests of a complete set, in order. Raises BrokenSet naming every shard that is missing or not of it."""
    expected = {sample_set.shard_manifest(i, request.shards).name for i in range(request.shards)}
    strangers = sorted(p.name for p in sample_set.path.glob("shard-*.json") if p.name not in expected)
    if strangers:
        raise BrokenSet(
            f"{sample_set.path} holds shards of another sharding than its request's {request.shards}: "
            f"{_listed(strangers)}; their samples would count twice. Remove them, with their .npz",
            [],
        )
    manifests, problems = [], {}
    for index in range(request.shards):
        try:
            manifests.append(read_manifest(sample_set, request, index))
        except FileNotFoundError:
            problems[index] = "missing"
        except DamagedFile as e:
            problems[index] = str(e)
    if problems:
        raise _broken(sample_set, problems)
    if len({m["nfe"] for m in manifests}) > 1:
        raise BrokenSet(
            f"{sample_set.path}: its shards took different numbers of network evaluations "
            f"({sorted({m['nfe'] for m in manifests})}); they are not one set. Make another with --set",
            [],
        )
    return manifests


def _broken(sample_set: SampleSet, problems: dict[int, str]) -> BrokenSet:
    what = _listed([f"shard {i}: {reason}" for i, reason in problems.items()])
    return BrokenSet(
        f"sample set {sample_set.name!r} is not whole: {what}; {repair_command(sample_set)} computes what is missing",
        list(problems),
    )


def _listed(items: Sequence[str], most: int = 8) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def set_moments(
    sample_set: SampleSet,
    request: Request,
    extractor: Extractor,
    *,
    batch: int = 64,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress | None = None,
    token: str = "",
) -> Moments:
    """Moments of all features of a set, merged in order of shards. progress(done, total) counts shards.

    Damaged shards are withdrawn, so that the repairing command finds them missing, and named by BrokenSet at the end.
    Features that are already computed stay: a stop (Stopped) loses at most one shard's.
    """
    check_set(sample_set, request)
    total: Moments | None = None
    problems: dict[int, str] = {}
    for index in range(request.shards):
        try:
            features = shard_features(
                sample_set, request, index, extractor, batch=batch, stop_requested=stop_requested, token=token
            )
        except (FileNotFoundError, DamagedFile) as e:
            withdraw_shard(sample_set, request, index)
            problems[index] = f"{e} (withdrawn)"
            continue
        moments = metrics.from_features(features)
        total = moments if total is None else metrics.merge(total, moments)
        if progress is not None:
            progress(index + 1, request.shards)
    if problems:
        raise _broken(sample_set, problems)
    assert total is not None and total.num == request.num_samples
    return total


# ---------------------------------------------------------------- references


def image_moments(
    images: np.ndarray,
    extractor: Extractor,
    *,
    batch: int = 64,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress | None = None,
) -> Moments:
    """Moments of the features of images uint8 (n, H, W, 3). progress(done, total) counts images."""
    if len(images) < 2:
        raise RequestError(f"{len(images)} images: a score needs at least 2 on each side")
    total: Moments | None = None
    for first in range(0, len(images), _CHUNK_IMAGES):
        chunk = images[first : first + _CHUNK_IMAGES]
        moments = metrics.from_features(extract(extractor, chunk, batch, stop_requested))
        total = moments if total is None else metrics.merge(total, moments)
        if progress is not None:
            progress(total.num, len(images))
    assert total is not None
    return total


def reference_moments(
    images: PackedImages,
    extractor: Extractor,
    cache_dir: Path,
    *,
    batch: int = 64,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress | None = None,
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
        return Reference(arrays["mu"], arrays["sigma"], _image_record(images))
    except FileNotFoundError:
        log.info("reference=%s images=%d computing its statistics", path, len(images.images))
    except (DamagedFile, KeyError) as e:
        log.warning("reference=%s damaged, computing it again: %s", path, e)
    moments = image_moments(images.images, extractor, batch=batch, stop_requested=stop_requested, progress=progress)
    cache_dir.mkdir(parents=True, exist_ok=True)
    write_statistics(
        path,
        moments,
        images.name,
        replace=True,
        token=token,
        images_digest=images.digest,
        extractor_digest=extractor.digest,
    )
    return Reference(moments.mean, metrics.covariance(moments), _image_record(images))


def _image_record(images: PackedImages) -> dict[str, Any]:
    return {"name": images.name, "split": images.split, "num_images": len(images.images), "digest": images.digest}


def write_statistics(
    path: Path, moments: Moments, name: str, *, replace: bool = False, token: str = "", **extra: str
) -> None:
    """Write pytorch-fid's .npz (mu, sigma) with `num`, `name` and `extra` beside, which it ignores."""
    arrays = {"mu": moments.mean, "sigma": metrics.covariance(moments), "num": np.int64(moments.num)}
    data = npz_bytes(**arrays, name=name, **extra)
    rundir.write_bytes(path, data, replace=replace, token=token)


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


# ---------------------------------------------------------------- scores


def score(moments: Moments, reference: Reference, extractor: Extractor) -> dict[str, float]:
    """{"fid": …}, or {"frechet_distance": …} where the weights are not the published ones."""
    distance = metrics.frechet_distance(moments.mean, metrics.covariance(moments), reference.mu, reference.sigma)
    if not math.isfinite(distance):
        raise DDPMError("the Fréchet distance is not finite: features or reference hold values that are not")
    return {"fid" if extractor.published else "frechet_distance": distance}


def evaluate_set(
    run: RunDir,
    set_name: str,
    *,
    reference: PackedImages | Path,
    extractor: Extractor,
    cache_dir: Path,
    command: list[str],
    batch: int = 64,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress | None = None,
    token: str = "",
) -> dict[str, Any]:
    """Score a complete sample set and write eval/SET.json, which is returned.

    reference: the images to compare with, or an .npz of statistics. cache_dir: for the statistics of images.
    If the file already holds a score of the same samples, reference and extractor, it is returned and stays as it is.
    Raises BrokenSet naming the shards and the repairing command, RequestError for the set or the reference, Stopped.
    """
    sample_set = run.sample_set(rundir.check_name(set_name, "sample set name"))
    request = read_request(sample_set)
    if request.num_samples < 2:
        raise RequestError(f"sample set {set_name!r} holds {request.num_samples} sample: a score needs at least 2")
    manifests = check_set(sample_set, request)
    statistics = read_statistics(reference, extractor) if isinstance(reference, Path) else None
    reference_record = statistics.record if statistics else _image_record(reference)  # type: ignore[arg-type]
    provenance = {
        "num_samples": request.num_samples,
        "reference": reference_record,
        "extractor": _extractor_record(extractor),
        "checkpoint": {**asdict(request.checkpoint), "weights": request.weights},
        "sampler": {
            "name": request.sampler,
            "steps": request.steps,
            "eta": request.eta,
            "guidance": request.guidance,
            **({} if request.clip_x_0 else {"clip_x_0": False}),
            **({} if request.variance is None else {"variance": request.variance}),
            **({} if request.class_plan is None else {"class_plan": list(request.class_plan)}),
        },
        "nfe": manifests[0]["nfe"],
        "seed": request.seed,
        "precision": request.precision,
    }
    path = run.eval / f"{set_name}.json"
    there = rundir.read_json(path) or {}
    name = "fid" if extractor.published else "frechet_distance"
    if isinstance(there.get(name), float) and {k: there.get(k) for k in provenance} == provenance:
        return there
    if statistics is None:
        assert not isinstance(reference, Path)
        statistics = reference_moments(
            reference, extractor, cache_dir, batch=batch, stop_requested=stop_requested, token=token
        )
    moments = set_moments(
        sample_set, request, extractor, batch=batch, stop_requested=stop_requested, progress=progress, token=token
    )
    result = {**score(moments, statistics, extractor), **provenance, "created": rundir.now(), "command": command}
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(path, result, replace=True, token=token)
    return result


def evaluate_images(
    images: Path,
    reference: Path,
    extractor: Extractor,
    *,
    batch: int = 64,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress | None = None,
) -> dict[str, Any]:
    """Score a folder or zip of images against an .npz of statistics, a folder or a zip. Writes nothing."""
    from ddpm.data.packed import load_folder

    def moments_of(path: Path) -> tuple[Moments, dict[str, Any]]:
        packed = load_folder(path)
        moments = image_moments(packed.images, extractor, batch=batch, stop_requested=stop_requested, progress=progress)
        return moments, _image_record(packed)

    if reference.suffix == ".npz":
        statistics = read_statistics(reference, extractor)
    else:
        of_reference, record = moments_of(reference)
        statistics = Reference(of_reference.mean, metrics.covariance(of_reference), record)
    moments, _ = moments_of(images)
    return {
        **score(moments, statistics, extractor),
        "num_samples": moments.num,
        "reference": statistics.record,
        "extractor": _extractor_record(extractor),
        "created": rundir.now(),
    }


def _extractor_record(extractor: Extractor) -> dict[str, Any]:
    return {"name": extractor.name, "weights_sha256": extractor.weights_sha256, "resize": extractor.resize}
