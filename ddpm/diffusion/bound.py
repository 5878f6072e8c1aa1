"""The variational bound on an image's negative log-likelihood, in bits per dimension and in its three parts.

Owns: Ho et al. 2020, equations 5, 8 and 13, in float64. Must not know: networks beyond eps(x_t, t), generators, files.

As Ho et al. compute it: one draw of x_t for each t; the predicted x_0 is clipped if that of samples is; the variances
are fixed, and at t = 0 the posterior's at t = 1 is taken for both kinds. Their decoder approximates the normal
distribution and takes no probability below 1e-12; here it is exact, far tails included.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion.samplers import EpsModel, Noise
from ddpm.diffusion.schedule import Schedule

HALF_BIN = 1.0 / 255.0
"""Half the width of a grey level of images in [-1, 1]."""


def variational_bound(
    eps_model: EpsModel,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    *,
    variance: str,
    clip_x_0: bool,
    callback: Callable[[], None] = lambda: None,
) -> Tensor:
    """(L_T, L_1 + … + L_T-1, L_0) of each image in bits per dimension: float64 (B, 3), which sum to its bound.

    eps_model: called with x_t in float32, once for each timestep. x_0: float64 (B, C, H, W), 256 levels in [-1, 1].
    noise(t): returns standard normals like x_0. variance: as of Schedule.reverse_variance. callback: called before each
    evaluation.
    """
    model = schedule.reverse_variance(variance).tolist()
    posterior, weight = schedule.posterior_variance.tolist(), schedule.posterior_x_0.tolist()
    alpha_bar = schedule.alpha_bar.tolist()
    per_dimension = 1.0 / (math.log(2.0) * x_0[0].numel())

    def total(nats: Tensor) -> Tensor:
        return nats.flatten(1).sum(1) * per_dimension

    rest = 1.0 - alpha_bar[-1]
    prior = total(0.5 * (rest - 1.0 - math.log(rest) + alpha_bar[-1] * x_0**2))
    between, decoder = torch.zeros_like(prior), torch.zeros_like(prior)
    for i in reversed(range(len(alpha_bar))):
        callback()
        root, rest = math.sqrt(alpha_bar[i]), math.sqrt(1.0 - alpha_bar[i])
        x_t = root * x_0 + rest * noise(i)
        t = schedule.timesteps[i].to(x_0.device).expand(len(x_0))
        predicted = (x_t - rest * eps_model(x_t.float(), t).double()) / root
        if clip_x_0:
            predicted = predicted.clamp(-1.0, 1.0)
        if i:
            # the two means differ only in their x_0, since x_t has the same weight in both
            squared = (weight[i] * (x_0 - predicted)) ** 2
            ratio = posterior[i] / model[i]
            between += total(0.5 * (ratio - 1.0 - math.log(ratio) + squared / model[i]))
        else:
            # the mean is the predicted x_0
            decoder = total(-log_level(x_0, predicted, math.sqrt(posterior[1])))
    return torch.stack([prior, between, decoder], 1)


def log_level(x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """log of the normal probability of the grey level x (equation 13): the first and the last level reach to infinity.

    x: float64, 256 levels in [-1, 1]; mean: like it. Exact in the tails: the difference is taken on the side on which
    both logarithms are small.
    """
    above, below = (x + HALF_BIN - mean) / sigma, (x - HALF_BIN - mean) / sigma
    above = torch.where(x > 1.0 - HALF_BIN, torch.inf, above)
    below = torch.where(x < HALF_BIN - 1.0, -torch.inf, below)
    right = below > 0
    above, below = torch.where(right, -below, above), torch.where(right, -above, below)
    upper, lower = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    return upper + torch.log1p(-torch.exp(lower - upper))
