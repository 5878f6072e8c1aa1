"""Noise schedules: beta, alpha_bar and the posterior's coefficients, in float64.

Owns: Ho et al. 2020, "Denoising diffusion probabilistic models" (section 2, equations 4, 6 and 7), the cosine schedule
and the selection of fewer timesteps (Nichol & Dhariwal 2021, "Improved DDPM", sections 3.2 and 4). Must not know:
images, networks, devices.

t runs 0 .. T-1, so that the paper's x_t is `t - 1` here and alpha_bar_prev at t = 0 is 1. A new schedule is a function
that returns `Schedule.from_beta(beta)`, a line in SCHEDULES, and its name in ddpm/config/diffusion.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ddpm.config.diffusion import Diffusion

MAX_COSINE_BETA = 0.999


@dataclass(frozen=True, eq=False)
class Schedule:
    """S timesteps, ascending; all tensors have shape (S,) and lie on the CPU."""

    timesteps: Tensor
    """int64: the t that the network is given; 0 .. T-1, or those kept by `respace`."""
    beta: Tensor
    """float64: variance of q(x_t | x_t-1), with t-1 the timestep kept before t."""
    alpha_bar: Tensor
    """float64: q(x_t | x_0) has mean sqrt(alpha_bar) x_0 and variance 1 - alpha_bar (equation 4)."""
    alpha_bar_prev: Tensor
    """float64: alpha_bar one place earlier; 1 at the first."""
    posterior_x_0: Tensor
    """float64: weight of x_0 in the mean of q(x_t-1 | x_t, x_0) (equation 7)."""
    posterior_x_t: Tensor
    """float64: weight of x_t in that mean."""
    posterior_variance: Tensor
    """float64: variance of q(x_t-1 | x_t, x_0) (equation 7); 0 at the first."""

    def __repr__(self) -> str:
        t = self.timesteps
        return f"<Schedule: {len(t)} timesteps, {int(t[0])} to {int(t[-1])}>"

    @classmethod
    def from_beta(cls, beta: Tensor) -> Schedule:
        """The schedule of all T timesteps. beta: float64 (T,), every value in (0, 1), else ValueError."""
        if beta.ndim != 1 or len(beta) == 0 or beta.dtype != torch.float64:
            raise ValueError(f"beta is {beta.dtype} of shape {tuple(beta.shape)}; allowed: float64 (T,), T >= 1")
        outside = ~((beta > 0) & (beta < 1))
        if outside.any():
            t = int(outside.nonzero()[0])
            raise ValueError(f"beta at t={t} is {beta[t].item():.6g}; every beta must lie in (0, 1)")
        return cls._derive(torch.arange(len(beta)), beta, torch.cumprod(1.0 - beta, 0))

    def reverse_variance(self, kind: str) -> Tensor:
        """float64 (S,): of p(x_t-1 | x_t), by kind: fixed_large (beta_t) or fixed_small (the posterior's), else
        ValueError."""
        kinds = {"fixed_large": self.beta, "fixed_small": self.posterior_variance}
        if kind not in kinds:
            raise ValueError(f"variance is {kind!r}; allowed: {', '.join(kinds)}")
        return kinds[kind]

    def respace(self, steps: int, *, keep_first: bool = True) -> Schedule:
        """The same process at `steps` of its timesteps: round(linspace(0, T-1, steps)), ties to even.

        keep_first=False: `steps + 1` timesteps without t = 0, so that a sampler's last step starts as far from the
        image as the steps are from each other; all timesteps if there are no more than `steps`. alpha_bar keeps its
        value at each timestep, and beta is recomputed from it. With one step the noisiest timestep, T-1, is kept.
        steps: in [1, S], else ValueError.
        """
        size = len(self.timesteps)
        if not 1 <= steps <= size:
            raise ValueError(f"steps is {steps}; it must lie in [1, {size}], the number of timesteps of the schedule")
        if steps == size:
            return self
        first = 0 if keep_first and steps > 1 else 1
        # Fractions: in floating point a tie would be rounded one way or the other
        kept = [round(Fraction((first + i) * (size - 1), first + steps - 1)) for i in range(steps)]
        alpha_bar = self.alpha_bar[kept]
        return self._derive(self.timesteps[kept], 1.0 - alpha_bar / _shift(alpha_bar), alpha_bar)

    @classmethod
    def _derive(cls, timesteps: Tensor, beta: Tensor, alpha_bar: Tensor) -> Schedule:
        alpha_bar_prev = _shift(alpha_bar)
        rest, rest_prev = 1.0 - alpha_bar, 1.0 - alpha_bar_prev
        return cls(
            timesteps=timesteps,
            beta=beta,
            alpha_bar=alpha_bar,
            alpha_bar_prev=alpha_bar_prev,
            posterior_x_0=alpha_bar_prev.sqrt() * beta / rest,
            posterior_x_t=(1.0 - beta).sqrt() * rest_prev / rest,
            posterior_variance=beta * rest_prev / rest,
        )


def build(diffusion: Diffusion) -> Schedule:
    """The schedule of T = diffusion.timesteps that a config's `diffusion` section names. ValueError as `from_beta`."""
    return SCHEDULES[diffusion.schedule](diffusion)


def linear(timesteps: int, beta_start: float, beta_end: float) -> Schedule:
    """beta rises linearly (Ho et al. 2020, section 4); both ends are given for T = 1000 and scaled by 1000 / T.

    timesteps: T, at least 1. Raises ValueError if a beta leaves (0, 1), as all schedules here.
    """
    fraction = torch.arange(timesteps, dtype=torch.float64) / max(timesteps - 1, 1)
    return Schedule.from_beta(1000.0 / timesteps * (beta_start + (beta_end - beta_start) * fraction))


def cosine(timesteps: int) -> Schedule:
    """alpha_bar falls as a squared cosine (Nichol & Dhariwal 2021, equation 17, s = 0.008); beta is at most 0.999."""
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return Schedule.from_beta((1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_COSINE_BETA))


def dns(timesteps: int, beta_start: float, beta_end: float, offset: float) -> Schedule:
    """The "dynamic negative square": beta_i = low + (high - low) ((i + offset) / (T + 1 + offset))**2, i = 0 .. T-1.

    low and high are beta_start and beta_end scaled by 1000 / T; neither is reached. offset: usually 5; T gives the slow
    form.
    """
    fraction = (torch.arange(timesteps, dtype=torch.float64) + offset) / (timesteps + 1 + offset)
    return Schedule.from_beta(1000.0 / timesteps * (beta_start + (beta_end - beta_start) * fraction**2))


SCHEDULES: dict[str, Callable[[Diffusion], Schedule]] = {
    "linear": lambda d: linear(d.timesteps, d.beta_start, d.beta_end),
    "cosine": lambda d: cosine(d.timesteps),
    "dns": lambda d: dns(d.timesteps, d.beta_start, d.beta_end, d.dns_offset),
}


def _shift(alpha_bar: Tensor) -> Tensor:
    return torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
