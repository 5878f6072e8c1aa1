"""The scores beside the Fréchet distance equal those of the tools that people know, on the same features."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ddpm.scoring.inception_score import InceptionScore
from ddpm.scoring.kernel_distance import kernel_distance
from ddpm.scoring.manifold import manifold_scores
from tests.unit.scoring.peers import KEPT, features


@pytest.fixture(scope="module")
def theirs() -> dict[str, float]:
    return json.loads(KEPT.read_text())


def test_the_kernel_distance_is_torch_fidelitys(theirs: dict[str, float]) -> None:
    x, y, _ = features()
    mean, std, size = kernel_distance(x, y)
    assert size == 1000
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-9)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-9)


@pytest.mark.parametrize("cuts", [[], [1, 500, 777]])
def test_the_inception_score_is_torch_fidelitys_in_whatever_parts(theirs: dict[str, float], cuts: list[int]) -> None:
    x, _, classifier = features()
    score = InceptionScore(len(x), classifier)
    for part in np.split(x, cuts):
        score.add(part)
    mean, std = score.result()
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_precision_and_recall_are_torch_fidelitys_and_density_and_coverage_prdcs(theirs: dict[str, float]) -> None:
    x, y, _ = features()
    scores = manifold_scores(x, y)
    assert scores is not None
    for name, value in scores._asdict().items():
        assert value > 0.1 and value == pytest.approx(theirs[name], abs=1e-6), name


def test_copies_of_a_feature_are_each_others_neighbours() -> None:
    x, y, _ = features()
    copied = np.repeat(x[:5], 20, axis=0)
    scores = manifold_scores(copied, y[:100])
    assert scores is not None and scores.recall == 0.0  # balls without extent


def test_what_has_no_fifth_neighbour_has_no_such_scores() -> None:
    x, y, _ = features()
    assert manifold_scores(x[:5], y) is None and manifold_scores(x, y[:5]) is None
    assert manifold_scores(x[:6], y) is not None


def test_the_only_subset_that_there_is_has_no_deviation() -> None:
    x, y, _ = features()
    mean, std, size = kernel_distance(x[:300], y[:300])
    assert size == 300 and std is None and mean == pytest.approx(kernel_distance(x[:300][::-1], y[:300])[0], abs=1e-12)
