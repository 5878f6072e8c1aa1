"""ddpm/diffusion/schedule.py: the schedules by name, the posterior, and fewer timesteps."""

import math
from types import SimpleNamespace

import pytest
import torch

from ddpm.diffusion.schedule import Schedule, build, cosine, dns, linear

HO = (1000, 1e-4, 0.02)


def test_the_linear_schedule_is_the_papers():
    schedule = linear(*HO)
    assert schedule.timesteps.tolist() == list(range(1000))
    assert schedule.beta[0].item() == 1e-4
    assert schedule.beta[-1].item() == pytest.approx(0.02, rel=1e-15)
    # float64 rounding of equal steps
    equal = torch.full((999,), 0.0199 / 999, dtype=torch.float64)
    torch.testing.assert_close(schedule.beta.diff(), equal, rtol=1e-10, atol=0)
    # the paper's section 4: x_T keeps next to nothing of x_0
    assert schedule.alpha_bar[-1].item() == pytest.approx(4.04e-5, rel=2e-3)
    for name in ("beta", "alpha_bar", "alpha_bar_prev", "posterior_x_0", "posterior_x_t", "posterior_variance"):
        tensor = getattr(schedule, name)
        assert tensor.dtype == torch.float64 and tensor.shape == (1000,) and tensor.isfinite().all()


def test_alpha_bar_is_the_product_of_what_each_step_keeps():
    schedule = linear(50, 1e-4, 0.02)
    product = 1.0
    for t in range(50):
        assert schedule.alpha_bar_prev[t].item() == pytest.approx(product, rel=1e-14)
        product *= 1.0 - schedule.beta[t].item()
        assert schedule.alpha_bar[t].item() == pytest.approx(product, rel=1e-14)
    assert schedule.alpha_bar_prev[0].item() == 1.0


def test_other_lengths_scale_both_ends_by_a_thousand_over_them():
    schedule = linear(250, 1e-4, 0.02)
    assert schedule.beta[0].item() == pytest.approx(4e-4, rel=1e-15)
    assert schedule.beta[-1].item() == pytest.approx(0.08, rel=1e-15)


def test_one_timestep_is_a_schedule():
    schedule = linear(1, 1e-6, 2e-4)
    assert schedule.beta.tolist() == [pytest.approx(1e-3)]
    assert schedule.posterior_variance.tolist() == [0.0]


