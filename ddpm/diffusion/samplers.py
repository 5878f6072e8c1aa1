"""From noise to images: each sampler is a table of coefficients, which one loop applies.

Owns: ancestral sampling (Ho et al. 2020, algorithm 2), DDIM (Song et al. 2021, "Denoising diffusion implicit models",
equations 12 and 16) and DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion
probabilistic models", algorithm 2). Must not know: networks beyond eps(x_t, t), generators, labels, files.

All are one loop, x_t-1 = a x_0 + b x_t + c (the x_0 of the step before) + sigma noise with x_0 clipped to [-1, 1], and
differ in their coefficients: floats computed in float64 before the loop, so that a step costs few kernels and no wait
for the device. All visit timesteps of `Schedule.respace(steps)`, evenly spaced in t, and end with x_0 itself. A new
sampler is a function from a schedule to its `Coefficients`, a line in SAMPLERS, and one in ddpm/config/sample.py. A
method with two evaluations a step, as Heun's, is two steps here, the second of them at the timestep that it corrects.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion.schedule import Schedule

EpsModel = Callable[[Tensor, Tensor], Tensor]
"""eps_model(x_t (B, C, H, W) like x_T, t (B,) int64) -> eps (B, C, H, W), any floating type. A call counts as one
evaluation of the network, or as `nfe_per_call` of them where the model has that attribute (guidance.py)."""
Noise = Callable[[int], Tensor]
"""noise(t) -> standard normals like x_T; t is the original timestep. Called only where noise is used."""


class SamplerStep(NamedTuple):
    """What a callback gets after a step: the x_t that the step started from, and the x_0 that it predicted."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """0 .. num_steps-1, in the order of execution."""
    num_steps: int
    t: int
    """original timestep of x_t"""
    x_t: Tensor
    x_0: Tensor


class SampleResult(NamedTuple):
    """What `sample` returns."""

    x_0: Tensor
    """(B, C, H, W) like x_T, in [-1, 1] if clipped."""
    nfe: int
    """Network evaluations for each sample, counted where they are made."""


class Coefficients(NamedTuple):
    """The factors of which a sampler makes x_t-1: float64 (S,), in the order of the timesteps; None for zeros."""

    schedule: Schedule
    """The schedule of the S timesteps that the sampler visits, from the last to the first."""
    x_0: Tensor
    x_t: Tensor
    last_x_0: Tensor | None = None
    """Factor of the x_0 that the step before predicted."""
    sigma: Tensor | None = None
    """Factor of the noise."""


class Sampler(Protocol):
    """The signature of every sampler; arguments that a sampler does not need are ignored.

    steps: in [1, T]. eta: in [0, 1], DDIM alone. variance: fixed_large or fixed_small, ancestral alone.
    ValueError for values outside these.
    """

    def __call__(
        self, schedule: Schedule, steps: int, *, eta: float = 0.0, variance: str = "fixed_large"
    ) -> Coefficients: ...


def ancestral(schedule: Schedule, steps: int, *, eta: float = 0.0, variance: str = "fixed_large") -> Coefficients:
    """Ho et al.'s algorithm 2: the mean of q(x_t-1 | x_t, x_0) (equation 7) at the predicted x_0, and noise.

    variance, of the schedule respaced to `steps`: fixed_large is beta_t, fixed_small the posterior variance
    (1 - alpha_bar_prev) / (1 - alpha_bar) beta_t (section 3.2 of the paper). The last step adds no noise with either.
    """
    schedule = schedule.respace(steps)
    sigma = schedule.reverse_variance(variance).sqrt()
    return Coefficients(schedule, schedule.posterior_x_0, schedule.posterior_x_t, sigma=sigma)


def ddim(schedule: Schedule, steps: int, *, eta: float = 0.0, variance: str = "fixed_large") -> Coefficients:
    """Song et al.'s equation 12, with eps taken anew from the clipped x_0, so that x_0 and eps still make up x_t.

    eta = 0 is deterministic and never asks for noise; eta = 1 has the posterior's variance (equation 16).

    diffusers' DDIMScheduler with timestep_spacing="linspace" visits these timesteps, but steps from each t to
    t - T // S instead of to the one that it visits next: its images differ by up to 3.3 grey levels, in half of their
    bytes. It agrees with `scheduler.num_inference_steps = Fraction(T, t - next_t)` set before each of its steps, which
    makes that T // S the distance to the next timestep, and with use_clipped_model_output where x_0 is clipped.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    schedule = schedule.respace(steps)
    sigma = eta * schedule.posterior_variance.sqrt()
    # eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar), put into equation 12; sigma**2 <= 1 - alpha_bar_prev
    x_t = ((1.0 - schedule.alpha_bar_prev - sigma**2) / (1.0 - schedule.alpha_bar)).sqrt()
    x_0 = schedule.alpha_bar_prev.sqrt() - x_t * schedule.alpha_bar.sqrt()
    return Coefficients(schedule, x_0, x_t, sigma=sigma)


