"""All scores of a set against a reference, from what `gather` has kept of their features.

Owns which scores there are, their names, and which of them need what. Must not know files, sample sets or images.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ddpm.errors import DDPMError
from ddpm.run.log import say
from ddpm.scoring import interval, metrics
from ddpm.scoring.gather import Gathered
from ddpm.scoring.kernel_distance import kernel_distance
from ddpm.scoring.manifold import manifold_scores
from ddpm.scoring.reference import Reference


def all_scores(of: Gathered, reference: Reference, *, published: bool) -> dict[str, Any]:
    """The numbers of a score record by their public names, without those that this reference does not allow.

    published: whether the features are those that FID, KID and Inception Score are defined with.
    """
    fid, kid = ("fid", "kid") if published else ("frechet_distance", "kernel_distance")
    if not all(np.isfinite(values).all() for values in (of.moments.m2, reference.mu, reference.sigma)):
        raise DDPMError("the Fréchet distance is not finite: features or reference hold values that are not")
    say("computing the scores", samples=of.moments.num, dimensions=len(reference.mu))
    cov = metrics.covariance(of.moments)
    distance = metrics.frechet_distance(of.moments.mean, cov, reference.mu, reference.sigma)
    scores: dict[str, Any] = {fid: distance}
    if of.groups:
        trust = interval.trust(of.groups, reference.mu, reference.sigma)
        scores[f"{fid}_interval"] = [max(0.0, distance - trust.half_width), distance + trust.half_width]
        scores[f"{fid}_infinity"] = distance + trust.shift
    if reference.features is not None:
        kernel = kernel_distance(of.chosen, reference.features)
        scores |= {kid: kernel.mean, f"{kid}_std": kernel.std, f"{kid}_subset_size": kernel.subset_size}
    if published and of.inception_score is not None:
        scores["inception_score"], scores["inception_score_std"] = of.inception_score
    if reference.features is not None and (neighbours := manifold_scores(of.chosen, reference.features)):
        compared = {"num_samples": len(of.chosen), "num_reference": len(reference.features)}
        scores["manifold"] = {**neighbours._asdict(), **compared}
    if of.classes and len(of.classes) == len(reference.classes):
        scores[f"{fid}_per_class"] = [
            None
            if a is None or b is None
            else metrics.frechet_distance(a.mean, metrics.covariance(a), b.mean, metrics.covariance(b))
            for a, b in zip(of.classes, reference.classes, strict=True)
        ]
    if bad := [name for name, value in scores.items() if not _is_finite(value)]:
        raise DDPMError(f"{', '.join(bad)}: not finite, so there is no score: features or reference are beyond all use")
    return {**scores, "dimensions": len(reference.mu)}


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return value is None or math.isfinite(value)
