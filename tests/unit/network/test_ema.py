"""ddpm/network/ema.py: the average against its closed form, and its independence of the model."""

import pytest
import torch
from torch import nn

from ddpm.network.ema import EMA


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_average_is_the_closed_form():
    model, decay, num_updates = _model(), 0.9, 20
    first = [p.detach().double().clone() for p in model.parameters()]
    ema = EMA(model, decay)
    history = []
    for step in range(1, num_updates + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        history.append([p.detach().double().clone() for p in model.parameters()])
        ema.update(model, step)
    for i, average in enumerate(ema.model.parameters()):
        expected = decay**num_updates * first[i]
        for k, weights in enumerate(history):
            expected = expected + (1 - decay) * decay ** (num_updates - 1 - k) * weights[i]
        # twenty float32 updates of values of a few units
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_decay_of_zero_copies_the_model():
    model = _model()
    ema = EMA(model, 0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model, 1)
    for average, p in zip(ema.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, p)


def test_buffers_are_copied_and_not_averaged():
    model = _model()
    ema = EMA(model, 0.99)
    model(torch.randn(8, 3))
    ema.update(model, 1)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert ema.model[1].num_batches_tracked.item() == 1


def test_a_model_without_buffers_is_averaged_too():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    before = ema.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(2.0)
    ema.update(model, 1)
    torch.testing.assert_close(ema.model.weight, before + 1.0)


def test_the_average_shares_nothing_with_the_model_and_is_frozen():
    model = _model().train()
    ema = EMA(model, 0.9)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = ema.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(ema.model[0].weight, before)


def test_the_average_of_a_bf16_model_is_float32():
    ema = EMA(_model().bfloat16(), 0.9)
    assert {p.dtype for p in ema.model.parameters()} == {torch.float32}


def test_the_state_has_the_models_names_and_loads_back():
    model = _model()
    ema = EMA(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    ema.update(model, 1)
    state = ema.state_dict()
    assert type(state) is dict and list(state) == list(model.state_dict())
    other = EMA(_model(), 0.9)
    other.load_state_dict(state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name])
    other.update(model, 2)
    assert not torch.equal(other.state_dict()["0.weight"], state["0.weight"])  # loaded by value


def test_a_state_with_missing_names_is_refused():
    ema = EMA(_model(), 0.9)
    state = ema.state_dict()
    del state["0.bias"]
    with pytest.raises(RuntimeError, match=r"0\.bias"):
        ema.load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema_decay = .*\[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)


def _run(decay: float, num_steps: int, **options) -> tuple[EMA, list[float]]:
    """The average of a weight that is k after step k and 0 before the first, after each step."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    ema, averages = EMA(model, decay, **options), []
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            model.weight.fill_(step)
        ema.update(model, step)
        averages.append(ema.model.weight.item())
    return ema, averages


def test_before_its_start_the_average_is_a_copy() -> None:
    assert _run(0.5, 5, start_step=4)[1] == [1, 2, 3, 0.5 * 3 + 0.5 * 4, 0.5 * 3.5 + 0.5 * 5]


@pytest.mark.parametrize("start_step", [0, 1])
def test_a_start_at_the_first_step_copies_nothing(start_step: int) -> None:
    assert _run(0.5, 2, start_step=start_step)[1] == [0.5, 1.25]


def test_between_its_updates_the_average_stays() -> None:
    assert _run(0.5, 7, every_steps=3)[1] == [0, 0, 1.5, 1.5, 1.5, 3.75, 3.75]
    assert _run(0.5, 6, every_steps=3, start_step=3)[1] == [1, 2, 2.5, 2.5, 2.5, 4.25]


@pytest.mark.parametrize(("start_step", "every_steps"), [(0, 1), (1, 1), (5, 1), (0, 3), (4, 3), (6, 3), (7, 3)])
def test_warm_up_counts_the_updates_since_the_start(start_step: int, every_steps: int) -> None:
    ema = EMA(_model(), 0.6, start_step=start_step, every_steps=every_steps, warmup=True)
    kept = [ema.decay_at(step) for step in range(1, 60) if step >= start_step and step % every_steps == 0]
    assert kept == [min(0.6, (1 + n) / (10 + n)) for n in range(1, len(kept) + 1)]
    assert kept[0] == 2 / 11 and kept[-1] == 0.6


def test_a_resumed_average_goes_on_exactly() -> None:
    options = {"start_step": 3, "every_steps": 2, "warmup": True}
    _, whole = _run(0.9, 12, **options)
    ema, _ = _run(0.9, 7, **options)
    resumed, model = EMA(nn.Linear(1, 1, bias=False), 0.9, **options), nn.Linear(1, 1, bias=False)
    resumed.load_state_dict(ema.state_dict())
    for step in range(8, 13):
        with torch.no_grad():
            model.weight.fill_(step)
        resumed.update(model, step)
    assert resumed.model.weight.item() == whole[-1]


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"start_step": -1}, {"every_steps": 0}])
def test_impossible_settings_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} = "):
        EMA(_model(), **{"decay": 0.9, **options})
