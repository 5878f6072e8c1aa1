import numpy as np
import pytest
import scipy.linalg

from ddpm.scoring import metrics


def features(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3 * rng.standard_normal(d)).astype(np.float32)


def moments_and_cov(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    m = metrics.from_features(x)
    return m.mean, metrics.covariance(m)


def test_moments_are_those_of_numpy() -> None:
    x = features(200, 17, 0)
    mean, cov = moments_and_cov(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False, dtype=np.float64), rtol=1e-12, atol=1e-12)
    assert mean.dtype == cov.dtype == np.float64


def test_merging_parts_gives_the_whole_even_far_from_zero() -> None:
    x = features(301, 12, 1).astype(np.float64) + 1e5  # raw sums of squares would lose 10 digits here
    parts = [metrics.from_features(p) for p in np.split(x, [1, 40, 41, 200])]
    merged = parts[0]
    for part in parts[1:]:
        merged = metrics.merge(merged, part)
    whole = metrics.from_features(x)
    assert merged.num == whole.num
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9, atol=1e-9 * np.abs(whole.m2).max())


def test_a_covariance_of_one_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        metrics.covariance(metrics.from_features(features(1, 3, 0)))


def test_frechet_distance_agrees_with_sqrtm_on_full_rank() -> None:
    (m1, s1), (m2, s2) = moments_and_cov(features(400, 40, 2)), moments_and_cov(features(300, 40, 3))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * root)
    assert metrics.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_that_of_pytorch_fids_function() -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance

    (m1, s1), (m2, s2) = (moments_and_cov(features(900, 120, seed).clip(min=0)) for seed in (8, 9))  # as after a ReLU
    theirs = calculate_frechet_distance(m1, s1, m2, s2)
    assert metrics.frechet_distance(m1, s1, m2, s2) == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize(("n1", "n2"), [(30, 20), (500, 20), (20, 500), (2, 2)])
def test_frechet_distance_of_rank_deficient_data_is_the_closed_form(n1: int, n2: int) -> None:
    # with cov = A'A, tr (cov1 cov2)^1/2 is the sum of the singular values of A1 A2' (no square root of a matrix at all)
    x, y = features(n1, 200, 4), features(n2, 200, 5)
    a = [(z - z.mean(0)).astype(np.float64) / np.sqrt(len(z) - 1) for z in (x.astype(np.float64), y.astype(np.float64))]
    trace_of_root = np.linalg.svd(a[0] @ a[1].T, compute_uv=False).sum()
    (m1, s1), (m2, s2) = moments_and_cov(x), moments_and_cov(y)
    expected = np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * trace_of_root
    assert metrics.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(m2, s2, m1, s1) == pytest.approx(expected, rel=1e-10)


def test_a_covariance_that_is_all_but_singular_is_measured_as_exactly_as_others() -> None:
    """Where Cholesky's factor has lost its digits, and no eigenvalue is lost in rounding: as of a few images more than
    dimensions."""
    rng, looked_at = np.random.default_rng(0), 0
    for _ in range(300):
        d = int(rng.integers(2, 8))
        turned = np.linalg.qr(rng.standard_normal((d, d)))[0]
        scale = np.logspace(0, rng.uniform(-5.6, -4.9), d)[rng.permutation(d)]
        cov = scale[:, None] * ((turned * np.linspace(0.5, 2, d)) @ turned.T) * scale
        cov, identity, zero = (cov + cov.T) / 2, np.eye(d), np.zeros(d)
        L = metrics.root(cov)
        looked_at += L.shape == cov.shape and bool(np.triu(L, 1).any())
        exact = d + np.trace(cov) - 2 * np.sqrt(np.linalg.eigvalsh(cov).clip(min=0)).sum()
        assert metrics.frechet_distance(zero, identity, zero, cov) == pytest.approx(exact, rel=1e-7)
    assert looked_at > 100


@pytest.mark.parametrize("n", [10, 400])
def test_frechet_distance_of_a_set_to_itself_is_zero_and_never_negative(n: int) -> None:
    mean, cov = moments_and_cov(features(n, 60, 6))
    assert 0 <= metrics.frechet_distance(mean, cov, mean, cov) < 1e-5 * np.trace(cov)


def test_frechet_distance_of_a_shift_and_of_point_masses() -> None:
    mean, cov = moments_and_cov(features(400, 30, 7))
    assert metrics.frechet_distance(mean, cov, mean + 2.0, cov) == pytest.approx(30 * 4.0, rel=1e-8)
    zero = np.zeros_like(cov)
    assert metrics.frechet_distance(mean, zero, mean, cov) == pytest.approx(np.trace(cov))
    assert metrics.frechet_distance(mean, zero, mean, zero) == 0.0
