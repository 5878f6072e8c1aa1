"""The forward process and what training needs of it: q(x_t | x_0), the loss, q(x_t-1 | x_t, x_0).

Owns: Ho et al. 2020, "Denoising diffusion probabilistic models", equations 4, 6, 7 and 14. Must not know: networks,
optimizers, where eps and t come from.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion.schedule import Schedule

LOSSES = {"l2": torch.nn.functional.mse_loss, "l1": torch.nn.functional.l1_loss}


class Diffusion:
    """A schedule's tables in float32, on the CPU until `to` moves them.

    Images are (B, C, H, W) float32, x_0 in [-1, 1]; t is int64 (B,), indices into the schedule in [0, S). For a t
    outside torch raises an error. All arguments must be on the tables' device.
    """

    def __init__(self, schedule: Schedule) -> None:
        # rounded to float32 once, after the square roots were taken in float64
        self._tables = {
            "sqrt_alpha_bar": schedule.alpha_bar.sqrt(),
            "sqrt_rest": (1.0 - schedule.alpha_bar).sqrt(),
            "posterior_x_0": schedule.posterior_x_0,
            "posterior_x_t": schedule.posterior_x_t,
            "posterior_variance": schedule.posterior_variance,
        }
        self._tables = {name: table.float() for name, table in self._tables.items()}

    def to(self, device: torch.device | str) -> "Diffusion":
        """Moves the tables, in place, and returns itself."""
        self._tables = {name: table.to(device) for name, table in self._tables.items()}
        return self

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (equation 4). eps: like x_0, standard normal."""
        return self._at("sqrt_alpha_bar", t) * x_0 + self._at("sqrt_rest", t) * eps

    def predict_x_0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 from which `q_sample` makes x_t with this eps (equation 4 solved for x_0); not clipped."""
        return (x_t - self._at("sqrt_rest", t) * eps) / self._at("sqrt_alpha_bar", t)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_t-1 | x_t, x_0) (equations 6 and 7); x_0 and 0 at t =
        0."""
        mean = self._at("posterior_x_0", t) * x_0 + self._at("posterior_x_t", t) * x_t
        return mean, self._at("posterior_variance", t)

    def losses(
        self, eps_model: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, eps: Tensor, kind: str = "l2"
    ) -> Tensor:
        """`loss` of what eps_model(x_t, t) makes of each sample, float32 (B,): what is trained on and validated by."""
        return self.loss(eps_model(self.q_sample(x_0, t, eps), t), eps, kind)

    @staticmethod
    def loss(eps_pred: Tensor, eps: Tensor, kind: str = "l2") -> Tensor:
        """Mean error over the elements of each sample, float32 (B,); for l2 the batch's mean is L_simple (equation 14).

        eps_pred: (B, C, H, W), any floating type; eps: the same shape, else ValueError. kind: l2 (squared differences)
        or l1 (absolute differences), else ValueError.
        """
        if kind not in LOSSES:
            raise ValueError(f"loss kind is {kind!r}; allowed: {', '.join(LOSSES)}")
        if eps_pred.shape != eps.shape:
            raise ValueError(f"eps_pred has shape {tuple(eps_pred.shape)}; it must be eps's, {tuple(eps.shape)}")
        return LOSSES[kind](eps_pred.float(), eps.float(), reduction="none").flatten(1).mean(1)

    def _at(self, name: str, t: Tensor) -> Tensor:
        # gather refuses negative t, where indexing would count from the end
        return self._tables[name].gather(0, t).view(-1, 1, 1, 1)