@pytest.mark.parametrize("timesteps", [1, 50, 1000])
def test_the_cosine_schedule_is_the_papers_with_beta_at_most_0_999(timesteps):
    def f(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine(timesteps)
    assert len(schedule.beta) == timesteps
    for t in range(timesteps):
        assert schedule.beta[t].item() == pytest.approx(min(1 - f(t + 1) / f(t), 0.999), rel=1e-9)
    # equation 17: alpha_bar is f(t) / f(0) wherever no beta was clipped
    for t in range(timesteps - 1):
        assert schedule.alpha_bar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert schedule.beta[-1].item() == 0.999


@pytest.mark.parametrize(("timesteps", "offset"), [(1000, 5), (1000, 1000), (200, 0.5)])
def test_the_dns_schedule_is_a_squared_line(timesteps, offset):
    schedule = dns(timesteps, 1e-4, 0.02, offset)
    low, high = 1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps
    assert len(schedule.beta) == timesteps
    for i in (0, 1, timesteps // 2, timesteps - 1):
        expected = low + (high - low) * ((i + offset) / (timesteps + 1 + offset)) ** 2
        assert schedule.beta[i].item() == pytest.approx(expected, rel=1e-14)


def test_a_schedule_is_built_by_its_name():
    config = {"timesteps": 100, "beta_start": 2e-4, "beta_end": 0.03, "dns_offset": 7.0}
    for name, expected in (
        ("linear", linear(100, 2e-4, 0.03)),
        ("cosine", cosine(100)),
        ("dns", dns(100, 2e-4, 0.03, 7.0)),
    ):
        assert torch.equal(build(SimpleNamespace(schedule=name, **config)).beta, expected.beta)


@pytest.mark.parametrize("steps", [1000, 10])
def test_the_posterior_is_the_product_of_two_gaussians(steps):
    """q(x_t-1 | x_t, x_0) is q(x_t | x_t-1) q(x_t-1 | x_0), normalised: integrated on a grid, equation 7 unused."""
    schedule = linear(*HO).respace(steps)
    x_0, x_t = 0.3, -0.8
    for i in (1, steps // 2, steps - 1):
        beta, kept = schedule.beta[i], schedule.alpha_bar_prev[i]
        spread = schedule.posterior_variance[i].sqrt()
        middle = schedule.posterior_x_0[i] * x_0 + schedule.posterior_x_t[i] * x_t
        # twelve of the claimed deviations to each side: a wrong mean or variance still leaves a different integral
        x = middle + spread * torch.linspace(-12, 12, 20001, dtype=torch.float64)
        log_density = -((x_t - (1 - beta).sqrt() * x) ** 2) / (2 * beta)
        log_density -= (x - kept.sqrt() * x_0) ** 2 / (2 * (1 - kept))
        weight = torch.softmax(log_density, 0)
        mean = (weight * x).sum()
        variance = (weight * (x - mean) ** 2).sum()
        # the trapezoid rule on a Gaussian is exact to rounding
        assert mean.item() == pytest.approx(middle.item(), rel=1e-9, abs=1e-9)
        assert variance.item() == pytest.approx(schedule.posterior_variance[i].item(), rel=1e-7)


def test_the_first_posterior_is_x_0_itself():
    for schedule in (linear(*HO), linear(*HO).respace(7)):
        assert schedule.posterior_variance[0].item() == 0.0
        assert schedule.posterior_x_t[0].item() == 0.0
        assert schedule.posterior_x_0[0].item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 100, 250, 667, 999, 1000])
def test_respacing_keeps_alpha_bar_at_distinct_timesteps(steps):
    full = linear(*HO)
    kept = full.respace(steps)
    assert len(kept.timesteps) == steps
    assert (kept.timesteps.diff() > 0).all()
    assert kept.timesteps[-1] == 999
    assert steps == 1 or kept.timesteps[0] == 0
    assert torch.equal(kept.alpha_bar, full.alpha_bar[kept.timesteps])
    # and the betas say the same: their own product, in float64
    torch.testing.assert_close(torch.cumprod(1 - kept.beta, 0), kept.alpha_bar, rtol=1e-10, atol=0)
    assert ((kept.beta > 0) & (kept.beta < 1)).all()


def test_respaced_timesteps_are_the_rounded_line():
    assert linear(*HO).respace(5).timesteps.tolist() == [0, 250, 500, 749, 999]
    assert linear(10, 1e-5, 1e-3).respace(4).timesteps.tolist() == [0, 3, 6, 9]
    assert linear(12, 1e-5, 1e-3).respace(3).timesteps.tolist() == [0, 6, 11]  # 5.5: ties to even


def test_respacing_to_all_steps_changes_nothing():
    full = linear(*HO)
    assert torch.equal(full.respace(1000).beta, full.beta)
    assert torch.equal(full.respace(1000, keep_first=False).beta, full.beta)


@pytest.mark.parametrize("steps", [1, 2, 10, 333, 999])
def test_respacing_without_the_first_is_respacing_to_one_more(steps):
    more, kept = linear(*HO).respace(steps + 1), linear(*HO).respace(steps, keep_first=False)
    assert torch.equal(kept.timesteps, more.timesteps[1:])
    assert torch.equal(kept.alpha_bar, more.alpha_bar[1:])
    assert kept.alpha_bar_prev[0] == 1.0
    torch.testing.assert_close(torch.cumprod(1 - kept.beta, 0), kept.alpha_bar, rtol=1e-10, atol=0)


def test_respacing_twice_keeps_the_original_timesteps():
    once = linear(*HO).respace(100)
    twice = once.respace(10)
    assert torch.equal(twice.timesteps, once.timesteps[::11])
    assert torch.equal(twice.alpha_bar, linear(*HO).alpha_bar[twice.timesteps])


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps is {steps}; .*\[1, 1000\]"):
        linear(*HO).respace(steps)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, float("nan")])
def test_a_schedule_of_impossible_betas_is_refused(bad):
    beta = torch.tensor([0.1, 0.2, bad, 0.3], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"beta at t=2 is"):
        Schedule.from_beta(beta)


@pytest.mark.parametrize("beta", [torch.tensor([0.1]), torch.ones(2, 2).double() / 2, torch.ones(0).double()])
def test_a_schedule_of_the_wrong_form_is_refused(beta):
    with pytest.raises(ValueError, match="float64"):
        Schedule.from_beta(beta)
