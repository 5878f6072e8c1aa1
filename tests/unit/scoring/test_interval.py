from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ddpm.scoring import interval, metrics
from ddpm.scoring.gather import gather
from ddpm.scoring.metrics import Moments
from tools.bench.interval import coverage


def groups(num: int, d: int, seed: int = 0) -> tuple[list[Moments], np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((num, d)) @ np.diag(np.linspace(0.1, 2, d))
    return gather([x], num).groups, x


def test_the_interval_holds_the_expected_distance_and_the_limit_lies_nearer_the_true_one() -> None:
    """A small form of `python -m tools.bench.interval`."""
    found = coverage(d=8, num=400, draws=60)
    assert 0.88 <= found.covered <= 1.0 and found.half_width < 3 * found.deviation
    assert abs(found.limit - found.true) < 0.3 * (found.expected - found.true)


@pytest.mark.parametrize(("num", "d"), [(300, 9), (60, 90), (60, 150)])
def test_leaving_a_group_out_is_what_it_says(num: int, d: int) -> None:
    of, x = groups(num, d)
    mean, cov = np.zeros(d), np.diag(np.linspace(0.2, 1.5, d))

    def distance(rows: np.ndarray) -> float:
        return metrics.frechet_distance(rows.mean(0), np.cov(rows.T), mean, cov)

    group_of = interval.groups_of(num)
    without = np.array([distance(x[group_of != g]) for g in range(interval.GROUPS)])
    trust = interval.trust(of, mean, cov)
    variance = 19 / 20 * np.square(without - without.mean()).sum()
    assert trust.half_width == pytest.approx(2.0930240544 * np.sqrt(variance), rel=1e-5)
    assert trust.shift == pytest.approx(19 * (distance(x) - without.mean()), rel=1e-5)


def test_groups_are_the_same_size_and_independent_of_the_order_of_classes() -> None:
    group_of = interval.groups_of(1003)
    assert set(np.bincount(group_of)) == {50, 51}
    for classes in (2, 10, 20):
        in_turn = np.arange(1003) % classes
        shares = [np.bincount(in_turn[group_of == g], minlength=classes).max() for g in range(interval.GROUPS)]
        assert max(shares) < 50
    np.testing.assert_array_equal(group_of[:8], interval.groups_of(1003)[:8])


def test_too_few_samples_to_leave_some_out_have_no_interval() -> None:
    assert groups(39, 3)[0] == [] and len(groups(40, 3)[0]) == 20


def test_what_is_gathered_does_not_depend_on_how_features_came() -> None:
    x = np.random.default_rng(1).standard_normal((11_000, 5)).astype(np.float32)
    labels = np.arange(11_000) % 3
    parts = np.split(x, np.sort(np.random.default_rng(2).choice(np.arange(1, 11_000), 63, replace=False)))  # 64 shards
    whole, cut = (gather(came, 11_000, labels=labels, num_classes=3) for came in ([x], parts))
    for a, b in zip([*whole.groups, *whole.classes], [*cut.groups, *cut.classes], strict=True):
        assert a is not None and b is not None and a.num == b.num
        np.testing.assert_array_equal(a.m2, b.m2)
    np.testing.assert_array_equal(whole.chosen, cut.chosen)
    at_once, of_parts = metrics.from_features(x), cut.moments
    np.testing.assert_allclose(of_parts.m2, at_once.m2, rtol=1e-9, atol=1e-9 * len(x))
    mean, cov = np.full(5, 0.1), np.diag(np.linspace(0.5, 1.5, 5))
    distances = [metrics.frechet_distance(m.mean, metrics.covariance(m), mean, cov) for m in (at_once, of_parts)]
    assert distances[0] > 0.01 and distances[1] == pytest.approx(distances[0], rel=1e-9)
    assert len(whole.chosen) == 10_000 and len(np.unique(whole.chosen, axis=0)) == 10_000


def test_the_memory_that_a_merge_takes_does_not_grow_with_the_number_of_shards() -> None:
    """Beyond the features that are kept for comparison, which are 10,000 at most."""
    x, peaks = np.random.default_rng(1).standard_normal((800, 16)).astype(np.float32), []
    for shards in (20, 200):
        tracemalloc.start()
        found = gather((x for _ in range(shards)), 800 * shards)
        peaks.append(tracemalloc.get_traced_memory()[1] - 16 * 800 * shards)  # which group a sample is of, sorted once
        tracemalloc.stop()
        assert found.moments.num == 800 * shards and len(found.chosen) == 10_000
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_a_last_class_without_a_sample_is_one_all_the_same() -> None:
    x = np.random.default_rng(1).standard_normal((6, 2)).astype(np.float32)
    classes = gather([x], 6, labels=np.arange(6) % 2, num_classes=3).classes
    assert [None if m is None else m.num for m in classes] == [3, 3, None]


def test_where_a_sample_has_no_class_there_are_no_scores_by_class() -> None:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    assert gather([x], 6, labels=np.array([0, 1, -1, 0, 1, 2]), num_classes=3).classes == []
    assert gather([x], 6, labels=np.arange(6) % 2, num_classes=33).classes == []


def test_features_that_are_not_as_many_as_announced_are_refused() -> None:
    with pytest.raises(ValueError, match="3 features came of 4"):
        gather([np.zeros((3, 2), np.float32)], 4)
