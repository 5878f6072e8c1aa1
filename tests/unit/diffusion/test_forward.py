"""ddpm/diffusion/forward.py: noising, its inverse, the posterior, the loss."""

import pytest
import torch

from ddpm.diffusion.forward import Diffusion
from ddpm.diffusion.schedule import linear

SCHEDULE = linear(1000, 1e-4, 0.02)


@pytest.fixture
def diffusion() -> Diffusion:
    return Diffusion(SCHEDULE)


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(6, 3, 8, 8, generator=generator) * 2 - 1
    return x_0, torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 250, 500, 998, 999])


def test_q_sample_mixes_by_alpha_bar(diffusion, images):
    x_0, eps, t = images
    x_t = diffusion.q_sample(x_0, t, eps)
    assert x_t.dtype == torch.float32
    for i, step in enumerate(t.tolist()):
        alpha_bar = SCHEDULE.alpha_bar[step]
        expected = alpha_bar.sqrt() * x_0[i].double() + (1 - alpha_bar).sqrt() * eps[i].double()
        # two products and a sum in float32, on values of a few units
        torch.testing.assert_close(x_t[i].double(), expected, rtol=1e-6, atol=5e-7)


def test_q_sample_equals_noising_step_by_step():
    """Equation 4 against equation 2: the moments after t+1 steps of the chain, carried in float64."""
    mean, variance = 0.7, 0.0
    for t in range(400):
        beta = SCHEDULE.beta[t].item()
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
    x_0, t = torch.full((1, 1, 1, 1), 0.7), torch.tensor([399])
    diffusion = Diffusion(SCHEDULE)
    assert diffusion.q_sample(x_0, t, torch.zeros(1, 1, 1, 1)).item() == pytest.approx(mean, rel=1e-6)
    assert diffusion.q_sample(x_0 * 0, t, torch.ones(1, 1, 1, 1)).item() == pytest.approx(variance**0.5, rel=1e-6)


def test_predict_x_0_undoes_q_sample(diffusion, images):
    x_0, eps, t = images
    recovered = diffusion.predict_x_0(diffusion.q_sample(x_0, t, eps), t, eps)
    # rounding of x_t (2**-24 on some 4) is divided by sqrt(alpha_bar), 0.0064 at the last t
    assert (recovered - x_0).abs().max() < 2e-4
    assert (recovered[:3] - x_0[:3]).abs().max() < 2e-6


def test_the_posterior_is_the_schedules(diffusion, images):
    x_0, x_t, t = images
    mean, variance = diffusion.posterior(x_0, x_t, t)
    assert mean.shape == x_0.shape and variance.shape == (6, 1, 1, 1)
    weights = SCHEDULE.posterior_x_0[t].view(-1, 1, 1, 1), SCHEDULE.posterior_x_t[t].view(-1, 1, 1, 1)
    expected = weights[0] * x_0.double() + weights[1] * x_t.double()
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=5e-7)  # float32 rounding
    torch.testing.assert_close(variance.flatten(), SCHEDULE.posterior_variance[t].float(), rtol=0, atol=0)
    assert torch.equal(mean[0], x_0[0]) and variance[0] == 0


def test_each_sample_has_its_own_t(diffusion, images):
    x_0, eps, t = images
    whole = diffusion.q_sample(x_0, t, eps)
    for i in range(len(t)):
        assert torch.equal(diffusion.q_sample(x_0[i : i + 1], t[i : i + 1], eps[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_t_outside_the_schedule_is_an_error(diffusion, t):
    x_0 = torch.zeros(1, 3, 4, 4)
    with pytest.raises(RuntimeError, match="out of bounds"):
        diffusion.q_sample(x_0, torch.tensor([t]), x_0)


def test_to_returns_the_object_with_its_tables_moved(diffusion):
    assert diffusion.to("meta") is diffusion
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    x = torch.zeros(2, 3, 4, 4, device="meta")
    assert diffusion.q_sample(x, t, x).device.type == "meta"


def test_the_loss_is_each_samples_mean_square():
    eps_pred, eps = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    eps_pred[1] = 3.0
    assert Diffusion.loss(eps_pred, eps).tolist() == [1.0, 4.0]
    eps_pred[0, 0, 0, 0] = 1.0
    assert Diffusion.loss(eps_pred, eps)[0].item() == pytest.approx(47 / 48, rel=1e-6)


def test_the_l1_loss_is_each_samples_mean_distance():
    eps_pred, eps = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    eps_pred[1] = 3.0
    eps_pred[0, 0, 0, 0] = -1.0
    assert Diffusion.loss(eps_pred, eps, kind="l1").tolist() == [pytest.approx(49 / 48, rel=1e-6), 2.0]


def test_the_loss_of_a_half_precision_prediction_is_float32():
    eps_pred, eps = torch.zeros(1, 1, 1, 1, dtype=torch.float16), torch.full((1, 1, 1, 1), 300.0)
    assert Diffusion.loss(eps_pred, eps).dtype == torch.float32
    value = Diffusion.loss(eps_pred, eps.half())
    assert value.dtype == torch.float32 and value.tolist() == [90000.0]  # beyond float16


def test_an_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'huber'; allowed: l2, l1"):
        Diffusion.loss(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), kind="huber")


def test_a_prediction_that_would_broadcast_is_refused():
    with pytest.raises(ValueError, match=r"eps_pred has shape \(2, 1, 4, 4\)"):
        Diffusion.loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))
