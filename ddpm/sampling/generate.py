"""One shard of a sample set: from a request and a network to published, packed images.

Must not know jobs, checkpoints or how the network was built: the denoiser arrives ready.

Sample i is a function of (request, i) alone. Its noise is counted by i. The network always runs at `batch` rows, and
sample i sits in row i % batch of its call: any `batch` consecutive samples fill every row once, so even a kernel whose
rounding depends on the row gives the same bytes under every sharding, at no cost. With guidance it runs at twice as
many: row i % batch with the sample's label, row batch + i % batch without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion import rng, samplers
from ddpm.diffusion.guidance import Guided
from ddpm.errors import DoNotRetry, RequestError, Stopped
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.log import say
from ddpm.run.paths import SampleSet
from ddpm.run.stopping import ShowProgress, StopRequested
from ddpm.sampling.denoiser import Denoiser
from ddpm.sampling.parts import Part, part_path, read_part, remove_parts, write_part
from ddpm.sampling.request import Request, shard_range
from ddpm.sampling.shards import publish_shard, verify_shard, withdraw_shard


def generate_shard(
    sample_set: SampleSet,
    request: Request,
    index: int,
    denoiser: Denoiser,
    *,
    stop_requested: StopRequested = lambda: None,
    progress: ShowProgress = lambda done, total: None,
    token: str = "",
    code: str = "",
) -> dict[str, Any]:
    """Compute and publish shard `index` of a published request; returns its manifest, at once if it is already good.

    denoiser: of the request's checkpoint, weights and precision.
    stop_requested is asked at every sampler step. progress counts the shard's samples, after each batch.
    token: names this job in temporaries, so that two lives on two hosts never share one. code: the digest of the code
    that computes it, for its manifest.

    A kill loses the batch in work. Raises Stopped(reason); RequestError if the model's classes are not the request's;
    DoNotRetry if the network's output is not finite.
    """
    _check_fit(request, denoiser)
    first, num = shard_range(request.num_samples, request.shards, index)
    batches = [(i, min(request.batch, first + num - i)) for i in range(first, first + num, request.batch)]
    _remove_stale(sample_set, request, index, batches)
    if manifest := _already_published(sample_set, request, index):
        remove_parts(sample_set, request, batches)
        return manifest

    labels = sample_labels(request, first, num, denoiser.num_classes)
    parts = []
    for start, count in batches:
        part = read_part(sample_set, request, start, count)
        if part is None:
            of_batch = labels[start - first : start - first + count]
            part = sample_batch(request, denoiser, start, of_batch, stop_requested)._replace(code=code)
            write_part(sample_set, request, start, part, token)
        parts.append(part)
        progress(start + count - first, num)

    nfe = {part.nfe for part in parts}
    assert len(nfe) == 1, f"every sample takes the same number of network evaluations, found {nfe}"
    images = np.concatenate([part.images for part in parts])
    made_by = "+".join(sorted({part.code for part in parts} - {""}))
    manifest = publish_shard(sample_set, request, index, images, labels, nfe.pop(), token, made_by)
    remove_parts(sample_set, request, batches)
    return manifest


def sample_labels(request: Request, first: int, num: int, num_classes: int) -> np.ndarray:
    """Class of samples first … first+num-1, int64 (num,); -1 for a model without classes.

    Sample i has class i % num_classes; with a class plan all samples of class 0 come first, then those of class 1, ….
    """
    index = np.arange(first, first + num, dtype=np.int64)
    if not num_classes:
        return np.full_like(index, -1)
    if request.class_plan is None:
        return index % num_classes
    return np.searchsorted(np.cumsum(request.class_plan), index, side="right").astype(np.int64)


def sample_batch(
    request: Request, denoiser: Denoiser, first: int, labels: np.ndarray, stop_requested: StopRequested = lambda: None
) -> Part:
    """Samples first … first+n-1, in order. labels: int64 (n,), n <= batch; ignored by a model without classes.

    Raises Stopped at any step but the last, DoNotRetry if the network's output is not finite.
    """
    num, device = len(labels), denoiser.device
    initial_key, step_key = rng.key(request.seed, "x_T"), rng.key(request.seed, "sampler")
    index = torch.arange(first, first + num, device=device)
    row = index % request.batch

    def in_rows(values: Tensor) -> Tensor:
        """Values of the samples (num, ...) at their rows (batch, ...); unused rows are zeros."""
        return values.new_zeros(request.batch, *values.shape[1:]).index_copy_(0, row, values)

    def poll(step: samplers.SamplerStep | None = None) -> None:
        finished = step is not None and step.index + 1 == step.num_steps  # keep that batch, stop before the next
        if not finished and (reason := stop_requested()):
            raise Stopped(reason)

    poll()
    with torch.inference_mode():
        result = samplers.sample(
            _eps_model(request, denoiser, in_rows(torch.from_numpy(labels).to(device))),
            samplers.SAMPLERS[request.sampler](
                denoiser.schedule, request.steps, eta=request.eta, variance=request.variance or denoiser.variance
            ),
            in_rows(rng.normal(initial_key, index, 0, denoiser.image_shape)),
            noise=lambda t: in_rows(rng.normal(step_key, index, t, denoiser.image_shape)),
            clip_x_0=request.clip_x_0,
            callback=poll,
        )
        x_0 = result.x_0[row]
        if not torch.isfinite(x_0).all():
            raise DoNotRetry(
                f"samples {first} to {first + num - 1} are not finite: the {request.weights} weights of step "
                f"{request.checkpoint.step} diverged, or {request.precision} is too narrow for them; make "
                f"another --set with another --step, or with --precision fp32"
            )
        return Part(samplers.to_images(x_0), result.nfe)


def _eps_model(request: Request, denoiser: Denoiser, labels: Tensor) -> samplers.EpsModel:
    """labels: int64 (batch,)"""
    if not denoiser.num_classes:
        return lambda x_t, t: denoiser.eps(x_t, t, None)
    if request.guidance is None:
        return lambda x_t, t: denoiser.eps(x_t, t, labels)
    return Guided(denoiser.eps, labels, denoiser.num_classes, request.guidance)


def _check_fit(request: Request, denoiser: Denoiser) -> None:
    num_classes = denoiser.num_classes
    if request.guidance is not None and not num_classes:
        raise RequestError(f"guidance = {request.guidance}: the model has no classes (model.num_classes = 0)")
    if request.class_plan is not None and len(request.class_plan) != num_classes:
        raise RequestError(
            f"class_plan = {list(request.class_plan)}: needs one count for each of the model's {num_classes} classes"
        )


def _remove_stale(sample_set: SampleSet, request: Request, index: int, batches: list[tuple[int, int]]) -> None:
    """Remove temporaries that killed lives left of this shard, and of no other."""
    finals = [sample_set.shard(index, request.shards), sample_set.shard_manifest(index, request.shards)]
    for final in finals + [part_path(sample_set, first, num) for first, num in batches]:
        for stale in final.parent.glob(f"{files.TMP_PREFIX}{final.name}.*"):
            stale.unlink(missing_ok=True)


def _already_published(sample_set: SampleSet, request: Request, index: int) -> dict[str, Any] | None:
    """The manifest of a good shard, else None. A bad shard is removed, manifest first, so that it no longer counts."""
    try:
        return verify_shard(sample_set, request, index).manifest
    except FileNotFoundError:
        pass
    except DamagedFile as e:
        say(f"shard={index} set={sample_set.name} damaged, computing it again: {e}")
    withdraw_shard(sample_set, request, index)
    sample_set.shard(index, request.shards).unlink(missing_ok=True)
    return None