def dpmpp_2m(schedule: Schedule, steps: int, *, eta: float = 0.0, variance: str = "fixed_large") -> Coefficients:
    """Lu et al.'s DPM-Solver++(2M): x_0 is extrapolated linearly in lambda = log(sqrt(alpha_bar / (1 - alpha_bar)))
    from the last two predictions, and the rest of the probability flow is integrated exactly. Deterministic: never
    asks for noise.

    The first step has no prediction before it and is of first order, which is DDIM's. So is the last one, which goes
    to alpha_bar = 1, where lambda is infinite, and returns x_0. The timesteps are those of `steps` + 1 without t = 0:
    the step to it would be so long (2.9 of 9.7 in lambda, at 20 steps of the linear schedule) that the extrapolation
    overshoots. 20 steps with it end 0.12 from N(0.2, 0.5**2) (2-Wasserstein), those of DDIM 0.07, these 0.02.
    """
    schedule = schedule.respace(steps, keep_first=False)
    half_snr = 0.5 * (schedule.alpha_bar / (1.0 - schedule.alpha_bar)).log()  # lambda
    h = torch.cat([half_snr.new_full((1,), torch.inf), half_snr[:-1]]) - half_snr
    # extrapolation to the middle of the step: 1 / (2 r) in the paper; the step before lies one place later
    ratio = torch.zeros_like(h)
    ratio[1:-1] = h[1:-1] / (2.0 * h[2:])
    first_order = schedule.alpha_bar_prev.sqrt() * -torch.expm1(-h)
    x_t = ((1.0 - schedule.alpha_bar_prev) / (1.0 - schedule.alpha_bar)).sqrt()
    return Coefficients(schedule, first_order * (1.0 + ratio), x_t, last_x_0=-first_order * ratio)


SAMPLERS: dict[str, Sampler] = {"ancestral": ancestral, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


@torch.no_grad()
def sample(
    eps_model: EpsModel,
    coefficients: Coefficients,
    x_T: Tensor,
    *,
    noise: Noise,
    clip_x_0: bool = True,
    callback: Callable[[SamplerStep], None] | None = None,
) -> SampleResult:
    """Compute x_0 from x_T by a sampler's coefficients, without gradients, on x_T's device.

    x_T: (B, C, H, W) float32 standard normal (float64 to study a solver's order), else ValueError; never written to.
    clip_x_0: clip every predicted x_0, and so the result, to [-1, 1]. callback: called after each step; may raise to
    abort.
    """
    if x_T.ndim != 4 or x_T.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x_T is {x_T.dtype} of shape {tuple(x_T.shape)}; it must be float32 of shape (B, C, H, W)")
    schedule, *weights = coefficients
    num_steps, nfe, nfe_per_call = len(schedule.timesteps), 0, getattr(eps_model, "nfe_per_call", 1)
    timesteps = schedule.timesteps.tolist()
    t_rows = schedule.timesteps.to(x_T.device).unsqueeze(1).repeat(1, len(x_T))
    # x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), as two factors
    x_t_factor = schedule.alpha_bar.rsqrt().tolist()
    eps_factor = (-((1.0 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()).tolist()
    a, b, c, s = ([0.0] * num_steps if weight is None else weight.tolist() for weight in weights)

    x_t = x_0 = x_T
    for index, i in enumerate(reversed(range(num_steps))):
        eps = eps_model(x_t, t_rows[i])
        nfe += nfe_per_call
        last_x_0, x_0 = x_0, (x_t * x_t_factor[i]).add_(eps, alpha=eps_factor[i])
        if clip_x_0:
            x_0.clamp_(-1.0, 1.0)
        started_from = x_t
        if i > 0:  # after the last step x_0 is the sample itself
            x_t = (x_0 * a[i]).add_(x_t, alpha=b[i])
            if c[i] != 0.0:
                x_t.add_(last_x_0, alpha=c[i])
            if s[i] > 0.0:
                x_t.add_(noise(timesteps[i]), alpha=s[i])
        if callback is not None:
            callback(SamplerStep(index, num_steps, timesteps[i], started_from, x_0))
    return SampleResult(x_0, nfe)


def to_images(x_0: Tensor) -> np.ndarray:
    """x_0 (B, C, H, W) floating, on any device -> the nearest grey levels, uint8 (B, H, W, C); clipped to [-1, 1]."""
    levels = ((x_0.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
