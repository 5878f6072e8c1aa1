"""How fast each sampler converges: its error against the number of steps, and the order fitted to it.

    python -m tools.bench.sampler_orders

The data are N(mu, s**2), for which E[eps | x_t] is known and takes the network's place. A sampler that does not clip is
then an affine map of x_T and of its noises, so a batch of unit vectors through the sampler itself, in float64, gives
the mean and standard deviation of its samples without drawing any. x_T is distributed as q(x_T), not N(0, 1), so that
the error (2-Wasserstein, between Gaussians) is the solver's alone.

Orders are fitted on a schedule whose timesteps are even in lambda = log(sqrt(alpha_bar / (1 - alpha_bar))), in which
DPM-Solver++ has its order, and which ends at alpha_bar = 1 - 2e-9. The schedules of training have timesteps even in t:
of those next to the image each halves 1 - alpha_bar or more, which is 0.35 or more in lambda however many they are.
They also end at about alpha_bar = 1 - 1e-4, which alone costs the samples some deviation. So their errors are shown,
but no second order is to be expected of them.
"""

import launch.first  # noqa: F401

# isort: split
import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion.samplers import SAMPLERS, sample
from ddpm.diffusion.schedule import Schedule, cosine, dns, linear
from launch.terminal import console

STEPS = (5, 10, 20, 50, 100, 200, 500, 1000)
FITTED_STEPS = STEPS[-4:]
"""Where the steps are small enough for the order to show."""
MU, S = 0.2, 0.5


class Case(NamedTuple):
    name: str
    sampler: str
    options: dict[str, Any]
    order: float
    """The order that theory gives it."""


CASES = (
    Case("ancestral, fixed_large", "ancestral", {"variance": "fixed_large"}, 1),
    Case("ancestral, fixed_small", "ancestral", {"variance": "fixed_small"}, 1),
    Case("ddim", "ddim", {}, 1),
    Case("dpmpp_2m", "dpmpp_2m", {}, 2),
)


def even_in_lambda(timesteps: int = 2001, low: float = -5.0, high: float = 10.0) -> Schedule:
    """A schedule whose lambda falls linearly from `high` at t = 0 to `low`."""
    alpha_bar = torch.sigmoid(2.0 * torch.linspace(high, low, timesteps, dtype=torch.float64))
    return Schedule.from_beta(1.0 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))


def exact_eps(schedule: Schedule, mu: float, s: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[eps | x_t] for x_0 ~ N(mu, s**2)."""

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mu) / (alpha_bar * s**2 + 1 - alpha_bar)

    return eps_model


def error(case: Case, schedule: Schedule, steps: int, mu: float = MU, s: float = S) -> float:
    """2-Wasserstein distance of the sampler's N(mean, std**2) from N(mu, s**2)."""
    # row 0: everything zero; row 1: x_T = 1; the others: one of the noises is 1
    num_noises = steps if case.sampler == "ancestral" else 0
    x_T = torch.zeros(2 + num_noises, 1, 1, 1, dtype=torch.float64)
    x_T[1] = 1.0
    row = {t: 2 + i for i, t in enumerate(schedule.respace(steps).timesteps.tolist())}

    def noise(t: int) -> Tensor:
        unit = torch.zeros_like(x_T)
        unit[row[t]] = 1.0
        return unit

    coefficients = SAMPLERS[case.sampler](schedule, steps, **case.options)
    result = sample(exact_eps(schedule, mu, s), coefficients, x_T, noise=noise, clip_x_0=False)
    constant, *factors = result.x_0.flatten().tolist()
    of_x_T, *of_noise = [factor - constant for factor in factors]
    alpha_bar = schedule.alpha_bar[-1].item()
    mean = constant + of_x_T * math.sqrt(alpha_bar) * mu
    variance = of_x_T**2 * (alpha_bar * s**2 + 1 - alpha_bar) + sum(factor**2 for factor in of_noise)
    return math.hypot(mean - mu, math.sqrt(variance) - s)


def fitted_order(errors: dict[int, float]) -> float:
    """The slope of a line through (log steps, -log error)."""
    x = [math.log(steps) for steps in errors]
    y = [-math.log(value) for value in errors.values()]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return slope / sum((a - x_mean) ** 2 for a in x)


def table(title: str, errors: dict[str, dict[int, float]], orders: bool) -> str:
    lines = [title, f"{'':<24}" + "".join(f"{steps:>10}" for steps in STEPS) + ("     order" if orders else "")]
    for name, by_steps in errors.items():
        line = f"{name:<24}" + "".join(f"{value:>10.2e}" for value in by_steps.values())
        if orders:
            line += f"{fitted_order({steps: by_steps[steps] for steps in FITTED_STEPS}):>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    def errors(schedule: Schedule) -> dict[str, dict[int, float]]:
        return {case.name: {steps: error(case, schedule, steps) for steps in STEPS} for case in CASES}

    by_lambda = errors(even_in_lambda())
    fitted = f"order fitted to {FITTED_STEPS[0]} steps and more"
    print(table(f"error against N({MU}, {S}**2), timesteps even in lambda; {fitted}", by_lambda, orders=True))
    schedules = {"linear": linear(1000, 1e-4, 0.02), "cosine": cosine(1000), "dns": dns(1000, 1e-4, 0.02, 5)}
    for name, schedule in schedules.items():
        alpha_bar = schedule.alpha_bar[0].item()
        floor = S - math.sqrt(alpha_bar) * S**2 / math.sqrt(alpha_bar * S**2 + 1 - alpha_bar)
        title = f"\n{name}, T = 1000, timesteps even in t; an exact solver that ends at t = 0 has {floor:.1e}"
        print(table(title, errors(schedule), orders=False))
    return 0


if __name__ == "__main__":
    console.run_script(main)
