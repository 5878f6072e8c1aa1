"""Schedules, noising, posterior and samplers against `diffusers`, which shares no code with them.

Relative error at most 1e-5 in float32: the largest difference over the largest value. Two set-ups, not tolerances, make
the comparison one of formulas. diffusers keeps alpha_bar as a float32 product of T factors: its 1 - alpha_bar at t = 0
is off by 2e-5, and so is its posterior. Its schedulers get the float64 product of their own betas. And they are set to
the timesteps that ours visit; how is said where it is done.
"""

from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.diffusion.forward import Diffusion
from ddpm.diffusion.samplers import SamplerStep, ancestral, ddim, dpmpp_2m, sample
from ddpm.diffusion.schedule import Schedule, cosine, dns, linear
from ddpm.network.ema import EMA

diffusers = pytest.importorskip("diffusers")

LIMIT = 1e-5


class Setup(NamedTuple):
    schedule: Schedule
    betas: dict
    """The same schedule, as arguments of diffusers' schedulers."""
    steps: int
    eta: float
    seed: int


def _setup(seed: int) -> Setup:
    """T, steps, eta and the ends of a linear schedule, drawn; the timesteps of `respace` are `gap` apart."""
    random = np.random.default_rng(seed)
    steps, gap = int(random.integers(10, 60)), int(random.integers(2, 20))
    timesteps = gap * (steps - 1) + 1
    low, high = float(random.uniform(5e-5, 3e-4)), float(random.uniform(0.01, 0.025))
    scale = 1000 / timesteps
    betas = {"num_train_timesteps": timesteps, "beta_start": scale * low, "beta_end": scale * high}
    return Setup(linear(timesteps, low, high), betas, steps, float(random.uniform(0.1, 1.0)), seed)


SETUPS = [_setup(seed) for seed in (1, 2, 3)]
by_setup = pytest.mark.parametrize(
    "setup", SETUPS, ids=[f"T{len(s.schedule.beta)}-steps{s.steps}-eta{s.eta:.2f}" for s in SETUPS]
)


def _scheduler(kind: str, setup: Setup, **options):
    scheduler = getattr(diffusers, kind)(beta_schedule="linear", **setup.betas, **options)
    scheduler.alphas_cumprod = torch.cumprod(1.0 - scheduler.betas.double(), 0)
    return scheduler


def _relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and expected.isfinite().all()
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def _images(setup: Setup, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(setup.seed))


def _network(setup: Setup):
    """A small random network, smooth in x_t and t."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1)).eval()

    @torch.no_grad()
    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.8 * x_t + layers(x_t) * (0.5 + t.view(-1, 1, 1, 1) / len(setup.schedule.beta))

    return eps_model


class _Noise:
    """Normals in the order in which both samplers ask for them."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(99)

    def __call__(self, t: int) -> Tensor:
        return torch.randn(self.shape, generator=self.generator)


# ---------------------------------------------------------------- schedules and the forward process


@by_setup
def test_linear_alpha_bar_is_the_same(setup):
    schedule = _scheduler("DDPMScheduler", setup)
    assert _relative(setup.schedule.beta, schedule.betas) <= LIMIT
    ours, theirs = setup.schedule.alpha_bar, schedule.alphas_cumprod
    assert ((ours - theirs).abs() / theirs).max() <= LIMIT


