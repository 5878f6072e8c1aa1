"""One shard of a sample set: from a request and a network to published, packed images.

Owns the generation and its finished batches (samples/SET/part/); the request and the shards are ddpm/sampleset.py's.
Must not know jobs, checkpoints or how the network was built: `eps_model` arrives ready. torch is imported where images
are computed.

Sample i is a function of (request, i) alone. Its noise is counted by i. The network always runs at `batch` rows, and
sample i sits in row i % batch of its call: any `batch` consecutive samples fill every row once, so even a kernel whose
rounding depends on the row gives the same bytes under every sharding, at no cost. With guidance it runs at twice as
many: row i % batch with the sample's label, row batch + i % batch without.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddpm import rundir
from ddpm.errors import DoNotRetry, RequestError, RunBusy, Stopped
from ddpm.run.stopping import ShowProgress, StopRequested
from ddpm.rundir import DamagedFile, SampleSet
from ddpm.sampleset import (
    Request,
    missing_shards,
    npz_bytes,
    parse_npz,
    shard_range,
    verify_shard,
    withdraw_shard,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

EpsModel = Callable[["Tensor", "Tensor", "Tensor | None"], "Tensor"]
"""(x_t (B, C, H, W), t int64 (B,), labels int64 (B,) or None) -> eps (B, C, H, W). With guidance B is 2 * batch, and
label num_classes stands for none."""


# ---------------------------------------------------------------- finished batches


class _Part(NamedTuple):
    images: np.ndarray
    nfe: int


def _part_path(sample_set: SampleSet, first: int, num: int) -> Path:
    return sample_set.part / f"{first:09d}-{num}.npz"


def _part_check(request: Request, first: int, part: _Part) -> str:
    """Ties a part's pixels to its request and place: a part left by another request is no part."""
    digest = hashlib.sha256(f"{request.digest} {first} {part.nfe} {part.images.shape}".encode())
    digest.update(part.images.tobytes())
    return digest.hexdigest()


def _read_part(sample_set: SampleSet, request: Request, first: int, num: int) -> _Part | None:
    """A finished batch that an earlier life left, or None; a damaged one is removed and said."""
    path = _part_path(sample_set, first, num)
    try:
        arrays = parse_npz(path.read_bytes(), path.name)
        part = _Part(arrays["images"], int(arrays["nfe"]))
        if str(arrays["check"]) == _part_check(request, first, part):
            return part
        reason = "its content does not match its check"
    except FileNotFoundError:
        return None
    except (DamagedFile, KeyError, ValueError, TypeError) as e:
        reason = str(e)
    log.warning("part=%s damaged, computing these samples again: %s", path, reason)
    path.unlink(missing_ok=True)
    return None


def _write_part(sample_set: SampleSet, request: Request, first: int, part: _Part, token: str) -> None:
    sample_set.part.mkdir(exist_ok=True)
    data = npz_bytes(images=part.images, nfe=part.nfe, check=_part_check(request, first, part))
    try:
        rundir.write_bytes(_part_path(sample_set, first, len(part.images)), data, token=token)
    except FileExistsError:
        pass  # a twin of this job, not yet dead, finished the same batch


def _remove_parts(sample_set: SampleSet, request: Request, batches: list[tuple[int, int]]) -> None:
    """Remove this shard's parts, and the directory with the last shard of the set: no writer can be left then."""
    for first, num in batches:
        _part_path(sample_set, first, num).unlink(missing_ok=True)
    if sample_set.part.exists() and not any(sample_set.part.iterdir()) and not missing_shards(sample_set, request):
        sample_set.part.rmdir()


def _remove_stale(sample_set: SampleSet, request: Request, index: int, batches: list[tuple[int, int]]) -> None:
    """Remove the temporaries of this shard's killed lives, and only of this shard's."""
    finals = [sample_set.shard(index, request.shards), sample_set.shard_manifest(index, request.shards)]
    for final in finals + [_part_path(sample_set, first, num) for first, num in batches]:
        for stale in final.parent.glob(f"{rundir.TMP_PREFIX}{final.name}.*"):
            stale.unlink(missing_ok=True)


