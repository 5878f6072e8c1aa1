"""From noise to images: samplers of one signature.

Owns: ancestral sampling (Ho et al. 2020, algorithm 2) and DDIM (Song et al. 2021, "Denoising diffusion implicit
models", equations 12 and 16). Must not know: networks beyond eps(x_t, t), generators, labels, guidance, files.

Both are one loop, x_t-1 = a x_0 + b x_t + sigma noise with x_0 clipped to [-1, 1], and differ in their coefficients:
floats computed in float64 before the loop, so that a step costs few kernels and no wait for the device.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddpm.schedule import Schedule

EpsModel = Callable[[Tensor, Tensor], Tensor]
"""eps_model(x_t (B, C, H, W) float32, t (B,) int64) -> eps (B, C, H, W), any floating type."""
Noise = Callable[[int], Tensor]
"""noise(t) -> standard normals like x_T; t is the original timestep. Called only where noise is used."""

VARIANCES = ("fixed_large", "fixed_small")


class SamplerStep(NamedTuple):
    """What a callback sees after a step: the state that the step started from, and its clipped prediction."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """0 .. num_steps-1, in the order of execution."""
    num_steps: int
    t: int
    """original timestep of x_t"""
    x_t: Tensor
    x_0: Tensor


class SampleResult(NamedTuple):
    x_0: Tensor
    """(B, C, H, W) float32 in [-1, 1]."""
    nfe: int
    """Network evaluations, counted where they are made."""


class Sampler(Protocol):
    """The signature of every sampler; what a sampler has no use for, it ignores.

    x_T: (B, C, H, W) float32 standard normal; never written to. steps: in [1, T]. eta: in [0, 1], DDIM alone.
    variance: one of VARIANCES, ancestral alone. callback: called after each step; may raise to abort.
    ValueError for values outside these. Runs without gradients on x_T's device.
    """

    def __call__(
        self,
        eps_model: EpsModel,
        schedule: Schedule,
        x_T: Tensor,
        *,
        noise: Noise,
        steps: int,
        eta: float = 0.0,
        variance: str = "fixed_large",
        callback: Callable[[SamplerStep], None] | None = None,
    ) -> SampleResult: ...


def ancestral(
    eps_model: EpsModel,
    schedule: Schedule,
    x_T: Tensor,
    *,
    noise: Noise,
    steps: int,
    eta: float = 0.0,
    variance: str = "fixed_large",
    callback: Callable[[SamplerStep], None] | None = None,
) -> SampleResult:
    """Ho et al.'s algorithm 2: the mean of q(x_t-1 | x_t, x_0) (equation 7) at the predicted x_0, and noise.

    variance, of the schedule respaced to `steps`: fixed_large is beta_t, fixed_small the posterior variance
    (1 - alpha_bar_prev) / (1 - alpha_bar) beta_t (section 3.2 of the paper). The last step adds no noise with either.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; allowed: {', '.join(VARIANCES)}")
    schedule = schedule.respace(steps)
    sigma = (schedule.beta if variance == "fixed_large" else schedule.posterior_variance).sqrt()
    return _sample(eps_model, schedule, x_T, schedule.posterior_x_0, schedule.posterior_x_t, sigma, noise, callback)


def ddim(
    eps_model: EpsModel,
    schedule: Schedule,
    x_T: Tensor,
    *,
    noise: Noise,
    steps: int,
    eta: float = 0.0,
    variance: str = "fixed_large",
    callback: Callable[[SamplerStep], None] | None = None,
) -> SampleResult:
    """Song et al.'s equation 12, with eps taken anew from the clipped x_0, so that x_0 and eps still make up x_t.

    eta = 0 is deterministic and never calls `noise`; eta = 1 has the posterior's variance (equation 16).
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    schedule = schedule.respace(steps)
    sigma = eta * schedule.posterior_variance.sqrt()
    # eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar), put into equation 12; sigma**2 <= 1 - alpha_bar_prev
    x_t_weight = ((1.0 - schedule.alpha_bar_prev - sigma**2) / (1.0 - schedule.alpha_bar)).sqrt()
    x_0_weight = schedule.alpha_bar_prev.sqrt() - x_t_weight * schedule.alpha_bar.sqrt()
    return _sample(eps_model, schedule, x_T, x_0_weight, x_t_weight, sigma, noise, callback)


SAMPLERS: dict[str, Sampler] = {"ancestral": ancestral, "ddim": ddim}


@torch.no_grad()
def _sample(
    eps_model: EpsModel,
    schedule: Schedule,
    x_T: Tensor,
    x_0_weight: Tensor,
    x_t_weight: Tensor,
    sigma: Tensor,
    noise: Noise,
    callback: Callable[[SamplerStep], None] | None,
) -> SampleResult:
    """The loop; weights and sigma are float64 (S,), in the schedule's ascending order."""
    if x_T.ndim != 4 or x_T.dtype != torch.float32:
        raise ValueError(f"x_T is {x_T.dtype} of shape {tuple(x_T.shape)}; it must be float32 of shape (B, C, H, W)")
    num_steps, nfe = len(schedule.timesteps), 0
    timesteps = schedule.timesteps.tolist()
    t_rows = schedule.timesteps.to(x_T.device).unsqueeze(1).repeat(1, len(x_T))
    # x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), as two factors
    x_t_factor = schedule.alpha_bar.rsqrt().tolist()
    eps_factor = (-((1.0 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()).tolist()
    a, b, s = x_0_weight.tolist(), x_t_weight.tolist(), sigma.tolist()

    x_t = x_0 = x_T
    for index, i in enumerate(reversed(range(num_steps))):
        eps = eps_model(x_t, t_rows[i])
        nfe += 1
        x_0 = (x_t * x_t_factor[i]).add_(eps, alpha=eps_factor[i]).clamp_(-1.0, 1.0)
        started_from = x_t
        if i > 0:  # after the last step x_0 is the sample: weight 1, no x_t, no noise
            x_t = (x_0 * a[i]).add_(x_t, alpha=b[i])
            if s[i] > 0.0:
                x_t.add_(noise(timesteps[i]), alpha=s[i])
        if callback is not None:
            callback(SamplerStep(index, num_steps, timesteps[i], started_from, x_0))
    return SampleResult(x_0, nfe)
