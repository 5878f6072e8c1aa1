"""Bits per dimension of a dataset under a model: computed in parts of one batch each, which are kept and then merged.

A part is a function of the request and its index: the network always runs at `batch` rows, so that the result does not
depend on which process made which part. It costs one evaluation of the network for each image and timestep. Must not
know jobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch

from ddpm.data.labels import labels_record
from ddpm.data.packed import PackedImages
from ddpm.diffusion import rng
from ddpm.diffusion.bound import variational_bound
from ddpm.errors import DoNotRetry, RequestError, Stopped
from ddpm.run import files
from ddpm.run.claims import ALONE, Worker
from ddpm.run.log import counted
from ddpm.run.paths import RunDir
from ddpm.run.stopping import ShowProgress, StopRequested
from ddpm.sampling.denoiser import Denoiser
from ddpm.scoring.bound_request import BoundRequest
from ddpm.scoring.features import keep_all, kept_array
from ddpm.scoring.record import publish_score, read_score, score_with
from ddpm.scoring.reference import image_record


def bits_per_dim(
    run: RunDir,
    request: BoundRequest,
    images: PackedImages,
    make_denoiser: Callable[[], Denoiser],
    *,
    timesteps: int,
    num_classes: int,
    command: list[str],
    progress: ShowProgress = lambda done, total: None,
    worker: Worker = ALONE,
) -> dict[str, Any]:
    """Compute missing parts, merge all, publish the score's record and return it; an existing record is returned at
    once.

    images: the request's split. make_denoiser: of the request's checkpoint, asked once, where a part is missing.
    timesteps: evaluations of an image. progress: counts images. Raises Stopped; OthersAtWork; RequestError for the
    images; DoNotRetry where the network's output is not finite.
    """
    where, batch = run.bound_set(request.name), request.batch
    index = chosen(request, images)
    parts = [index[first : first + batch] for first in range(0, len(index), batch)]
    data = {"images": images.digest, **({"labels": labels_record(images)["digest"]} if num_classes else {})}
    identity = {"request_digest": request.digest, "data_digest": files.sha256_json(data)}
    denoiser = cache(make_denoiser)

    places = {part: (where.part(part), {"part": part, "num": len(own), **identity}) for part, own in enumerate(parts)}

    def terms(part: int) -> np.ndarray:
        def compute() -> np.ndarray:
            return _terms(request, images, parts[part], denoiser(), worker.stop_requested)

        return kept_array(*places[part], (len(parts[part]), 3), compute, worker.token)

    def show(there: set[int]) -> None:
        progress(sum(len(parts[part]) for part in there), len(index))

    said = _provenance(request, len(index), images, timesteps)
    if (published := score_with(run, request.name, said)) is not None:
        return published
    keep_all(where.path, places, terms, show, worker)
    record = {
        **_merged(np.concatenate([terms(part) for part in places])),
        **said,
        "created": files.now(),
        "command": command,
    }
    return read_score(publish_score(run, request.name, record, worker.token))


def _provenance(request: BoundRequest, num: int, images: PackedImages, timesteps: int) -> dict[str, Any]:
    """What a bound was computed from; equal provenance means an equal one."""
    return {
        "num_samples": num,
        "reference": image_record(images),
        "checkpoint": {**asdict(request.checkpoint), "weights": request.weights},
        "bound": {"variance": request.variance, "clip_x_0": request.clip_x_0},
        "nfe": timesteps,
        "seed": request.seed,
        "precision": request.precision,
    }


def chosen(request: BoundRequest, images: PackedImages) -> np.ndarray:
    """Indices of the request's images, int64, ascending. Raises RequestError where there are fewer."""
    size, num = len(images), request.num_images
    if num is None:
        return np.arange(size)
    if num > size:
        raise RequestError(f"num_images = {num}: {images.name} has {counted(size, 'image')} to {images.split} with")
    return np.sort(rng.permutation(rng.key(request.seed, "bound_images"), 0, size)[:num].numpy())


def _merged(terms: np.ndarray) -> dict[str, Any]:
    """terms: float64 (n, 3), of `variational_bound`. Sums are exact, so that the order of images plays no part."""
    num = len(terms)
    prior, between, decoder = (math.fsum(column) / num for column in terms.T.tolist())
    each = terms.sum(1)
    value = math.fsum(each.tolist()) / num
    half = 1.96 * float(each.std(ddof=1)) / math.sqrt(num) if num > 1 else None
    return {
        "bits_per_dim": value,
        **({} if half is None else {"bits_per_dim_interval": [value - half, value + half]}),
        "rate": prior + between,
        "distortion": decoder,
        "prior": prior,
    }


def _terms(
    request: BoundRequest, images: PackedImages, index: np.ndarray, denoiser: Denoiser, stop_requested: StopRequested
) -> np.ndarray:
    """Of the images `index`, at most a batch of them: float64 (n, 3)."""
    device, num = denoiser.device, len(index)
    rows = np.zeros(request.batch, np.int64)
    rows[:num] = index  # and the first image in the rows that are left over
    x_0 = torch.from_numpy(np.ascontiguousarray(images.images[rows])).to(device).permute(0, 3, 1, 2).double()
    labels = torch.from_numpy(images.labels[rows]).to(device) if denoiser.num_classes else None
    key, places = rng.key(request.seed, "bound"), torch.from_numpy(rows).to(device)

    def poll() -> None:
        if reason := stop_requested():
            raise Stopped(reason)

    with torch.inference_mode():
        terms = variational_bound(
            lambda x_t, t: denoiser.eps(x_t, t, labels),
            denoiser.schedule,
            x_0 / 127.5 - 1.0,
            lambda i: rng.normal(key, places, i, denoiser.image_shape).double(),
            variance=request.variance,
            clip_x_0=request.clip_x_0,
            callback=poll,
        )[:num]
    if not torch.isfinite(terms).all():
        raise DoNotRetry(
            f"bits per dimension of images {index[0]} to {index[-1]} are not finite: the {request.weights} weights of "
            f"step {request.checkpoint.step} diverged, or {request.precision} is too narrow for them; give another "
            f"--step"
        )
    return terms.cpu().numpy()
