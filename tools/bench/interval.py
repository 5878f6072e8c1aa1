"""Whether the interval of a Fréchet distance holds the expected distance, and how near its limit comes to the true one.

    python -m tools.bench.interval [--draws 200]

Samples of a known normal distribution are drawn again and again, and compared with another one. The expected distance
at this number of samples is the mean over the draws. Beside the limit, a line through growing parts of the sample, as
it is usually fitted.
"""

from __future__ import annotations

import launch.first  # noqa: F401

# isort: split
import argparse
from functools import reduce
from typing import NamedTuple

import numpy as np

from ddpm.scoring import interval, metrics
from ddpm.scoring.gather import gather
from launch.terminal import console


class Coverage(NamedTuple):
    true: float
    expected: float
    """The expected distance at this number of samples."""
    deviation: float
    """The standard deviation of the distance from draw to draw."""
    covered: float
    """Share of draws whose interval holds the expected distance."""
    half_width: float
    limit: float
    """Mean of the extrapolated distances."""
    limit_deviation: float
    growing: float
    """The same by a line through growing parts."""
    growing_deviation: float


def coverage(d: int, num: int, draws: int) -> Coverage:
    rng = np.random.default_rng(1)
    turned = np.linalg.qr(rng.standard_normal((d, d)))[0]
    cov = (turned * np.exp(rng.uniform(-3, 1, d))) @ turned.T
    mean, reference = 0.05 * rng.standard_normal(d), np.diag(1.1 * np.exp(rng.uniform(-3, 1, d)))
    L, origin = np.linalg.cholesky(cov), np.zeros(d)
    rows = []
    for _ in range(draws):
        groups = gather([mean + rng.standard_normal((num, d)) @ L.T], num).groups
        total = reduce(metrics.merge, groups)
        distance = metrics.frechet_distance(total.mean, metrics.covariance(total), origin, reference)
        trust = interval.trust(groups, origin, reference)
        growing = []
        for k in (5, 10, 15, 20):
            part = reduce(metrics.merge, groups[:k])
            of_part = metrics.frechet_distance(part.mean, metrics.covariance(part), origin, reference)
            growing.append((1 / part.num, of_part))
        inverses, of_parts = np.array(growing).T
        line = np.polynomial.Polynomial.fit(inverses, of_parts, 1)
        rows.append((distance, trust.half_width, distance + trust.shift, float(line(0.0))))
    distances, half_widths, limits, lines = np.array(rows).T
    expected = float(distances.mean())
    return Coverage(
        true=metrics.frechet_distance(mean, cov, origin, reference),
        expected=expected,
        deviation=float(distances.std()),
        covered=float((np.abs(distances - expected) <= half_widths).mean()),
        half_width=float(half_widths.mean()),
        limit=float(limits.mean()),
        limit_deviation=float(limits.std()),
        growing=float(lines.mean()),
        growing_deviation=float(lines.std()),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    draws = parser.parse_args().draws
    if draws < 2:
        parser.error(f"--draws {draws}: give 2 or more")
    for d in (64, 256):
        found = coverage(d, 5000, draws)
        print(f"d = {d}, 5,000 samples, {draws} draws: the 95 % interval holds the expected distance in "
              f"{found.covered:.1%}")  # fmt: skip
        print(f"  true {found.true:.3f}, expected {found.expected:.3f} ± {found.deviation:.3f}, half width "
              f"{found.half_width:.3f}")  # fmt: skip
        print(f"  limit {found.limit:.3f} ± {found.limit_deviation:.3f}; by growing parts {found.growing:.3f} ± "
              f"{found.growing_deviation:.3f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    console.run_script(main)
