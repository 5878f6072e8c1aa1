"""ddpm/diffusion/samplers.py: the papers' update rules, where noise is used, what is counted and reported."""

import dataclasses
import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.diffusion.guidance import Guided
from ddpm.diffusion.samplers import SAMPLERS, Coefficients, SamplerStep, ancestral, ddim, dpmpp_2m, sample, to_images
from ddpm.diffusion.schedule import Schedule, cosine, linear
from tools.bench import sampler_orders

SCHEDULE = linear(1000, 1e-4, 0.02)
MEAN, STD = 0.2, 0.15


def _exact_eps(x_t: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] for data whose every pixel is N(MEAN, STD**2); its x_0 lies far inside [-1, 1]."""
    alpha_bar = SCHEDULE.alpha_bar[t].view(-1, 1, 1, 1)
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    return ((1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * MEAN) / variance).to(x_t.dtype)


class _Noise:
    """Normals by timestep, and which timesteps were asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.asked = shape, []

    def __call__(self, t: int) -> Tensor:
        self.asked.append(t)
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(t))


def _start(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(12345))


def _reference(steps: int, sigma_of: Callable[[dict], float], eps_form: Callable[[dict], Tensor], x: Tensor) -> Tensor:
    """An update rule in the paper's own symbols, float64, without clipping."""
    kept = SCHEDULE.respace(steps).timesteps.tolist()
    x = x.double()
    for i in reversed(range(steps)):
        t = kept[i]
        a = {"alpha_bar": SCHEDULE.alpha_bar[t].item(), "prev": SCHEDULE.alpha_bar[kept[i - 1]].item() if i else 1.0}
        a["alpha"] = a["alpha_bar"] / a["prev"]
        a["x"], a["eps"] = x, _exact_eps(x, torch.full((len(x),), t))
        a["sigma"] = sigma_of(a) if i else 0.0
        x = eps_form(a)
        if a["sigma"]:
            x = x + a["sigma"] * _Noise(tuple(x.shape))(t).double()
    return x


def _fixed_small(a: dict) -> float:
    return math.sqrt((1 - a["prev"]) / (1 - a["alpha_bar"]) * (1 - a["alpha"]))