@pytest.mark.parametrize("timesteps", [100, 731, 1000])
def test_cosine_alpha_bar_is_the_same(timesteps):
    schedule = diffusers.DDPMScheduler(num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2")
    ours, theirs = cosine(timesteps), torch.cumprod(1.0 - schedule.betas.double(), 0)
    assert ((ours.beta - schedule.betas).abs() / ours.beta).max() <= LIMIT
    # the last beta is 0.999, of which float32 keeps 1 - beta = 0.001 to 1.3e-5 only
    assert ((ours.alpha_bar - theirs).abs() / theirs)[:-1].max() <= LIMIT


@pytest.mark.parametrize(("timesteps", "low", "high", "offset"), [(1000, 1e-4, 0.02, 5), (300, 2e-4, 0.03, 300)])
def test_dns_alpha_bar_is_its_formulas(timesteps, low, high, offset):
    """diffusers has no such schedule: numpy, from the published formula."""
    ours = dns(timesteps, low, high, offset).alpha_bar.numpy()
    i, low, high = np.arange(timesteps), low * 1000 / timesteps, high * 1000 / timesteps
    alpha_bar = np.cumprod(1 - (low + (high - low) * ((i + offset) / (timesteps + 1 + offset)) ** 2))
    assert np.max(np.abs(ours - alpha_bar) / alpha_bar) <= 1e-12


@by_setup
def test_q_sample_is_the_same(setup):
    scheduler = _scheduler("DDPMScheduler", setup)
    x_0, eps = _images(setup, 2, 8, 3, 8, 8).clamp(-1, 1)
    t = torch.linspace(0, len(setup.schedule.beta) - 1, 8).long()
    assert _relative(Diffusion(setup.schedule).q_sample(x_0, t, eps), scheduler.add_noise(x_0, eps, t)) <= LIMIT


@by_setup
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_posteriors_mean_and_variance_are_the_same(setup, variance):
    """At every timestep of the full schedule. Noise of a known generator is taken off, what is left is the mean."""
    scheduler = _scheduler("DDPMScheduler", setup, variance_type=variance, clip_sample=False, prediction_type="sample")
    timesteps = len(setup.schedule.beta)
    scheduler.set_timesteps(timesteps)
    x_0, x_t = _images(setup, 2, 1, 3, 8, 8)
    diffusion = Diffusion(setup.schedule)
    for t in [0, 1, timesteps // 2, timesteps - 1]:
        mean, posterior_variance = diffusion.posterior(x_0, x_t, torch.tensor([t]))
        ours = posterior_variance if variance == "fixed_small" else setup.schedule.beta[t].float().view(1, 1, 1, 1)
        theirs = scheduler._get_variance(t).float().view(1, 1, 1, 1)
        step = scheduler.step(x_0, t, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
        if t > 0:
            assert _relative(ours, theirs) <= LIMIT
            step = step - theirs.sqrt() * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(7))
        assert _relative(mean, step) <= LIMIT


# ---------------------------------------------------------------- samplers


def _ddim_scheduler(setup: Setup, clip: bool):
    """At the timesteps of `respace`, which are even here. diffusers takes the one before as t - T // steps: with
    T = gap (steps - 1) + 1 that is gap if its number of steps is one less than ours."""
    scheduler = _scheduler("DDIMScheduler", setup, clip_sample=clip)
    kept = setup.schedule.respace(setup.steps).timesteps
    scheduler.num_inference_steps = setup.steps - 1
    assert (kept.diff() == len(setup.schedule.beta) // (setup.steps - 1)).all()
    scheduler.timesteps = kept.flip(0)
    return scheduler


@by_setup
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("stochastic", [True, False])
def test_ddim_steps_and_trajectory_are_the_same(setup, clip, stochastic):
    """With x_0 clipped and eps taken anew from it, as ours does and diffusers' `use_clipped_model_output`."""
    eta = setup.eta if stochastic else 0.0
    scheduler, eps_model, x_T = _ddim_scheduler(setup, clip), _network(setup), _images(setup, 4, 3, 8, 8)
    seen: list[SamplerStep] = []
    coefficients = ddim(setup.schedule, setup.steps, eta=eta)
    result = sample(eps_model, coefficients, x_T, noise=_Noise(x_T.shape), clip_x_0=clip, callback=seen.append)
    x, noise = x_T, _Noise(x_T.shape)
    states = []
    for t in scheduler.timesteps.tolist():
        options = {"eta": eta, "use_clipped_model_output": clip, "variance_noise": noise(t) if eta else None}
        states.append(x)
        x = scheduler.step(eps_model(x, torch.full((4,), t)), t, x, **options).prev_sample
    assert [step.t for step in seen] == scheduler.timesteps.tolist()
    assert _relative(seen[1].x_t, states[1]) <= LIMIT  # one step
    assert max(_relative(ours.x_t, theirs) for ours, theirs in zip(seen, states, strict=True)) <= LIMIT
    # diffusers adds noise of deviation eta sqrt(posterior variance) at t = 0, too: 0
    assert _relative(result.x_0, x) <= LIMIT


def test_diffusers_ddim_with_uneven_timesteps_agrees_once_it_steps_to_the_one_that_it_visits_next():
    """As ddim's docstring has it; without that, images are grey levels apart."""
    setup = Setup(
        linear(1000, 1e-4, 0.02), {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}, 30, 0, 4
    )
    eps_model, x_T = _network(setup), _images(setup, 4, 3, 8, 8)
    ours = sample(eps_model, ddim(setup.schedule, setup.steps), x_T, noise=_Noise(x_T.shape)).x_0

    def theirs(*, mended: bool) -> Tensor:
        scheduler = _scheduler("DDIMScheduler", setup, timestep_spacing="linspace")
        scheduler.set_timesteps(setup.steps)
        x, visited = x_T, [*scheduler.timesteps.tolist(), -1]
        for t, next_t in pairwise(visited):
            if mended:
                scheduler.num_inference_steps = Fraction(1000, t - next_t)
            x = scheduler.step(eps_model(x, torch.full((4,), t)), t, x, use_clipped_model_output=True).prev_sample
        return x

    assert _relative(ours, theirs(mended=True)) <= LIMIT
    assert _relative(ours, theirs(mended=False)) > 100 * LIMIT


@by_setup
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_trajectory_is_the_same(setup, variance):
    scheduler = _scheduler("DDPMScheduler", setup, variance_type=variance, clip_sample=True)
    kept = setup.schedule.respace(setup.steps).timesteps
    scheduler.set_timesteps(timesteps=kept.flip(0).tolist())
    eps_model, x_T = _network(setup), _images(setup, 4, 3, 8, 8)
    coefficients = ancestral(setup.schedule, setup.steps, variance=variance)
    result = sample(eps_model, coefficients, x_T, noise=_Noise(x_T.shape))
    x, generator = x_T, torch.Generator().manual_seed(99)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(eps_model(x, torch.full((4,), t)), t, x, generator=generator).prev_sample
    assert _relative(result.x_0, x) <= LIMIT


@by_setup
@pytest.mark.parametrize("steps", [1, 2, 5, None])
def test_dpmpp_2m_steps_and_trajectory_are_the_same(setup, steps):
    """diffusers' default: order 2, midpoint, timesteps `linspace`, which are ours without being told, and a last step
    of first order to sigma = 0. It does not clip x_0."""
    steps = steps or setup.steps
    scheduler = _scheduler("DPMSolverMultistepScheduler", setup)
    scheduler.set_timesteps(steps)
    eps_model, x_T = _network(setup), _images(setup, 4, 3, 8, 8)
    seen: list[SamplerStep] = []
    coefficients = dpmpp_2m(setup.schedule, steps)
    result = sample(eps_model, coefficients, x_T, noise=_Noise(x_T.shape), clip_x_0=False, callback=seen.append)
    x, states = x_T, []
    for t in scheduler.timesteps.tolist():
        states.append(x)
        x = scheduler.step(eps_model(x, torch.full((4,), t)), t, x).prev_sample
    assert [step.t for step in seen] == scheduler.timesteps.tolist()
    assert max(_relative(ours.x_t, theirs) for ours, theirs in zip(seen, states, strict=True)) <= LIMIT
    assert _relative(result.x_0, x) <= LIMIT


# ---------------------------------------------------------------- the average of the weights


@pytest.mark.parametrize("as_theirs", [True, False])
def test_averages_of_weights_agree_where_ours_is_told_to_or_theirs(as_theirs):
    """As EMA's docstring has it."""
    from diffusers.training_utils import EMAModel

    weights = nn.Linear(3, 2)
    if as_theirs:
        ours, theirs = EMA(weights, 0.6, start_step=2, warmup=True), EMAModel(weights.parameters(), decay=0.6)
    else:
        ours, theirs = EMA(weights, 0.6), EMAModel(weights.parameters(), decay=0.6, min_decay=0.6)
        theirs.optimization_step = 1
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in weights.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        ours.update(weights, step)
        theirs.step(weights.parameters())
        for a, b in zip(ours.model.parameters(), theirs.shadow_params, strict=True):
            assert _relative(a, b) <= LIMIT
