"""ddpm/training/update.py on a GPU: near to torch's clipping, Adam and average, recorded or not, and torch goes on from
its state."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ddpm.training.progress import Window
from ddpm.training.update import Update, serves
from tests.gpu.test_kernels import network

BETAS = tuple(torch.tensor([0.9, 0.999]).tolist())
"""As float32 has them: 0.999 lies 13 units in the last place of 1 - 0.999 beside what float64 has."""


def adam(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.Adam, decay: float = 0.0) -> Any:
    return kind(model.parameters(), lr=1e-3, betas=BETAS, weight_decay=decay, fused=True)  # type: ignore[call-arg]


def draw(model: nn.Module, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn_like(p) for p in model.parameters()]


def give(model: nn.Module, gradients: Iterable[torch.Tensor]) -> None:
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g.to(p.dtype, copy=True)


def everything(model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    names = ("exp_avg", "exp_avg_sq", "step")
    moments = [optimizer.state[p][name] for name in names for p in model.parameters()]
    return [t.detach().clone() for t in [*model.parameters(), *moments, *average.parameters()]]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], ulps: float, more: float = 0.0) -> None:
    """To so many units in the last place of a tensor's largest value."""
    for a, b in zip(ours, theirs, strict=True):
        off, largest = (a.double() - b.double()).abs().max(), b.double().abs().max()
        assert a.dtype == torch.float32 and a.shape == b.shape, tuple(a.shape)
        assert off <= ulps * 2.0**-23 * largest + more, (tuple(a.shape), float(off), float(largest))


def assert_as_near(ours: list[torch.Tensor], theirs: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """To eight units in the last place of a tensor's largest value, and twice what torch's own float32 is off there:
    where gradient and decay nearly cancel, Adam makes a whole step of what rounding has left."""
    for a, b, e in zip(ours, theirs, exact, strict=True):
        off, allowed = (a.double() - e).abs(), 2 * (b.double() - e).abs() + 8 * 2.0**-23 * e.double().abs().max()
        assert a.dtype == torch.float32 and a.shape == e.shape, tuple(a.shape)
        assert bool((off <= allowed).all()), (tuple(a.shape), float((off - allowed).max()))


KINDS = [(torch.optim.Adam, 0.0, 1.0), (torch.optim.Adam, 0.1, math.inf), (torch.optim.AdamW, 0.1, 1e4)]


@pytest.mark.parametrize(("kind", "decay", "most"), KINDS)
def test_it_is_as_near_to_the_exact_update_as_torchs(
    device: torch.device, kind: type[torch.optim.Optimizer], decay: float, most: float
) -> None:
    assert serves(device)
    ours = network(device)
    average, optimizer = copy.deepcopy(ours), adam(ours, kind, decay)
    update, window = Update(ours, average, optimizer, adam=True, max_norm=most), Window.empty(device)
    others = []
    for dtype in (torch.float32, torch.float64):
        model = network(device).to(dtype)
        others.append((model, copy.deepcopy(model).requires_grad_(False), adam(model, kind, decay)))
    for step in range(1, 6):
        gradients, lr, share = draw(ours, step), 1e-3 * step, [0.9, 0.0, 0.1, 1.0, 1e-4][step - 1]
        give(ours, gradients)
        numbers = torch.tensor([lr, share], device=device)
        norm, finite = update(torch.ones((), device=device), *numbers, window)
        expected = []
        for model, its_average, its in others:
            give(model, gradients)
            expected.append(nn.utils.clip_grad_norm_(model.parameters(), most))
            its.param_groups[0]["lr"] = float(numbers[0])
            its.step()
            weights = [p.detach() for p in model.parameters()]
            torch._foreach_lerp_(list(its_average.parameters()), weights, float(numbers[1]))
        assert bool(finite) and float(window.loss) == step
        theirs, exact = (everything(*other) for other in others)
        assert_as_near([norm, *everything(ours, average, optimizer)], [expected[0], *theirs], [expected[1], *exact])


def test_what_is_recorded_has_the_bits_of_what_is_not_and_an_infinity_moves_no_weight(device: torch.device) -> None:
    found = []
    for replayed in (True, False):
        model = network(device)
        average, optimizer, window = copy.deepcopy(model), adam(model, torch.optim.AdamW, 0.1), Window.empty(device)
        update = Update(model, average, optimizer, adam=True, max_norm=1.0)
        give(model, draw(model, 0))
        loss, numbers = torch.ones((), device=device), torch.tensor([1e-3, 0.1], device=device)
        update.compile()
        update(loss, *numbers, window)
        static = draw(model, 1)
        graph, seen = torch.cuda.CUDAGraph(), []
        if replayed:
            with torch.cuda.graph(graph):
                for p, g in zip(model.parameters(), static, strict=True):
                    p.grad = g * 1.0  # where the graph has it
                norm, finite = update(loss, *numbers, window)
            model.zero_grad()
            update.tell()
        for step in range(1, 6):
            numbers[1].fill_(0.0 if step == 2 else 0.2)
            for g, value in zip(static, draw(model, step), strict=True):
                g.copy_(value)
            if step == 3:
                static[5].view(-1)[0] = math.inf
            before = everything(model, average, optimizer)
            if replayed:
                graph.replay()
            else:
                give(model, static)
                norm, finite = update(loss, *numbers, window)
            after, num = everything(model, average, optimizer), len(static)
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert bool(finite) is (step != 3)
            assert all(same[:-num]) is (step == 3) and all(same[-num:]) is (step == 2)
            seen += [norm.clone(), *after]
        found.append([*seen, window.loss, window.grad_norm])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert float(found[0][-1]) > 0 and math.isfinite(float(found[0][-1]))


def test_torchs_adam_goes_on_from_its_state_and_it_from_torchs(device: torch.device) -> None:
    ends = []
    for way in ((True, False), (False, True), (False, False)):
        model = network(device)
        average, state = copy.deepcopy(model), None
        for part, own in enumerate(way):
            optimizer = adam(model)
            if state is not None:
                optimizer.load_state_dict(state)
            update = Update(model, average, optimizer, adam=True, max_norm=math.inf) if own else None
            for step in range(3):
                give(model, draw(model, 3 * part + step))
                numbers = torch.tensor([1e-3, 0.0], device=device)
                if update is not None:
                    update(torch.ones((), device=device), *numbers, Window.empty(device))
                else:
                    optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
        ends.append(everything(model, average, optimizer))
    # torch's bias corrections come from powers of float32, off by 2.4e-7 (powf's four units) at most: by 6e-5 of the
    # root of a correction of 0.002, and less later. So weights may differ by that much of a learning rate at each step.
    num = len(list(model.parameters()))
    for end in ends[:2]:
        assert_close(end[:num], ends[2][:num], 8, more=5 * 6e-5 * 1e-3)
        assert_close(end[num:], ends[2][num:], 8)