# ---------------------------------------------------------------- generation


def sample_labels(request: Request, first: int, num: int, num_classes: int) -> np.ndarray:
    """Class of samples first … first+num-1, int64 (num,); -1 for a model without classes.

    Sample i is of class i % num_classes, or of the class that i falls into where the plan's classes follow each other.
    """
    index = np.arange(first, first + num, dtype=np.int64)
    if not num_classes:
        return np.full_like(index, -1)
    if request.class_plan is None:
        return index % num_classes
    return np.searchsorted(np.cumsum(request.class_plan), index, side="right").astype(np.int64)


def generate_shard(
    sample_set: SampleSet,
    request: Request,
    index: int,
    *,
    eps_model: EpsModel,
    schedule: Any,
    image_shape: tuple[int, int, int],
    variance: str,
    num_classes: int,
    device: torch.device | str,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress | None = None,
    token: str = "",
) -> dict[str, Any]:
    """Compute and publish shard `index` of a published request; returns its manifest, at once if it is already good.

    eps_model: the network at the request's checkpoint, weights and precision, on `device`. schedule, variance: as the
    samplers take them; a request's own variance comes first. image_shape: (C, H, W). num_classes: 0 for a model
    without. Guidance wants a model that takes the label num_classes for none.
    stop_requested is asked at every sampler step. progress(done, total) counts the shard's samples, after each batch.
    token: names this job in temporaries, so that two lives on two hosts never share one.

    A kill loses the batch in work. Raises Stopped(reason); RequestError if the model's classes are not the request's;
    DoNotRetry if the network's output is not finite.
    """
    _check_classes(request, num_classes)
    first, num = shard_range(request.num_samples, request.shards, index)
    batches = [(i, min(request.batch, first + num - i)) for i in range(first, first + num, request.batch)]
    _remove_stale(sample_set, request, index, batches)
    if manifest := _already_published(sample_set, request, index):
        _remove_parts(sample_set, request, batches)
        return manifest

    compute = batch_sampler(request, eps_model, schedule, image_shape, variance, num_classes, device, stop_requested)
    parts = []
    for start, count in batches:
        part = _read_part(sample_set, request, start, count)
        if part is None:
            part = compute(start, count)
            _write_part(sample_set, request, start, part, token)
        parts.append(part)
        if progress is not None:
            progress(start + count - first, num)

    nfe = {part.nfe for part in parts}
    assert len(nfe) == 1, f"every sample takes the same number of network evaluations, found {nfe}"
    images = np.concatenate([part.images for part in parts])
    manifest = _publish_shard(sample_set, request, index, images, num_classes, nfe.pop(), token)
    _remove_parts(sample_set, request, batches)
    return manifest


def _check_classes(request: Request, num_classes: int) -> None:
    if request.guidance is not None and not num_classes:
        raise RequestError(f"guidance = {request.guidance}: the model has no classes (model.num_classes = 0)")
    if request.class_plan is not None and len(request.class_plan) != num_classes:
        raise RequestError(
            f"class_plan = {list(request.class_plan)}: needs one count for each of the model's {num_classes} classes"
        )


def _already_published(sample_set: SampleSet, request: Request, index: int) -> dict[str, Any] | None:
    """The manifest of a good shard. What is left of a bad one is removed: manifest first, then it does not exist."""
    try:
        return verify_shard(sample_set, request, index).manifest
    except FileNotFoundError:
        pass
    except DamagedFile as e:
        log.warning("shard=%d set=%s damaged, computing it again: %s", index, sample_set.name, e)
    withdraw_shard(sample_set, request, index)
    sample_set.shard(index, request.shards).unlink(missing_ok=True)
    return None


