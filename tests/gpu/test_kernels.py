"""The network by this project's kernels is the network by torch's, and a replayed evaluation is one that is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ddpm.diffusion import rng
from ddpm.network import attention, fused
from ddpm.network.device import autocast
from ddpm.network.prepared import Prepared
from ddpm.network.unet import UNet
from ddpm.network.weights import cast_once
from ddpm.sampling.denoiser import Replays, eps_of


def network(device: torch.device) -> UNet:
    torch.manual_seed(0)
    model = UNet(image_size=16, base_channels=64, channel_mults=(1, 2, 3), attention_resolutions=(8,), dropout=0.2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05) if not p.any() else None
    return model.to(device).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_output_and_gradients_are_as_near_to_the_exact_ones_as_those_of_torchs_kernels(
    device: torch.device, precision: str
) -> None:
    model = network(device)
    assert fused.serve(model, device)
    x = rng.normal(rng.key(0, "x"), torch.arange(8, device=device), 0, (3, 16, 16))
    t = torch.arange(8, device=device) * 100
    places = rng.places(rng.key(0, "dropout"), torch.arange(8, device=device), 7)

    def found(own: bool, precision: str, dtype: torch.dtype) -> list[torch.Tensor]:
        model.to(dtype).set_own_kernels(own)
        model.zero_grad()
        forward = Prepared(model, precision) if own else model
        with autocast(precision, device):
            y = forward(x.to(dtype), t, None, places)
        (y.float() - x).square().mean().backward()
        return [y.double().detach(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]

    theirs = found(False, precision, torch.float32)
    ours = found(True, precision, torch.float32)
    exact = found(False, "fp32", torch.float64)
    assert len(exact) == len(ours) == 1 + len(list(model.parameters()))
    for e, a, b in zip(exact, theirs, ours, strict=True):
        assert (b - e).norm() <= 2 * (a - e).norm() + 1e-6 * e.norm(), (tuple(e.shape), (a - e).norm(), (b - e).norm())


def test_more_rows_of_pictures_than_the_second_dimension_of_a_grid_can_count_are_doubled(device: torch.device) -> None:
    torch.manual_seed(0)
    a = torch.randn(2049, 8, 16, 16, device=device).to(memory_format=torch.channels_last).requires_grad_()
    given = torch.randn(2049, 8, 32, 32, device=device)
    ours, theirs = fused.double(a), nn.functional.interpolate(a, scale_factor=2.0)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, a, given), torch.autograd.grad(theirs, a, given))


def test_more_pictures_than_a_grid_has_programs_for_are_normalised_and_summed(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(65_537, 16, 2, 2, device=device).to(memory_format=torch.channels_last).requires_grad_()
    norm, bias = nn.GroupNorm(4, 16, device=device), torch.randn(16, device=device).requires_grad_()
    given = torch.randn_like(x)
    ours = fused.add(fused.norm_act(x, norm, silu=True)[0], None, bias)
    theirs = nn.functional.silu(norm(x)) + bias[:, None, None]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    of = [x, bias, *norm.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, of, given) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    assert len(rng.normal(rng.key(0, "x"), torch.arange(65_537, device=device), 0, (4,))) == 65_537


def test_replayed_evaluations_have_the_bits_of_others(device: torch.device) -> None:
    model = network(device).eval()
    model.set_own_kernels(True)
    cast_once(model, "bf16")
    eps = eps_of(model, "bf16")
    replays = Replays(eps)
    for i in range(5):
        with torch.inference_mode():
            x = rng.normal(rng.key(0, "x"), torch.arange(8, device=device), i, (3, 16, 16))
            t = torch.full((8,), 10 * i, device=device)
            assert torch.equal(replays(x, t, None), eps(x, t, None)), i
    assert list(replays._recorded.values()) != [None] and replays._recorded


def test_evaluations_are_recorded_while_another_thread_takes_memory_and_computes(device: torch.device) -> None:
    """As a loader's threads do, or another model's."""
    told: list[float] = []

    def other(num: int) -> None:
        taken = torch.empty(num, device=device), torch.empty(num // 64, pin_memory=True)  # of the driver
        told.append(taken[0].fill_(0.0).sum().item() + torch.ones(num // 64).to(device).sum().item())

    def eps(x_t: torch.Tensor, t: torch.Tensor, labels: None) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=other, args=(1 << 26,))
            thread.start()
            thread.join()
        return x_t * 2 + t[:, None, None, None]

    other(1 << 20)  # so that its kernels are loaded
    replays, x, t = Replays(eps), torch.randn(2, 3, 4, 4, device=device), torch.arange(2, device=device)
    assert all(torch.equal(replays(x + i, t, None), eps(x + i, t, None)) for i in range(4))
    assert told == [1 << 14, 1 << 20] and list(replays._recorded.values()) != [None]


def test_two_threads_that_evaluate_two_models_on_one_gpu_have_the_bits_of_one_after_the_other(
    device: torch.device,
) -> None:
    """Each records a graph again and again, beside the other's; with a graph torch drops what its products work in."""
    models = [network(device).eval() for _ in range(2)]

    def evaluated(model: UNet, seed: int) -> list[torch.Tensor]:
        found = []
        for _ in range(4):
            replays = Replays(eps_of(model, "bf16"))
            for i in range(6):
                x = rng.normal(rng.key(seed, "x"), torch.arange(8, device=device), i, (3, 16, 16))
                found.append(replays(x, torch.full((8,), 10 * i, device=device), None))
            assert None not in replays._recorded.values()
        return found

    for model in models:
        model.set_own_kernels(True)
    expected = list(map(evaluated, models, (0, 1)))
    with ThreadPoolExecutor(2) as threads:
        for ours, alone in zip(threads.map(evaluated, models, (0, 1)), expected, strict=True):
            assert all(map(torch.equal, ours, alone))


