"""The config's `diffusion`: timesteps, schedule, loss, and what float32 can hold of them."""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

from pydantic import Field, model_validator

from ddpm.config.section import Section

NEEDED_BY = {"dns_offset": ("dns",), "beta_start": ("linear", "dns"), "beta_end": ("linear", "dns")}
"""Keys of `diffusion`, and the schedules that use them."""
LEAST_ALPHA_BAR = 2.0**-126
"""float32's smallest normal number: samplers divide by the square root of alpha_bar."""

Variance = Literal["fixed_large", "fixed_small"]
VARIANCES = get_args(Variance)
"""Names of the variances of the ancestral sampler's reverse steps."""


class Diffusion(Section):
    timesteps: int = Field(1000, ge=2, le=1_000_000)
    """T, the number of timesteps; t runs 0 … T-1."""
    schedule: Literal["linear", "cosine", "dns"] = "linear"
    """`linear` (Ho et al.), `cosine` (Nichol & Dhariwal), or `dns`: beta rises as the square of a line, see
    ddpm/diffusion/schedule.py."""
    dns_offset: float = Field(5.0, gt=0)
    """`dns` alone: the offset o, in steps, of beta ~ ((t + o) / (T + 1 + o))**2; T gives the slow form."""
    beta_start: float = Field(1.0e-4, gt=0, lt=1)
    """Lowest beta of `linear` and `dns` for T = 1000; scaled by 1000/T."""
    beta_end: float = Field(0.02, gt=0, lt=1)
    """Highest beta of `linear` and `dns` for T = 1000; scaled by 1000/T."""
    prediction: Literal["eps"] = "eps"
    """What the network predicts: the noise."""
    loss: Literal["l2", "l1"] = "l2"
    """Mean squared, or mean absolute, error of the noise."""
    variance: Variance = "fixed_large"
    """Variance of the ancestral sampler's steps: beta_t (`fixed_large`), or the posterior's (`fixed_small`)."""

    @model_validator(mode="after")
    def _betas(self) -> Diffusion:
        if self.beta_start >= self.beta_end:
            raise ValueError(f"diffusion.beta_start = {self.beta_start}: must be below beta_end = {self.beta_end}")
        if self.schedule in NEEDED_BY["beta_end"] and self.beta_end * 1000 / self.timesteps >= 1:
            least = int(self.beta_end * 1000) + 1
            raise ValueError(
                f"diffusion.timesteps = {self.timesteps}: beta_end is scaled by 1000/T and reaches 1; "
                f"use at least {least}"
            )
        for key, schedules in NEEDED_BY.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.schedule not in schedules and value != default:
                raise ValueError(
                    f"diffusion.{key} = {value}: schedule={self.schedule} makes no use of it; leave it out (default "
                    f"{default}), or use {' or '.join(schedules)}"
                )
        if (last := self._log_alpha_bar()) < math.log(LEAST_ALPHA_BAR):
            raise ValueError(
                f"diffusion.beta_end = {self.beta_end}: alpha_bar falls to 1e{last / math.log(10):.0f} at t = "
                f"{self.timesteps - 1}, which float32 cannot hold (1e-38); use less (default 0.02)"
            )
        return self

    def _log_alpha_bar(self) -> float:
        return _log_alpha_bar(self.schedule, self.timesteps, self.beta_start, self.beta_end, self.dns_offset)


@functools.cache
def _log_alpha_bar(schedule: str, size: int, beta_start: float, beta_end: float, dns_offset: float) -> float:
    """log alpha_bar of the last timestep; schedule.py computes it exactly, but needs torch. 0 for a schedule that keeps
    its own betas below 1, as the cosine."""
    if schedule not in NEEDED_BY["beta_end"]:
        return 0.0
    dns, offset = schedule == "dns", dns_offset
    places = (((i + offset) / (size + 1 + offset)) ** 2 if dns else i / (size - 1) for i in range(size))
    low, high = beta_start * 1000 / size, beta_end * 1000 / size
    return sum(math.log1p(-(low + (high - low) * place)) for place in places)
