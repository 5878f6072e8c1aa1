"""Sample sets that tests make: a request, and shards by networks that are one line of arithmetic, or a
small U-Net."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.config import schema
from ddpm.diffusion.schedule import Schedule
from ddpm.errors import Stopped
from ddpm.network.build import build_model
from ddpm.network.weights import cast_once
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling.denoiser import Denoiser, LabelledEpsModel
from ddpm.sampling.generate import generate_shard
from ddpm.sampling.request import CheckpointRef, Request, publish_request
from ddpm.sampling.shards import verify_shard
from tests.training import fill_zeros, make_config


def make_request(**changes: Any) -> Request:
    base = Request(
        checkpoint=CheckpointRef(12, "ab" * 32),
        weights="ema",
        sampler="ancestral",
        steps=3,
        eta=0.0,
        guidance=None,
        seed=5,
        num_samples=53,
        shards=8,
        batch=7,
        precision="fp32",
        class_plan=None,
    )
    return dataclasses.replace(base, **changes)


def make_set(path: Path, request: Request, name: str = "fid") -> SampleSet:
    """A set of a run at `path`, with its request published."""
    sample_set = RunDir(path).sample_set(name)
    publish_request(sample_set, request)
    return sample_set


def make_shard(sample_set: SampleSet, request: Request, index: int, eps: LabelledEpsModel) -> dict[str, Any]:
    """Shard `index`, of 4x4 images, in one step from alpha_bar = 0.7."""
    denoiser = Denoiser(
        eps=eps,
        schedule=Schedule.from_beta(torch.tensor([0.3], dtype=torch.float64)),
        image_shape=(3, 4, 4),
        variance="fixed_large",
        num_classes=0,
        device=torch.device("cpu"),
    )
    return generate_shard(sample_set, request, index, denoiser)


# ---------------------------------------------------------------- one request, made in several ways

SMALL_UNET = make_config(
    data__image_size=16,
    model__base_channels=64,
    model__channel_mults=[1, 2],
    model__attention_resolutions=[8],
    model__num_classes=3,
    train__label_dropout=0.1,
)
IN_EVERY_WAY = {
    "ddim": make_request(num_samples=24, batch=10, sampler="ddim", steps=4, precision="bf16"),
    "ancestral": make_request(num_samples=24, batch=10, sampler="ancestral", steps=3),
    "guided": make_request(num_samples=24, batch=10, sampler="ddim", steps=2, eta=1.0, guidance=1.5, precision="bf16"),
}
"""Of SMALL_UNET; the last batch has four samples, and the network always ten rows, or twenty."""


def denoiser_of(config: schema.Config, precision: str, device: torch.device) -> Denoiser:
    """A network as if trained, loaded as a job loads one."""
    network = build_model(config, device, precision).eval()
    fill_zeros(network, 0.1)
    cast_once(network, precision)
    return Denoiser.of(config, network, precision)


def digests_in_every_way(path: Path, request: Request, device: torch.device) -> tuple[dict[str, str], list[Denoiser]]:
    """The sha256 of a request's images, made as one shard by one life; as five shards by a life each, the last one
    first; and as two by two tasks, of which one is stopped in its second batch and goes on in another life. And the
    denoiser of each life."""
    lives: list[Denoiser] = []

    def life(sample_set: SampleSet, request: Request, shard: int, **options: Any) -> None:
        lives.append(denoiser_of(SMALL_UNET, request.precision, device))
        generate_shard(sample_set, request, shard, lives[-1], **options)

    found = {}
    for name, order in {"whole": [0], "reversed": [4, 3, 2, 1, 0], "stopped": [1, 0]}.items():
        sharded = dataclasses.replace(request, shards=len(order))
        sample_set = make_set(path, sharded, name)
        if name == "stopped":  # asked before a batch and after each of its steps but the last
            answers = chain([None] * (request.steps + 1), repeat("preempted"))
            with pytest.raises(Stopped):
                life(sample_set, sharded, 0, stop_requested=partial(next, answers))
            assert len(list(sample_set.part.glob("[!.]*"))) == 1
        for shard in order:
            life(sample_set, sharded, shard)
        images = np.concatenate([verify_shard(sample_set, sharded, i).images for i in range(len(order))])
        assert images.shape == (24, 16, 16, 3) and len(np.unique(images)) > 100
        found[name] = hashlib.sha256(images.tobytes()).hexdigest()
    return found, lives
