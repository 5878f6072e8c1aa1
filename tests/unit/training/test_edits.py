"""Edits of the code that research makes (tools/CONTRIBUTING.md): another network, another optimizer, resumed as ours
are."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm.config.schema import Config
from ddpm.network import build
from ddpm.network.arithmetic import forward_flops
from ddpm.run import generations
from ddpm.sampling.denoiser import Denoiser
from ddpm.training import optimizer
from ddpm.training.optimizer import bare
from ddpm.training.update import is_adam
from tests.training import assert_same_end, live, make_config, make_run

TOTAL = 8


class Line(nn.Module):
    """A network of the least form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        return self.conv(x_t) + 1e-3 * t[:, None, None, None]  # type: ignore[no-any-return]


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, "Symbolic discovery of optimization algorithms", counting its steps as many do."""

    def __init__(self, parameters: Iterable[Any], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not (state := self.state[p]):
                    state.update(step=0, average=torch.zeros_like(p))
                state["step"] += 1
                now, later = group["betas"]
                p.sub_(group["lr"] * (now * state["average"] + (1 - now) * p.grad).sign())
                state["average"].lerp_(p.grad, 1 - later)


def by_dimension(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Weights decay, biases do not."""
    given = [*parameters]
    groups = [{"params": [p for p in given if (p.ndim > 1) is decays], "weight_decay": 0.1 * decays}
              for decays in (True, False)]  # fmt: skip
    made: torch.optim.Optimizer = bare(torch.optim.AdamW)(groups, lr=config.train.lr, fused=True)
    return made


BUILT: dict[str, Callable[[Config, Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "lion": lambda config, parameters: Lion(parameters, config.train.lr),
    "by dimension": by_dimension,
}


@pytest.mark.parametrize("kind", BUILT)
def test_with_another_optimizer_a_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(optimizer, "build", BUILT[kind])
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(make_config(), one)
    live(make_config(), other, stops=[2, 5])
    assert_same_end(one, other, TOTAL)


def test_another_network_needs_a_forward_pass_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "UNet", lambda **structure: Line())
    config, run = make_config(log__grid_every_steps=4), make_run(tmp_path)
    live(config, run, stops=[3])
    model = build.build_model(config, torch.device("cpu"), "off")
    model.load_state_dict(generations.load(run, TOTAL)["ema"])
    x_t = torch.zeros(2, 3, 8, 8)
    assert Denoiser.of(config, model, "fp32").eps(x_t, torch.tensor([0, 7]), None).shape == x_t.shape
    assert forward_flops(config) == 2 * 3 * 27 * 64


@pytest.mark.parametrize(
    ("made", "ours"),
    [
        (lambda ps: bare(torch.optim.Adam)(ps, fused=True), True),
        (lambda ps: bare(torch.optim.AdamW)(ps, fused=True), True),
        (lambda ps: torch.optim.Adam(ps), True),
        (lambda ps: torch.optim.RAdam(ps), False),
        (lambda ps: torch.optim.Adam(ps, amsgrad=True), False),
        (lambda ps: Lion(ps, 0.1), False),
        (lambda ps: torch.optim.Adam([{"params": ps[:1]}, {"params": ps[1:]}]), False),
        (lambda ps: torch.optim.Adam(ps[:1]), False),
        (lambda ps: type("Mine", (torch.optim.Adam,), {"step": lambda self: None})(ps), False),
    ],
)
def test_only_adam_of_all_weights_is_computed_by_its_kernels_on_a_gpu(made: Any, ours: bool) -> None:
    """They would take its steps for another's, whose betas have the same names."""
    model = nn.Linear(2, 2)
    assert is_adam(made([*model.parameters()]), model) is ours