def _publish_shard(
    sample_set: SampleSet, request: Request, index: int, images: np.ndarray, num_classes: int, nfe: int, token: str
) -> dict[str, Any]:
    first, num = shard_range(request.num_samples, request.shards, index)
    path = sample_set.shard(index, request.shards)
    try:
        with rundir.publishing(path, token=token) as f:
            f.write(
                npz_bytes(images=images, labels=sample_labels(request, first, num, num_classes), first=np.int64(first))
            )
        # killed here: a .npz without its .json does not exist, and the next life removes it
        manifest = rundir.sign(
            {
                "shard": index,
                "first": first,
                "num": num,
                "sha256": f.sha256,
                "request_digest": request.digest,
                "nfe": nfe,
            }
        )
        rundir.write_json(path.with_suffix(".json"), manifest, token=token)
        return manifest
    except FileExistsError:
        try:
            return verify_shard(sample_set, request, index).manifest  # a twin of this job was faster
        except (FileNotFoundError, DamagedFile) as e:
            raise RunBusy(f"another job is publishing shard {index} of {sample_set.path} ({e})") from None


def batch_sampler(
    request: Request,
    eps_model: EpsModel,
    schedule: Any,
    image_shape: tuple[int, int, int],
    variance: str,
    num_classes: int,
    device: torch.device | str,
    stop_requested: StopRequested,
) -> Callable[[int, int], _Part]:
    """A function (first, num <= batch) -> the images of samples first … first+num-1, in order."""
    import torch

    from ddpm import rng, samplers
    from ddpm.guidance import Guided

    if request.sampler not in samplers.SAMPLERS:
        raise RequestError(f"sampler = {request.sampler!r}: use one of {', '.join(samplers.SAMPLERS)}")
    sampler = samplers.SAMPLERS[request.sampler]
    initial_key, step_key = rng.key(request.seed, "x_T"), rng.key(request.seed, "sampler")

    def poll(step: samplers.SamplerStep | None = None) -> None:
        finished = step is not None and step.index + 1 == step.num_steps  # keep that batch, stop before the next
        if not finished and (reason := stop_requested()):
            raise Stopped(reason)

    def compute(first: int, num: int) -> _Part:
        poll()
        index = torch.arange(first, first + num, device=device)
        row = index % request.batch

        def in_rows(values: Tensor) -> Tensor:
            """Values of the samples (num, ...) at their rows (batch, ...); unused rows are zeros."""
            return values.new_zeros(request.batch, *values.shape[1:]).index_copy_(0, row, values)

        labels: Tensor | None = None
        if num_classes:
            labels = in_rows(torch.from_numpy(sample_labels(request, first, num, num_classes)).to(device))

        def plain(x_t: Tensor, t: Tensor) -> Tensor:
            return eps_model(x_t, t, labels)

        model: samplers.EpsModel = plain
        if request.guidance is not None and labels is not None:
            model = Guided(eps_model, labels, num_classes, request.guidance)
        with torch.inference_mode():
            result = sampler(
                model,
                schedule,
                in_rows(rng.normal(initial_key, index, 0, image_shape)),
                noise=lambda t: in_rows(rng.normal(step_key, index, t, image_shape)),
                steps=request.steps,
                eta=request.eta,
                variance=request.variance or variance,
                clip_x_0=request.clip_x_0,
                callback=poll,
            )
            x_0 = result.x_0[row]
            if not torch.isfinite(x_0).all():
                raise DoNotRetry(
                    f"samples {first} to {first + num - 1} are not finite: the {request.weights} weights of step "
                    f"{request.checkpoint.step} diverged, or {request.precision} is too narrow for them; choose "
                    f"another --step, or sample.precision=fp32"
                )
            images = ((x_0.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
            return _Part(images.permute(0, 2, 3, 1).contiguous().cpu().numpy(), int(result.nfe))

    return compute