def attended(device: torch.device, heads: int, dtype: torch.dtype, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, keys and values of 256 channels, and a gradient of what comes of them."""
    index = torch.arange(8, device=device)
    shapes = {"qkv": (3 * 256, side, side), "given": (256, side, side)}
    drawn = [rng.normal(rng.key(0, name), index, 0, shape).to(dtype) for name, shape in shapes.items()]
    qkv, given = (x.contiguous(memory_format=torch.channels_last) for x in drawn)
    return 2 * qkv, given


@pytest.mark.parametrize("side", [4, 7, 16])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_and_its_gradient_are_as_near_to_the_exact_ones_as_torchs(
    device: torch.device, dtype: torch.dtype, heads: int, side: int
) -> None:
    qkv, given = attended(device, heads, dtype, side)

    def found(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        of = qkv.to(dtype).requires_grad_()
        y = attend(of, heads)
        return [x.double() for x in (y, *torch.autograd.grad(y, of, given.to(dtype)))]

    exact = found(attention._torchs, torch.float64)
    theirs, ours = found(attention._torchs, dtype), found(attention.Attention.apply, dtype)
    for e, a, b in zip(exact, theirs, ours, strict=True):
        assert (b - e).norm() <= 2 * (a - e).norm() + 1e-6 * e.norm(), ((a - e).norm(), (b - e).norm())


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_has_the_same_bits_again_and_in_a_graph(device: torch.device, heads: int) -> None:
    drawn, given = attended(device, heads, torch.bfloat16, 16)

    def found() -> list[torch.Tensor]:
        qkv = drawn.detach().requires_grad_()  # one of this stream
        y = attention.Attention.apply(qkv, heads)
        return [y, *torch.autograd.grad(y, qkv, given)]

    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        first, second = found(), found()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            recorded = found()
        graph.replay()
    finally:
        torch.set_deterministic_debug_mode(before)
    for one, *others in zip(first, second, recorded, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_the_default_attention_is_computed_by_products_in_training_alone(device: torch.device) -> None:
    qkv, _ = attended(device, 1, torch.bfloat16, 16)
    assert attention.attention(qkv.requires_grad_(), 1).grad_fn.name() == "AttentionBackward"
    assert torch.equal(attention.attention(qkv.detach(), 1), attention._torchs(qkv.detach(), 1))
