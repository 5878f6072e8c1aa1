"""What scores cost and how exact they are, beside pytorch-fid's. Features are random; their spectrum falls as that of
images does."""

from __future__ import annotations

import statistics
from typing import Any
from unittest import mock

import numpy as np
import torch

from ddpm.scoring import metrics
from ddpm.scoring.extractors import build_extractor, random_weights
from tools.bench.figures import Figure, Result, ratio
from tools.bench.machine import peaks
from tools.bench.measure import Bench
from tools.bench.workloads import flops


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
    """Inception features beside pytorch-fid's, in float32 without TF32, as for scores; random weights."""
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
    """pytorch-fid's network with our random weights, since its own would be downloaded."""
    from pytorch_fid import inception as fid

    state, _ = random_weights()
    with mock.patch.object(fid, "load_state_dict_from_url", lambda *_, **__: state):
        return build([3]).eval()
