"""Bits per dimension: the closed form of a Gaussian, parts that are the whole, kills, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.data.packed import PackedImages, images_digest
from ddpm.diffusion import rng
from ddpm.diffusion.bound import log_level, variational_bound
from ddpm.diffusion.schedule import Schedule, linear
from ddpm.errors import DoNotRetry, RequestError, Stopped
from ddpm.run.claims import OthersAtWork, Worker
from ddpm.run.paths import RunDir
from ddpm.sampling.denoiser import Denoiser, LabelledEpsModel
from ddpm.sampling.request import CheckpointRef
from ddpm.scoring import bound_request
from ddpm.scoring.bound_request import BoundRequest
from ddpm.scoring.likelihood import bits_per_dim
from ddpm.scoring.record import scores_of, told

MEAN, SPREAD = 0.1, 0.3
"""Of the data's distribution, whose noise is known exactly."""
STEPS = 25


def exact_eps(schedule: Schedule) -> LabelledEpsModel:
    """E[eps | x_t] where every element of x_0 is normal, by itself."""
    alpha_bar = dict(zip(schedule.timesteps.tolist(), schedule.alpha_bar.tolist(), strict=True))

    def eps(x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        a = alpha_bar[int(t[0])]
        wide = a * SPREAD**2 + 1 - a
        return (1 - a) ** 0.5 * (x_t.double() - a**0.5 * MEAN) / wide

    return eps


def closed_form(schedule: Schedule, levels: np.ndarray, variance: str) -> tuple[float, float, float]:
    """The three parts' expectation over the noise, in bits: L_0 by the trapezoid rule over it."""
    levels, counts = np.unique(levels, return_counts=True)
    a, beta, small = (x.numpy() for x in (schedule.alpha_bar, schedule.beta, schedule.posterior_variance))
    model = {"fixed_large": beta, "fixed_small": small}[variance]
    x = levels[:, None]
    wide = a * SPREAD**2 + 1 - a
    # the error of the predicted x_0 is normal: mean, variance
    off, var = (x - MEAN) * (1 - a) / wide, a * SPREAD**4 * (1 - a) / wide**2
    squared = schedule.posterior_x_0.numpy() ** 2 * (off**2 + var)
    of, to = small[1:], model[1:]  # at t = 0 there is the decoder
    between = 0.5 * (of / to - 1 - np.log(of / to) + squared[:, 1:] / to)
    prior = 0.5 * (1 - a[-1] - 1 - np.log(1 - a[-1]) + a[-1] * x[:, 0] ** 2)
    e, step = np.linspace(-9, 9, 4001, retstep=True)
    predicted = levels[:, None] - (off[:, :1] - var[0] ** 0.5 * e)
    log = log_level(
        torch.from_numpy(np.broadcast_to(levels[:, None], predicted.shape).copy()),
        torch.from_numpy(predicted),
        math.sqrt(small[1]),
    ).numpy()
    decoder = -(log * np.exp(-(e**2) / 2)).sum(1) * step / math.sqrt(2 * math.pi)
    parts = (prior, between.sum(1), decoder)
    return tuple(float(np.average(part, weights=counts)) / math.log(2) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_bound_of_a_gaussian_is_its_closed_form(variance: str) -> None:
    """With noise that is a quadrature: equally likely values of mean 0 and variance 1, in the order of the elements."""
    schedule = linear(STEPS, 1e-4, 0.02)
    levels = np.array([-1.0, -0.6, 0.1, 0.5, 1.0]).round(6)
    levels = np.round((levels + 1) * 127.5) / 127.5 - 1
    num = 20_000
    nodes = torch.special.ndtri((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    nodes = (nodes / nodes.square().mean().sqrt()).view(1, 1, 100, 200)
    x_0 = torch.from_numpy(levels).view(-1, 1, 1, 1).expand(-1, 1, 100, 200)
    model = exact_eps(schedule)
    got = variational_bound(
        lambda x_t, t: model(x_t, t, None), schedule, x_0, lambda i: nodes, variance=variance, clip_x_0=False
    )
    want = closed_form(schedule, levels, variance)
    assert got.shape == (5, 3)
    np.testing.assert_allclose(got.mean(0).numpy(), want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(float(got[:, 0].mean()), want[0], rtol=1e-9)  # no noise in it
    assert abs(float(got.sum(1).mean()) - sum(want)) < 1e-4


def test_all_levels_together_are_certain_and_far_ones_finite() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (0.0, 0.99, -3.0):
        log = log_level(levels, torch.full_like(levels, mean), 0.02)
        assert torch.isfinite(log).all() and abs(float(log.exp().sum()) - 1) < 1e-12


def test_an_unknown_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="fixed_large, fixed_small"):
        schedule = linear(STEPS, 1e-4, 0.02)
        variational_bound(
            lambda x_t, t: x_t, schedule, torch.zeros(1, 1, 1, 1), lambda i: None, variance="learned", clip_x_0=True
        )


# ---------------------------------------------------------------- a run's


def images(num: int = 23) -> PackedImages:
    drawn = np.random.default_rng(0).normal(MEAN, SPREAD, (num, 6, 6, 3))
    levels = np.clip(np.round((drawn + 1) * 127.5), 0, 255).astype(np.uint8)
    return PackedImages(levels, np.zeros(num, np.int64), "gauss", "test", images_digest(levels))


def a_request(**changes: Any) -> BoundRequest:
    base = BoundRequest(CheckpointRef(12, "ab" * 32), "ema", "test", None, 3, 5, "fp32", "fixed_large", False)
    return dataclasses.replace(base, **changes)


class Made:
    """A run, and a network that counts the rows it is given."""

    def __init__(self, where: Path, request: BoundRequest | None = None) -> None:
        self.run, self.request = RunDir(where), request or a_request()
        self.run.path.mkdir(parents=True, exist_ok=True)
        bound_request.publish(self.run.bound_set(self.request.name), self.request)
        self.calls = 0

    def denoiser(self) -> Denoiser:
        schedule = linear(STEPS, 1e-4, 0.02)
        exact = exact_eps(schedule)

        def eps(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            self.calls += 1
            assert len(x_t) == self.request.batch and x_t.dtype == torch.float32
            return exact(x_t, t, labels).float()

        return Denoiser(eps, schedule, (3, 6, 6), "fixed_large", 0, torch.device("cpu"))

    def __call__(self, of: PackedImages | None = None, **options: Any) -> dict[str, Any]:
        record = bits_per_dim(
            self.run, self.request, of or images(), self.denoiser,
            timesteps=STEPS, num_classes=0, command=["x"], **options,
        )  # fmt: skip
        return {k: v for k, v in record.items() if k not in ("created", "self_sha256")}


def test_a_runs_number_is_the_closed_form_to_the_error_of_its_draws(tmp_path: Path) -> None:
    some = images(200)
    record = Made(tmp_path, a_request(batch=50))(some)
    want = closed_form(linear(STEPS, 1e-4, 0.02), (some.images / 127.5 - 1.0).ravel(), "fixed_large")
    low, high = record["bits_per_dim_interval"]
    assert low < sum(want) < high and (high - low) / 2 < 0.1
    assert record["bits_per_dim"] == pytest.approx(record["rate"] + record["distortion"], abs=1e-12)
    assert record["reference"]["num_images"] == record["num_samples"] == 200 and record["nfe"] == STEPS


def test_a_killed_one_computes_nothing_twice_and_gives_the_whole(tmp_path: Path) -> None:
    whole, killed = Made(tmp_path / "a"), Made(tmp_path / "b")
    expected = whole()
    assert whole.calls == 5 * STEPS
    polls = iter([None] * (2 * STEPS + 3) + ["preempted"])
    with pytest.raises(Stopped):
        killed(worker=Worker(lambda: next(polls)))
    assert killed.calls == 2 * STEPS + 3
    shown: list[tuple[int, int]] = []
    assert killed(progress=lambda *p: shown.append(p)) == expected
    assert killed.calls == 5 * STEPS + 3 and shown == [(15, 23), (20, 23), (23, 23)]
    before = killed.calls
    for part in killed.run.bound_set(killed.request.name).path.glob("part-*"):
        part.unlink()
    assert killed() == expected and killed.calls == before  # it is published
    (score,) = scores_of(killed.run, killed.request.name)
    assert not score.damage and told(score.record).endswith(f"bits/dim, bound of 23 of test, {STEPS} an image")


def test_a_part_that_is_damaged_or_of_other_images_is_made_again(tmp_path: Path) -> None:
    made = Made(tmp_path)
    expected = made()
    part = made.run.bound_set(made.request.name).part(1)
    part.write_bytes(part.read_bytes()[:-8] + bytes(8))
    made.run.score(made.request.name).unlink()
    made.calls = 0
    assert made() == expected and made.calls == STEPS
    other = images()
    other.images[0] ^= 1
    made.calls = 0
    changed = made(dataclasses.replace(other, digest=images_digest(other.images)))
    assert made.calls == 5 * STEPS and changed["reference"] != expected["reference"]


def test_a_seeded_part_of_the_images_is_named_beside_the_number(tmp_path: Path) -> None:
    made = Made(tmp_path, a_request(num_images=7))
    record = made()
    assert made.request.name == "bits-per-dim-test-7-step12-seed3" and record["num_samples"] == 7
    assert "bound of 7 of the 23 of test (seed 3)" in told(record)
    index = np.sort(rng.permutation(rng.key(3, "bound_images"), 0, 23)[:7].numpy())
    assert index.tolist() != list(range(7))
    with pytest.raises(RequestError, match="num_images = 24: gauss has 23 images"):
        Made(tmp_path / "b", a_request(num_images=24))()


def test_a_network_that_diverged_has_no_number(tmp_path: Path) -> None:
    made = Made(tmp_path)
    broken = dataclasses.replace(made.denoiser(), eps=lambda x_t, t, labels: x_t * float("nan"))
    made.denoiser = lambda: broken  # type: ignore[method-assign]
    with pytest.raises(DoNotRetry, match=r"not finite: the ema weights of step 12 .*; give another --step"):
        made()
    assert not scores_of(made.run, made.request.name)


def _task(where: Path, stay: bool, calls: Any) -> None:
    torch.set_num_threads(1)
    made = Made(where)
    with contextlib.suppress(OthersAtWork):
        made(worker=Worker(stay=stay))
    calls.put(made.calls)


def test_tasks_share_the_parts_and_none_is_made_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    calls = context.Queue()
    tasks = [context.Process(target=_task, args=(tmp_path / "a", i == 0, calls)) for i in range(3)]
    for task in tasks:
        task.start()
    made = [calls.get(timeout=60) for _ in tasks]
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0, 0] and sum(made) == 5 * STEPS
    a, b = Made(tmp_path / "a"), Made(tmp_path / "b")
    assert a() == b() and a.calls == 0


def test_another_request_under_the_same_name_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path)
    with pytest.raises(RequestError, match="precision is 'fp32' there and 'bf16' asked for"):
        Made(tmp_path, a_request(precision="bf16"))
    request = made.run.bound_set(made.request.name).request
    request.write_text(request.read_text().replace("fp32", "bf16"))
    with pytest.raises(RequestError, match="its digest does not match"):
        bound_request.read(made.run.bound_set(made.request.name))