@pytest.mark.parametrize(
    ("variance", "sigma_of"), [("fixed_large", lambda a: math.sqrt(1 - a["alpha"])), ("fixed_small", _fixed_small)]
)
@pytest.mark.parametrize("steps", [1, 50, 333])  # at 2 steps beta_t is about 1, and x_0 is clipped
def test_ancestral_is_algorithm_2(variance, sigma_of, steps):
    """In the paper's eps form (line 4), which shares no coefficient with the code."""
    x_T = _start(4, 3, 4, 4)

    def line_4(a: dict) -> Tensor:
        return (a["x"] - (1 - a["alpha"]) / math.sqrt(1 - a["alpha_bar"]) * a["eps"]) / math.sqrt(a["alpha"])

    result = sample(_exact_eps, ancestral(SCHEDULE, steps, variance=variance), x_T, noise=_Noise(x_T.shape))
    expected = _reference(steps, sigma_of, line_4, x_T)
    # float32 against float64: the first step divides by sqrt(alpha_bar) = 0.0064 what it has rounded; many
    # steps forget it
    torch.testing.assert_close(result.x_0.double(), expected, rtol=0, atol=5e-6 if steps > 2 else 1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_ddim_is_equation_12(eta, steps):
    x_T = _start(4, 3, 4, 4)

    def equation_12(a: dict) -> Tensor:
        x_0 = (a["x"] - math.sqrt(1 - a["alpha_bar"]) * a["eps"]) / math.sqrt(a["alpha_bar"])
        return math.sqrt(a["prev"]) * x_0 + math.sqrt(1 - a["prev"] - a["sigma"] ** 2) * a["eps"]

    result = sample(_exact_eps, ddim(SCHEDULE, steps, eta=eta), x_T, noise=_Noise(x_T.shape))
    expected = _reference(steps, lambda a: eta * _fixed_small(a), equation_12, x_T)
    torch.testing.assert_close(result.x_0.double(), expected, rtol=0, atol=5e-6 if steps > 2 else 1e-4)  # as above


@pytest.mark.parametrize("schedule", [SCHEDULE, cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_dpmpp_2m_is_algorithm_2(schedule, steps):
    """In the paper's symbols, float64, on all but the first of steps + 1 timesteps."""
    x_T = _start(4, 3, 4, 4).double()
    kept = schedule.respace(min(steps + 1, 1000)).timesteps.tolist()[-steps:]
    alpha = [schedule.alpha_bar[t].sqrt().item() for t in kept]
    sigma = [(1 - schedule.alpha_bar[t]).sqrt().item() for t in kept]
    lambda_ = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)

    x, q_last = x_T, None
    for i in reversed(range(steps)):
        q = (x - sigma[i] * eps_model(x, torch.full((4,), kept[i]))) / alpha[i]
        if i == 0:
            break
        h, d = lambda_[i - 1] - lambda_[i], q
        if q_last is not None:
            r = (lambda_[i] - lambda_[i + 1]) / h
            d = (1 + 1 / (2 * r)) * q - 1 / (2 * r) * q_last
        x = sigma[i - 1] / sigma[i] * x - alpha[i - 1] * (math.exp(-h) - 1) * d
        q_last = q
    result = sample(eps_model, dpmpp_2m(schedule, steps), x_T, noise=_Noise(x_T.shape), clip_x_0=False)
    # float64; the cosine's first prediction is divided by sqrt(alpha_bar) = 5e-5
    torch.testing.assert_close(result.x_0, q, rtol=1e-9, atol=1e-9)


def heun(schedule, steps: int) -> Coefficients:
    """Heun's method: to the next timestep by DDIM, then from its prediction there once more by the mean of both slopes.
    Place 2i of the table goes on from timestep i, place 2i + 1 corrects what has come to it."""
    kept = schedule.respace(steps, keep_first=False)
    at = [i // 2 for i in range(2 * steps - 1)]
    twice = Schedule(**{f.name: getattr(kept, f.name)[at] for f in dataclasses.fields(kept)})
    x_0, x_t = (weight[at] for weight in ddim(kept, steps)[1:3])
    noise = ((1 - kept.alpha_bar) / kept.alpha_bar).sqrt()
    half = kept.alpha_bar[:-1].sqrt() * (noise[1:] - noise[:-1]) / (2 * noise[:-1])
    last_x_0 = torch.zeros_like(x_0)
    x_0[1::2], x_t[1::2], last_x_0[1::2] = half, 1.0, -half
    return Coefficients(twice, x_0, x_t, last_x_0)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_method_of_two_evaluations_a_step_is_a_table_of_coefficients_too(steps):
    x_T = _start(4, 3, 4, 4).double()
    kept = SCHEDULE.respace(steps, keep_first=False)
    noise = ((1 - kept.alpha_bar) / kept.alpha_bar).sqrt().tolist()
    scale, times = kept.alpha_bar.sqrt().tolist(), kept.timesteps.tolist()

    def slope(y: Tensor, i: int) -> Tensor:
        return _exact_eps(y * scale[i], torch.full((len(y),), times[i]))

    y = x_T / scale[-1]
    for i in reversed(range(1, steps)):
        h, d = noise[i - 1] - noise[i], slope(y, i)
        y = y + h * (d + slope(y + h * d, i - 1)) / 2
    expected = y - noise[0] * slope(y, 0)
    result = sample(_exact_eps, heun(SCHEDULE, steps), x_T, noise=_Noise(x_T.shape), clip_x_0=False)
    torch.testing.assert_close(result.x_0, expected, rtol=1e-9, atol=1e-9)
    assert result.nfe == 2 * steps - 1


def test_deterministic_dpmpp_2m_asks_for_no_noise_and_visits_even_timesteps_above_0():
    x_T = _start(1, 1, 2, 2)
    noise, steps = _Noise(x_T.shape), []
    sample(_exact_eps, dpmpp_2m(SCHEDULE, 5), x_T, noise=noise, callback=steps.append)
    assert noise.asked == []
    assert [step.t for step in steps] == [999, 799, 599, 400, 200]


@pytest.mark.parametrize("case", sampler_orders.CASES, ids=lambda case: case.name)
def test_the_error_falls_with_the_solvers_order(case):
    """Against the data's exact mean and deviation, on timesteps even in lambda; measured: 1.02, 0.96, 0.99, 1.99."""
    schedule = sampler_orders.even_in_lambda()
    errors = {steps: sampler_orders.error(case, schedule, steps) for steps in (80, 160, 320)}
    assert sampler_orders.fitted_order(errors) == pytest.approx(case.order, abs=0.1)


def test_twenty_steps_of_dpmpp_2m_are_nearer_than_twenty_of_ddim():
    """Where training's schedules are used, too; with t = 0 among the timesteps the second order would lose."""
    cases = {case.name: case for case in sampler_orders.CASES}
    for schedule in (SCHEDULE, cosine(1000)):
        errors = {name: sampler_orders.error(cases[name], schedule, 20) for name in ("dpmpp_2m", "ddim")}
        assert errors["dpmpp_2m"] < errors["ddim"] / 2


def test_ddim_with_eta_1_is_ancestral_with_the_small_variance():
    x_T = _start(2, 3, 4, 4)
    a = sample(_exact_eps, ddim(SCHEDULE, 20, eta=1.0), x_T, noise=_Noise(x_T.shape))
    b = sample(_exact_eps, ancestral(SCHEDULE, 20, variance="fixed_small"), x_T, noise=_Noise(x_T.shape))
    torch.testing.assert_close(a.x_0, b.x_0, rtol=0, atol=1e-5)  # the same algebra, rounded differently


@pytest.mark.parametrize(
    ("sampler", "steps", "options"),
    [
        (ddim, 200, {}),
        (ddim, 1000, {"eta": 1.0}),
        (ancestral, 1000, {}),
        (ancestral, 1000, {"variance": "fixed_small"}),
    ],
)
def test_exact_eps_of_a_gaussian_gives_back_its_moments(sampler, steps, options):
    x_T = _start(64, 1, 8, 8)
    x_0 = sample(_exact_eps, sampler(SCHEDULE, steps, **options), x_T, noise=_Noise(x_T.shape)).x_0
    # 4,096 pixels: a standard error of 0.0023 on the mean, 1.1 % on the deviation; a few % are the steps' own
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x_0.std().item() == pytest.approx(STD, rel=0.06)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_the_network_sees_the_original_timesteps_once_each_and_nfe_says_so(sampler, steps):
    seen = []

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (3,) and len(set(t.tolist())) == 1
        assert not torch.is_grad_enabled()
        seen.append(int(t[0]))
        return torch.zeros_like(x_t)

    x_T = _start(3, 1, 2, 2)
    result = sample(eps_model, sampler(SCHEDULE, steps), x_T, noise=_Noise(x_T.shape))
    kept = SCHEDULE.respace(steps, keep_first=sampler is not dpmpp_2m)
    assert seen == kept.timesteps.tolist()[::-1]
    assert result.nfe == steps == len(seen)
    assert result.x_0.shape == x_T.shape and result.x_0.dtype == torch.float32


def test_deterministic_ddim_asks_for_no_noise():
    x_T = _start(1, 1, 2, 2)
    noise = _Noise(x_T.shape)
    sample(_exact_eps, ddim(SCHEDULE, 20, eta=0.0), x_T, noise=noise)
    assert noise.asked == []


@pytest.mark.parametrize(
    ("sampler", "options"), [(ancestral, {}), (ancestral, {"variance": "fixed_small"}), (ddim, {"eta": 0.3})]
)
def test_noise_is_asked_for_by_timestep_at_every_step_but_the_last(sampler, options):
    x_T = _start(1, 1, 2, 2)
    noise = _Noise(x_T.shape)
    sample(_exact_eps, sampler(SCHEDULE, 5, **options), x_T, noise=noise)
    assert noise.asked == [999, 749, 500, 250]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_x_0_is_clipped_at_every_step(sampler):
    def wild(x_t: Tensor, t: Tensor) -> Tensor:
        return 50.0 * torch.sin(40.0 * x_t)

    steps: list[SamplerStep] = []
    x_T = _start(2, 3, 4, 4)
    result = sample(wild, sampler(SCHEDULE, 12), x_T, noise=_Noise(x_T.shape), callback=steps.append)
    assert all(step.x_0.abs().max() <= 1.0 for step in steps)
    assert any((step.x_0.abs() == 1.0).any() for step in steps)
    assert result.x_0.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_without_clipping_x_0_goes_beyond_the_range(sampler):
    steps: list[SamplerStep] = []
    x_T = torch.full((1, 1, 1, 1), 2.5)
    result = sample(
        lambda x, t: torch.zeros_like(x),
        sampler(SCHEDULE, 4),
        x_T,
        noise=lambda t: torch.zeros_like(x_T),
        clip_x_0=False,
        callback=steps.append,
    )
    assert steps[0].x_0.item() == pytest.approx(2.5 / SCHEDULE.alpha_bar[-1].sqrt().item(), rel=1e-6)
    assert result.x_0.item() > 1.0 and result.x_0 is steps[-1].x_0


def test_after_clipping_ddim_goes_on_from_the_eps_that_fits():
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps must hold with the clipped x_0."""
    steps: list[SamplerStep] = []
    x_T = torch.full((1, 1, 1, 1), 2.5)
    sample(lambda x, t: torch.zeros_like(x), ddim(SCHEDULE, 10), x_T, noise=_Noise(x_T.shape), callback=steps.append)
    first, second = steps[0], steps[1]
    assert first.x_0.item() == 1.0  # 2.5 / 0.0064, clipped
    now, then = SCHEDULE.alpha_bar[first.t].item(), SCHEDULE.alpha_bar[second.t].item()
    eps = (2.5 - math.sqrt(now)) / math.sqrt(1 - now)
    assert second.x_t.item() == pytest.approx(math.sqrt(then) + math.sqrt(1 - then) * eps, rel=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_callback_sees_every_step_and_the_last_x_0_is_the_result(sampler):
    steps: list[SamplerStep] = []
    x_T = _start(2, 1, 4, 4)
    result = sample(_exact_eps, sampler(SCHEDULE, 5), x_T, noise=_Noise(x_T.shape), callback=steps.append)
    assert [s.index for s in steps] == [0, 1, 2, 3, 4]
    assert [s.t for s in steps] == ([999, 799, 599, 400, 200] if sampler is dpmpp_2m else [999, 749, 500, 250, 0])
    assert {s.num_steps for s in steps} == {5}
    assert torch.equal(steps[0].x_t, x_T)
    assert torch.equal(steps[-1].x_0, result.x_0)
    for step in steps:  # kept tensors are not overwritten by later steps
        alpha_bar = SCHEDULE.alpha_bar[step.t].item()
        eps = _exact_eps(step.x_t, torch.full((2,), step.t))
        x_0 = ((step.x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)).clamp(-1, 1)
        torch.testing.assert_close(step.x_0, x_0, rtol=0, atol=1e-4)  # 2**-24 / sqrt(alpha_bar) at the first step


def test_a_callback_that_raises_stops_sampling():
    calls = []

    class Stop(Exception):
        pass

    def callback(step: SamplerStep) -> None:
        calls.append(step.index)
        if step.index == 2:
            raise Stop

    x_T = _start(1, 1, 2, 2)
    with pytest.raises(Stop):
        sample(_exact_eps, ddim(SCHEDULE, 10), x_T, noise=_Noise(x_T.shape), callback=callback)
    assert calls == [0, 1, 2]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_starting_noise_is_left_alone(sampler):
    x_T = _start(2, 1, 4, 4)
    before = x_T.clone()
    sample(_exact_eps, sampler(SCHEDULE, 3), x_T, noise=_Noise(x_T.shape))
    assert torch.equal(x_T, before)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_half_precision_network_is_sampled_in_float32(sampler):
    x_T = _start(2, 1, 4, 4)
    seen = set()

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.add(x_t.dtype)
        return _exact_eps(x_t, t).bfloat16()

    result = sample(eps_model, sampler(SCHEDULE, 4), x_T, noise=_Noise(x_T.shape))
    assert seen == {torch.float32} and result.x_0.dtype == torch.float32


def _by_label(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return _exact_eps(x_t, t) + 0.1 * labels.view(-1, 1, 1, 1)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_guidance_goes_beyond_the_label_by_its_weight(weight):
    x_t, t, labels = _start(3, 1, 2, 2), torch.full((3,), 400), torch.tensor([0, 4, 2])
    calls = []

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels.tolist())
        return _by_label(x_t, t, labels).bfloat16()

    got = Guided(network, labels, null_label=5, weight=weight)(x_t, t)
    assert calls == [[0, 4, 2, 5, 5, 5]]  # one call
    with_label = _by_label(x_t, t, labels).bfloat16().float()
    without = _by_label(x_t, t, torch.full((3,), 5)).bfloat16().float()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, with_label + weight * (with_label - without), rtol=0, atol=1e-5)  # float32 rounding


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_guided_step_counts_as_two_evaluations(sampler):
    rows = []

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows.append(len(x_t))
        return _by_label(x_t, t, labels)

    x_T = _start(3, 1, 2, 2)
    model = Guided(network, torch.tensor([0, 1, 2]), null_label=3, weight=1.0)
    result = sample(model, sampler(SCHEDULE, 7), x_T, noise=_Noise(x_T.shape))
    assert rows == [6] * 7
    assert result.nfe == 14 == sum(rows) / len(x_T)


def test_all_samplers_have_one_signature():
    assert len({str(inspect.signature(sampler)) for sampler in SAMPLERS.values()}) == 1


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ancestral, {"variance": "learned"}, "'learned'; allowed: fixed_large, fixed_small"),
        (ddim, {"eta": 1.5}, r"eta is 1.5; .*\[0, 1\]"),
        (ddim, {"eta": -0.1}, "eta is -0.1"),
        (ddim, {"steps": 1001}, r"steps is 1001; .*\[1, 1000\]"),
        (ancestral, {"steps": 0}, "steps is 0"),
        (ancestral, {"x_T": torch.zeros(2, 3, 4)}, "x_T is torch.float32 of shape"),
        (dpmpp_2m, {"steps": 1001}, r"steps is 1001; .*\[1, 1000\]"),
        (ddim, {"x_T": torch.zeros(2, 3, 4, 4, dtype=torch.float16)}, "x_T is torch.float16"),
    ],
)
def test_impossible_requests_are_refused(sampler, options, message):
    options = {"steps": 5, **options}
    x_T = options.pop("x_T", torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=message):
        sample(_exact_eps, sampler(SCHEDULE, **options), x_T, noise=_Noise((1, 1, 2, 2)))


def test_images_are_the_nearest_levels():
    x_0 = torch.tensor([-2.0, -1.0, -1.0 + 0.6 / 127.5, 0.0, 1.0, 1.5]).view(1, 1, 2, 3).expand(2, 3, 2, 3)
    images = to_images(x_0)
    assert images.shape == (2, 2, 3, 3) and images.dtype == np.uint8 and images.flags["C_CONTIGUOUS"]
    assert images[0, :, :, 0].tolist() == [[0, 0, 1], [128, 255, 255]]  # 127.5: to the even of two as near
