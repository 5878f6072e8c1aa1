"""What scores cost and how exact they are, beside pytorch-fid's: two rows of the bench, and more at full size:

    python -m tools.bench.scores [--dim 2048] [--shards 1250]

Features are random, with a spectrum that falls as those of images do. The second part merges a million of them: what a
shard takes, early and late, and how much memory all of it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch

from ddpm.scoring import interval, metrics
from ddpm.scoring.extractors import build_extractor, random_weights
from ddpm.scoring.gather import gather
from ddpm.scoring.kernel_distance import kernel_distance
from ddpm.scoring.manifold import manifold_scores
from tools.bench.figures import Figure, Result, ratio
from tools.bench.machine import peaks
from tools.bench.measure import Bench
from tools.bench.workloads import flops

T = TypeVar("T")
SHARD = 800


def timed(what: str, work: Callable[[], T]) -> T:
    began, worked = time.monotonic(), time.process_time()
    result = work()
    cpu = time.process_time() - worked
    print(f"{what:60}{time.monotonic() - began:9.2f} s, {cpu:9.2f} s of CPU", flush=True)
    return result


def features(num: int, d: int, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spectrum = scale / np.sqrt(np.arange(1, d + 1))
    mixed = (rng.standard_normal((num, d)) * spectrum) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (mixed + 0.3).astype(np.float32)


def frechet(bench: Bench) -> Result:
    from pytorch_fid.fid_score import calculate_frechet_distance

    torch.set_num_threads(bench.threads)
    d = bench.pick(gpu=2048, cpu=2048, small=256)
    sides = [metrics.from_features(features(2 * d, d, seed, 1 + seed / 10)) for seed in (0, 1)]
    both = [value for side in sides for value in (side.mean, metrics.covariance(side))]
    values = {}

    def ours() -> None:
        values["ours"] = metrics.frechet_distance(*both)

    def theirs() -> None:
        values["theirs"] = calculate_frechet_distance(*both)

    times = bench.in_turns({"ours": ours, "theirs": theirs}, rounds=7, warm_up=0)
    goal = bench.goal(cpu=10, gpu=10)
    return Result([
        Figure(f"Fréchet distance at {d}", statistics.median(times["ours"]), "s"),
        ratio("against pytorch-fid", times["theirs"], times["ours"], at_least=goal),
        Figure("relative difference", abs(values["ours"] / values["theirs"] - 1),
               at_most=bench.goal(cpu=1e-6, gpu=1e-6)),
    ])  # fmt: skip


def inception(bench: Bench) -> Result:
    """In float32 without TF32, as scores are computed; random weights."""
    from pytorch_fid.inception import InceptionV3

    torch.set_num_threads(bench.threads)
    batch = bench.pick(gpu=256, cpu=16, small=1)
    images = np.random.default_rng(0).integers(0, 256, size=(batch, 32, 32, 3), dtype=np.uint8)
    extractor = build_extractor("random-inception", bench.device)
    network = pytorch_fids(InceptionV3).to(bench.device)
    values = {}

    def ours() -> None:
        values["ours"] = extractor(images)

    def theirs() -> None:
        x = torch.from_numpy(images).to(bench.device).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            values["theirs"] = network(x)[0][:, :, 0, 0].cpu().numpy()

    times = bench.in_turns({"ours": ours, "theirs": theirs}, rounds=7)
    own, other = values["ours"], values["theirs"]
    work = flops(extractor.forward, torch.zeros(1, 3, 32, 32, device=bench.device))
    limit = None if bench.gpu else peaks(bench).flops_per_s / work  # a GPU's peak is measured in bf16
    return Result([
        Figure(f"Inception features, batch {batch}", batch / statistics.median(times["ours"]), "images/s",
               at_least=bench.goal(gpu=1250), limit=limit),
        ratio("against pytorch-fid", times["theirs"], times["ours"], at_least=bench.goal(cpu=1.2)),
        Figure("largest difference, to their largest", float(np.abs(own - other).max() / np.abs(other).max()),
               at_most=bench.goal(cpu=1e-5)),
    ])  # fmt: skip


def pytorch_fids(build: Any) -> Any:
    """Its network with our random weights: its own are downloaded."""
    from pytorch_fid import inception as fid

    state, _ = random_weights()
    with mock.patch.object(fid, "load_state_dict_from_url", lambda *_, **__: state):
        return build([3]).eval()


def exactness_and_speed(d: int) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = features(5 * d, d, 0), features(5 * d, d, 1, 1.1)
    gathered = timed(f"gathering {len(x):,} features of {d} dimensions", lambda: gather([x], len(x)))
    m1, s1 = gathered.moments.mean, metrics.covariance(gathered.moments)
    moments = metrics.from_features(y)
    m2, s2 = moments.mean, metrics.covariance(moments)
    ours = timed("Fréchet distance", lambda: metrics.frechet_distance(m1, s1, m2, s2))
    theirs = timed("Fréchet distance, pytorch-fid's function", lambda: calculate_frechet_distance(m1, s1, m2, s2))
    print(f"  relative difference {abs(ours - theirs) / theirs:.1e}")
    timed("its interval and limit", lambda: interval.trust(gathered.groups, m2, s2))
    few = d // 2
    a, b = (z[:few].astype(np.float64) - z[:few].mean(axis=0, dtype=np.float64) for z in (x, y))
    sides = map(metrics.from_features, (x[:few], y[:few]))
    (mean1, cov1), (mean2, cov2) = ((side.mean, metrics.covariance(side)) for side in sides)
    singular = timed(
        f"Fréchet distance, {few} samples a side", lambda: metrics.frechet_distance(mean1, cov1, mean2, cov2)
    )
    roots = np.linalg.svd(a @ b.T / (few - 1), compute_uv=False).sum()
    exact = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * roots
    print(f"  relative difference from the exact value {abs(singular - exact) / exact:.1e}")
    timed("kernel distance, 100 subsets of 1,000", lambda: kernel_distance(x, y))
    timed(f"precision, recall, density, coverage of {len(x):,}", lambda: manifold_scores(x[:10_000], y[:10_000]))


def merging(d: int, shards: int) -> None:
    num = shards * SHARD
    shard = features(SHARD, d, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []

    def came() -> Iterator[np.ndarray]:
        for _ in range(shards):
            times.append(time.process_time())  # of this process alone: others may share the cores
            yield shard

    timed(f"gathering {num:,} features of {d} dimensions in {shards} shards", lambda: gather(came(), num))
    taken = np.diff(times)
    quarter = len(taken) // 4
    early, late = taken[quarter : 2 * quarter].mean(), taken[-quarter:].mean()  # the first fills what gathers
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024**2
    print(f"  a shard takes {1000 * early:.0f} ms of CPU early, {1000 * late:.0f} ms late; {more:.2f} GiB more memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=1250)
    args = parser.parse_args()
    merging(args.dim, args.shards)
    exactness_and_speed(args.dim)


if __name__ == "__main__":
    main()
