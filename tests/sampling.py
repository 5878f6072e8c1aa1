"""Sample sets that tests make: a request, and shards by networks that are one line of arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ddpm.diffusion.schedule import Schedule
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling.denoiser import Denoiser, LabelledEpsModel
from ddpm.sampling.generate import generate_shard
from ddpm.sampling.request import CheckpointRef, Request, publish_request


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
