"""From verified shards to a score: merges a sample set's features, refuses what is not whole, writes the score.

Owns the refusals and what a score says that it is of. Must not know jobs or schedulers: a refusal names the shards, and
whoever called decides how they are repaired. Shards are merged in order of their index, so a score does not depend on
who computed them, or when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm.data.packed import PackedImages, load_folder
from ddpm.errors import DDPMError, RequestError
from ddpm.run import files, paths
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir, SampleSet
from ddpm.run.stopping import ShowProgress, StopRequested
from ddpm.sampling.request import Request, read_request
from ddpm.sampling.shards import read_manifest, withdraw_shard
from ddpm.scoring import metrics
from ddpm.scoring.extractors import Extractor
from ddpm.scoring.features import shard_features
from ddpm.scoring.metrics import Moments
from ddpm.scoring.record import PROVENANCE, key_for, publish_score, read_score, scores_of
from ddpm.scoring.reference import Reference, image_moments, image_record, read_statistics, reference_moments


class BrokenSet(DDPMError):
    """A sample set that cannot be scored; `shards` are the ones to compute again."""

    def __init__(self, message: str, shards: Sequence[int]) -> None:
        super().__init__(message)
        self.shards = list(shards)


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
    return BrokenSet(f"sample set {sample_set.name!r} is not whole: {what}", list(problems))


def _listed(items: Sequence[str], most: int = 8) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def set_moments(
    sample_set: SampleSet,
    request: Request,
    extractor: Extractor,
    *,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress = lambda done, total: None,
    token: str = "",
) -> Moments:
    """Moments of all features of a set, merged in order of shards. progress(done, total) counts shards.

    Damaged shards are withdrawn, so that whoever repairs the set finds them missing, and named by BrokenSet at the end.
    Features that are already computed stay: a stop (Stopped) loses at most one shard's.
    """
    check_set(sample_set, request)
    total: Moments | None = None
    problems: dict[int, str] = {}
    for index in range(request.shards):
        try:
            features = shard_features(sample_set, request, index, extractor, stop_requested=stop_requested, token=token)
        except (FileNotFoundError, DamagedFile) as e:
            withdraw_shard(sample_set, request, index)
            problems[index] = f"{e} (withdrawn)"
            continue
        moments = metrics.from_features(features)
        total = moments if total is None else metrics.merge(total, moments)
        progress(index + 1, request.shards)
    if problems:
        raise _broken(sample_set, problems)
    assert total is not None and total.num == request.num_samples
    return total


# ---------------------------------------------------------------- scores


def score(moments: Moments, reference: Reference, extractor: Extractor) -> dict[str, float]:
    """{"fid": …}, or {"frechet_distance": …} where the weights are not the published ones."""
    distance = metrics.frechet_distance(moments.mean, metrics.covariance(moments), reference.mu, reference.sigma)
    if not math.isfinite(distance):
        raise DDPMError("the Fréchet distance is not finite: features or reference hold values that are not")
    return {key_for(published=extractor.published): distance}


def evaluate_set(
    run: RunDir,
    set_name: str,
    *,
    reference: PackedImages | Path,
    extractor: Extractor,
    cache_dir: Path,
    command: list[str],
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress = lambda done, total: None,
    token: str = "",
) -> dict[str, Any]:
    """Score a complete sample set and publish the record, which is returned.

    reference: the images to compare with, or an .npz of statistics. cache_dir: for the statistics of images.
    If there is a score of the same samples, reference and extractor already, it is returned and stays as it is.
    Raises BrokenSet naming the shards, RequestError for the set or the reference, Stopped.
    """
    sample_set = run.sample_set(paths.check_name(set_name, "sample set name"))
    request = read_request(sample_set)
    if request.num_samples < 2:
        raise RequestError(f"sample set {set_name!r} holds {request.num_samples} sample: a score needs at least 2")
    manifests = check_set(sample_set, request)
    statistics = read_statistics(reference, extractor) if isinstance(reference, Path) else None
    reference_record = statistics.record if statistics else image_record(reference)  # type: ignore[arg-type]
    provenance = _provenance(request, manifests[0]["nfe"], reference_record, extractor)
    for there in scores_of(run, set_name):
        if {k: there.record.get(k) for k in PROVENANCE} == provenance:
            return there.record
    if statistics is None:
        assert not isinstance(reference, Path)
        statistics = reference_moments(reference, extractor, cache_dir, stop_requested=stop_requested, token=token)
    moments = set_moments(sample_set, request, extractor, stop_requested=stop_requested, progress=progress, token=token)
    result = {**score(moments, statistics, extractor), **provenance, "created": files.now(), "command": command}
    return read_score(publish_score(run, set_name, result, token))


def _provenance(request: Request, nfe: int, reference: dict[str, Any], extractor: Extractor) -> dict[str, Any]:
    """What a set's score is a score of; the same provenance, the same score."""
    return {
        "num_samples": request.num_samples,
        "reference": reference,
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
        "nfe": nfe,
        "seed": request.seed,
        "precision": request.precision,
    }


def evaluate_images(images: Path, reference: Path, extractor: Extractor) -> dict[str, Any]:
    """Score a folder or zip of images against an .npz of statistics, a folder or a zip. Writes nothing."""

    def moments_of(path: Path) -> tuple[Moments, dict[str, Any]]:
        packed = load_folder(path)
        return image_moments(packed.images, extractor), image_record(packed)

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
        "created": files.now(),
    }


def _extractor_record(extractor: Extractor) -> dict[str, Any]:
    return {"name": extractor.name, "weights_sha256": extractor.weights_sha256, "resize": extractor.resize}
