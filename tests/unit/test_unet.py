"""ddpm/unet.py: structure, initial weights, conditioning, and the ways it is run."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ddpm.unet import Attention, ResidualBlock, UNet, timestep_embedding


def _small(**changes) -> UNet:
    torch.manual_seed(0)
    options = {
        "image_size": 16,
        "base_channels": 32,
        "channel_mults": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (8,),
        "attention_heads": 2,
        "dropout": 0.0,
    }
    return UNet(**{**options, **changes})


def _trained(**changes) -> UNet:
    """As if trained: no weight is zero any more."""
    model = _small(**changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def _inputs(num: int = 2, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, size, size, generator=generator), torch.tensor([3, 700, 999, 0][:num])


def _num_attentions(modules: Sequence[nn.Module] | nn.Module) -> list[int]:
    return [sum(isinstance(m, Attention) for m in module.modules()) for module in modules]


def test_the_default_is_the_papers_cifar10_network():
    with torch.device("meta"):
        model = UNet(image_size=32)
    # 35.7 M in the paper; to the weight, the layout of diffusers' google/ddpm-cifar10-32
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    assert _num_attentions(model.encoder) == [0, 2, 0, 0]
    assert _num_attentions(model.decoder) == [0, 0, 3, 0]
    assert _num_attentions([model.bottleneck]) == [1]
    assert sum(isinstance(m, ResidualBlock) for m in model.modules()) == 4 * 2 + 2 + 4 * 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_resolutions": (16, 8), "blocks_per_level": 2},
        {"attention_resolutions": ()},
        {"base_channels": 24, "attention_heads": 3},  # 8 groups, not 32
        {"base_channels": 2, "attention_heads": 1},  # one frequency
        {"channel_mults": (1,), "attention_resolutions": ()},
        {"channel_mults": (2, 1, 3), "attention_resolutions": (4,)},
        {"in_channels": 1},
    ],
)
def test_eps_has_the_shape_of_x_t(changes):
    model = _small(**changes)
    x_t = torch.randn(2, model.in_channels, 16, 16)
    eps = model(x_t, torch.tensor([0, 999]))
    assert eps.shape == x_t.shape and eps.dtype == torch.float32


def test_the_network_starts_at_zero_and_its_blocks_at_the_identity():
    model = _small()
    x_t, t = _inputs()
    assert torch.equal(model(x_t, t), torch.zeros_like(x_t))
    for module in model.modules():
        if isinstance(module, Attention):
            x = torch.randn(1, 64, 8, 8)
            assert torch.equal(module(x), x)
        if isinstance(module, ResidualBlock) and isinstance(module.skip, nn.Identity):
            x = torch.randn(1, module.conv_1.in_channels, 8, 8)
            assert torch.equal(module(x, torch.randn(1, 128)), x)


def test_gradients_reach_every_parameter():
    model = _trained(num_classes=4)
    x_t, t = _inputs()
    model(x_t, t, torch.tensor([0, 3])).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_the_first_gradient_reaches_the_output_layer():
    """Zero weights must not be a dead point: the first update moves the output, later ones the rest."""
    model = _small()
    x_t, t = _inputs()
    (model(x_t, t) - x_t).square().mean().backward()
    assert model.conv_out.weight.grad.abs().max() > 0


def test_the_timestep_embedding_is_sines_and_cosines_of_falling_frequency():
    t = torch.tensor([0, 1, 998, 999])
    embedding = timestep_embedding(t, 8)
    assert embedding.dtype == torch.float32 and embedding.shape == (4, 8)
    for row, step in zip(embedding.tolist(), t.tolist(), strict=True):
        angles = [step * 10000 ** (-i / 3) for i in range(4)]
        # float32 angles up to 999: 2**-24 of them
        assert row == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_neighbouring_timesteps_stay_apart(dtype):
    with torch.autocast("cpu", dtype):
        embedding = timestep_embedding(torch.tensor([998, 999]), 128)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, timestep_embedding(torch.tensor([998, 999]), 128))
    assert (embedding[0] - embedding[1]).abs().max() > 0.1


def test_each_sample_sees_its_own_x_t_and_t_alone():
    model = _trained().eval()
    x_t, t = _inputs(4)
    whole = model(x_t, t)
    for i in range(4):
        # another batch size may take another convolution algorithm: float32 rounding
        torch.testing.assert_close(model(x_t[i : i + 1], t[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-4)
    assert (model(x_t, t.flip(0)) - whole).abs().max() > 1e-2


def test_every_block_is_given_t():
    model = _trained().eval()
    x_t, t = _inputs()
    base = model(x_t, t)
    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock):
            weight = module.embed.weight.detach().clone()
            with torch.no_grad():
                module.embed.weight.zero_()
                assert not torch.equal(model(x_t, t), base), name
                module.embed.weight.copy_(weight)


def test_class_labels_change_the_prediction():
    model = _trained(num_classes=10).eval()
    x_t, t = _inputs()
    a, b = model(x_t, t, torch.tensor([0, 5])), model(x_t, t, torch.tensor([0, 6]))
    assert torch.equal(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 1e-3


def test_labels_are_required_exactly_where_there_are_classes():
    x_t, t = _inputs()
    with pytest.raises(ValueError, match="labels are missing; with num_classes=10"):
        _small(num_classes=10)(x_t, t)
    with pytest.raises(ValueError, match="labels are given; with num_classes=0"):
        _small()(x_t, t, torch.tensor([0, 1]))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_attentions_are_softmax_attention(heads, layout):
    torch.manual_seed(0)
    attention = Attention(32, heads, True)
    x = torch.randn(2, 32, 4, 4).to(memory_format=layout)
    with torch.no_grad():
        attention.proj.weight.normal_()
        q, k, v = attention.qkv(attention.norm(x)).flatten(2).double().chunk(3, 1)
        out = torch.empty_like(v)
        width = 32 // heads
        for b in range(2):
            for h in range(heads):
                rows = slice(h * width, (h + 1) * width)
                logits = q[b, rows].T @ k[b, rows] / math.sqrt(width)
                out[b, rows] = v[b, rows] @ torch.softmax(logits, 1).T
        expected = x + attention.proj(out.float().view(2, 32, 4, 4))
        for fused in (True, False):
            attention.fused = fused
            # float32 sums of 32 products of a few units
            torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)


def test_the_attention_can_be_chosen_at_the_start_and_later():
    model = _small(fused_attention=False)
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    assert not any(m.fused for m in attentions)
    model.set_fused_attention(True)
    assert all(m.fused for m in attentions)
    assert all(m.fused for m in _small().modules() if isinstance(m, Attention))


def test_channels_last_gives_the_same_prediction():
    model = _trained().eval()
    x_t, t = _inputs()
    plain = model(x_t, t)
    model = model.to(memory_format=torch.channels_last)
    eps = model(x_t.to(memory_format=torch.channels_last), t)
    assert eps.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(eps, plain, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_autocast_predicts_and_trains(dtype, fused):
    model = _trained(fused_attention=fused)
    x_t, t = _inputs()
    exact = model(x_t, t)
    with torch.autocast("cpu", dtype):
        eps = model(x_t, t)
    assert eps.dtype == dtype
    # bf16 keeps 8 bits: 0.4 % a rounding, some tens of them in a row
    assert (eps.float() - exact).abs().max() < 0.1 * exact.abs().max()
    eps.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_network_of_bf16_weights_takes_float32_images():
    model = _trained()
    x_t, t = _inputs()
    exact = model(x_t, t)
    eps = model.bfloat16()(x_t, t)
    assert eps.dtype == torch.bfloat16
    assert (eps.float() - exact).abs().max() < 0.1 * exact.abs().max()  # as above


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_whole_network_is_one_compiled_graph(num_classes):
    model = _trained(num_classes=num_classes).eval()
    x_t, t = _inputs()
    arguments = (x_t, t, torch.tensor([0, 2])) if num_classes else (x_t, t)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # fullgraph: a break is an error
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_dropout_acts_in_training_alone_and_follows_the_global_seed():
    model = _trained(dropout=0.5)
    x_t, t = _inputs()
    torch.manual_seed(1)
    first = model(x_t, t)
    assert not torch.equal(model(x_t, t), first)
    torch.manual_seed(1)
    assert torch.equal(model(x_t, t), first)
    model.eval()
    assert torch.equal(model(x_t, t), model(x_t, t))


def test_initial_weights_depend_on_the_global_seed_alone():
    a, b = _small().state_dict(), _small().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18, "channel_mults": (1, 2, 2)}, "image_size is 18; .* multiple of 4"),
        ({"attention_resolutions": (16, 7)}, r"attention_resolutions has \[7\]; .*\[16, 8\]"),
        ({"attention_heads": 5}, "attention_heads is 5; .* 64 channels at resolution 8"),
        ({"attention_heads": 5, "attention_resolutions": ()}, "attention_heads is 5"),  # the bottleneck's
        (
            {"attention_heads": 64, "attention_resolutions": (16,)},
            "attention_heads is 64; .* 32 channels at resolution 16",
        ),
        ({"channel_mults": ()}, r"channel_mults is \[\]"),
        ({"channel_mults": (1, 0)}, r"channel_mults is \[1, 0\]"),
        ({"base_channels": 33}, "base_channels is 33; .* even"),
        ({"base_channels": 0}, "base_channels is 0; .* at least 1"),
        ({"blocks_per_level": 0}, "blocks_per_level is 0"),
        ({"attention_heads": 0}, "attention_heads is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; .*\[0, 1\)"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_an_impossible_structure_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _small(**changes)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 3, 16, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x_t has shape .* \(3, 16, 16\)"):
        _small()(torch.zeros(shape), torch.zeros(2, dtype=torch.int64))
