"""Features do not depend on where they are computed by more than the rounding of float32 sums."""

from __future__ import annotations

import numpy as np
import torch

from ddpm.scoring.extractors import build_extractor


def test_inception_features_are_within_a_thousandth_of_the_cpus(device: torch.device) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(16, 32, 32, 3), dtype=np.uint8)
    here = build_extractor("random-inception", "cpu")(images)
    there = build_extractor("random-inception", device)(images)
    assert np.abs(here - there).max() / np.abs(here).max() < 1e-3
