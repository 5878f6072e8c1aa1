"""From verified shards to a score: merges a sample set's features, refuses incomplete sets, writes the score.

Owns the refusals and what a score says that it is of. Must not know jobs or schedulers: a refusal names the shards, and
whoever called decides how they are repaired. Shards are merged in order of their index, so a score does not depend on
who computed them, or when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.data.packed import PackedImages
from ddpm.errors import DDPMError, RequestError
from ddpm.run import files, paths
from ddpm.run.claims import ALONE, OthersAtWork, Worker
from ddpm.run.files import DamagedFile
from ddpm.run.log import say
from ddpm.run.paths import RunDir, SampleSet
from ddpm.run.stopping import ShowProgress
from ddpm.sampling.generate import sample_labels
from ddpm.sampling.request import Request, read_request, samples_record, shard_range
from ddpm.sampling.shards import codes, read_manifest, withdraw_shard
from ddpm.scoring.against import SPLITS
from ddpm.scoring.extractors import Extractor
from ddpm.scoring.features import expected_features, keep_all, shard_features
from ddpm.scoring.gather import CLASSES_AT_MOST, Gathered, gather
from ddpm.scoring.record import PROVENANCE, publish_score, read_score, score_with
from ddpm.scoring.reference import check_size, image_record, reference_of
from ddpm.scoring.scores import all_scores
from ddpm.scoring.statistics_file import read_statistics


class BrokenSet(DDPMError):
    """A sample set that cannot be scored; `shards` are the ones to compute again."""

    def __init__(self, message: str, shards: Sequence[int]) -> None:
        super().__init__(message)
        self.shards = list(shards)


# ---------------------------------------------------------------- a set's shards


def check_set(sample_set: SampleSet, request: Request) -> list[dict[str, Any]]:
    """The manifests of a complete set, in order. Raises BrokenSet naming every shard that is missing or does not
    fit."""
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


def gather_set(
    sample_set: SampleSet,
    request: Request,
    extractor: Extractor,
    *,
    num_classes: int = 0,
    progress: ShowProgress = lambda done, total: None,
    worker: Worker = ALONE,
) -> Gathered:
    """Everything that scores need from the features of a set, in the order of its shards.

    progress(done, total): of shards, whenever the features of one have been computed. Processes that do this at once
    share the shards whose features are missing. Raises OthersAtWork.

    Damaged shards are withdrawn, so that whoever repairs the set finds them missing, and named by BrokenSet at the end.
    Features that are already computed stay: a stop (Stopped) loses at most one shard's.
    """
    manifests = check_set(sample_set, request)
    problems: dict[int, str] = {}

    places = {
        index: (
            sample_set.features(extractor.name, index, request.shards),
            expected_features(request, manifest, extractor),
        )
        for index, manifest in enumerate(manifests)
    }

    def make(index: int) -> None:
        with suppress(FileNotFoundError, DamagedFile):  # named below
            shard_features(sample_set, request, index, extractor, worker)

    keep_all(sample_set.path, places, make, lambda there: progress(len(there), request.shards), worker)

    def features() -> Iterator[np.ndarray]:
        for index in range(request.shards):
            try:
                yield shard_features(sample_set, request, index, extractor, worker)
            except (FileNotFoundError, DamagedFile) as e:
                withdraw_shard(sample_set, request, index)
                problems[index] = "missing" if isinstance(e, FileNotFoundError) else f"{e} (withdrawn)"
                # in its place, so that those after it are looked at too; what is gathered is then thrown away
                yield np.zeros((shard_range(request.num_samples, request.shards, index)[1], extractor.dim), np.float32)

    labels = sample_labels(request, 0, request.num_samples, num_classes) if num_classes else None
    gathered = gather(
        features(), request.num_samples, labels=labels, num_classes=num_classes, classifier=extractor.classifier
    )
    if problems:
        raise _broken(sample_set, problems)
    return gathered


# ---------------------------------------------------------------- scores


def evaluate_set(
    run: RunDir,
    set_name: str,
    *,
    reference: PackedImages | Path,
    extractor: Extractor,
    cache_dir: Path,
    command: list[str],
    num_classes: int = 0,
    image_size: int | None = None,
    progress: ShowProgress = lambda done, total: None,
    reference_progress: ShowProgress = lambda done, total: None,
    worker: Worker = ALONE,
) -> dict[str, Any]:
    """Score a complete sample set and publish the record, which is returned.

    reference: the images to compare with, or an .npz of statistics. cache_dir: for the statistics of images.
    image_size: the samples', which a reference's images must have. num_classes: of the run's model; with classes in
    the reference too there are scores by class, unless they are more than CLASSES_AT_MOST, which is told.
    progress(done, total): of shards; reference_progress: of the reference's images.
    If there is a score of the same samples, reference and extractor already, it is returned and stays as it is.
    Raises BrokenSet naming the shards, RequestError for the set or the reference, Stopped, OthersAtWork.
    """
    sample_set = run.sample_set(paths.check_name(set_name, "sample set name"))
    request = read_request(sample_set)
    if request.num_samples < 2:
        raise RequestError(f"sample set {set_name!r} holds {request.num_samples} sample: a score needs at least 2")
    file = read_statistics(reference) if isinstance(reference, Path) else None
    images = file.images if file else reference
    if isinstance(images, PackedImages) and image_size is not None:
        check_size(images, image_size)
    manifests = check_set(sample_set, request)
    of_reference = file.record if file else image_record(reference)  # type: ignore[arg-type]
    provenance = _provenance(request, manifests[0]["nfe"], of_reference, extractor)
    if (there := score_with(run, set_name, provenance)) is not None:
        return there
    by_class = num_classes > 1 and isinstance(reference, PackedImages) and reference.split in SPLITS
    if by_class and num_classes > CLASSES_AT_MOST:
        say(f"no scores by class: the model has {num_classes} classes, more than {CLASSES_AT_MOST}")
        by_class = False
    statistics, busy = None, OthersAtWork()
    try:
        if file is not None:
            statistics = file.reference(extractor, cache_dir, worker)
        else:
            assert isinstance(reference, PackedImages)
            statistics = reference_of(
                reference, extractor, cache_dir, by_class=by_class, progress=reference_progress, worker=worker
            )
    except OthersAtWork as e:  # there may be something left to do of the set
        busy = e
    gathered = gather_set(
        sample_set, request, extractor, num_classes=num_classes if by_class else 0, progress=progress, worker=worker
    )
    if statistics is None:
        raise busy
    scores = all_scores(gathered, statistics, published=extractor.published)
    made_by = {"samples_code": by} if (by := codes(sample_set, request)) else {}
    result = {**scores, **provenance, **made_by, "created": files.now(), "command": command}
    return read_score(publish_score(run, set_name, result, worker.token))


def _provenance(request: Request, nfe: int, reference: dict[str, Any], extractor: Extractor) -> dict[str, Any]:
    """What a set's score was computed from; equal provenance means an equal score."""
    said = {**samples_record(request), "reference": reference, "extractor": extractor.record, "nfe": nfe}
    return {key: said[key] for key in PROVENANCE}
