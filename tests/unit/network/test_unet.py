"""ddpm/network/unet.py with its blocks and structure: initial weights, conditioning, and the ways it is run."""

import hashlib
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ddpm.config.model import Model
from ddpm.config.unet_shape import Structure
from ddpm.diffusion import rng
from ddpm.network.blocks import Attention, PlainBlock, ResidualBlock, downsample, reset_parameters, upsample
from ddpm.network.device import autocast
from ddpm.network.dropout import Dropout
from ddpm.network.unet import UNet, timestep_embedding
from ddpm.network.weights import cast_once

PLAIN = {"block": "plain", "downsample": "pool", "upsample": "transpose"}


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


@pytest.mark.parametrize("changes", [
    {}, PLAIN, {"downsample": "conv_asymmetric"}, {"attention_resolutions": (), "middle_attention": False},
    {"attention_resolutions": (16, 8), "attention_in": "encoder"}, {"attention_in": "decoder"},
    {"time_embed_channels": 48}, {"num_classes": 3}, {"num_classes": 3, "null_label": True}, {"in_channels": 1},
    {"channel_mults": (1, 2, 1), "blocks_per_level": 2}, {"channel_mults": (2,), "attention_resolutions": ()},
])  # fmt: skip
def test_a_structure_knows_the_number_of_its_networks_parameters(changes) -> None:
    with torch.device("meta"):
        model = _small(**changes)
    s = {"image_size": 16, "base_channels": 32, "channel_mults": (1, 2), "blocks_per_level": 1,
         "attention_resolutions": (8,), "attention_heads": 2}  # fmt: skip
    assert Structure(**{**s, **changes}).num_parameters == sum(p.numel() for p in model.parameters())


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
        {"block": "plain"},
        {"base_channels": 24, "channel_mults": (2, 4), "norm_groups": 16, "block": "plain"},  # not conv_in's 24
        {"base_channels": 24, "norm_groups": 12},
        {"downsample": "pool", "upsample": "transpose", "middle_attention": False},
        {"attention_in": "encoder", "time_embed_channels": 5, "num_classes": 3, "null_label": True},
    ],
)
def test_eps_has_the_shape_of_x_t(changes):
    model = _small(**changes)
    x_t = torch.randn(2, model.in_channels, 16, 16)
    labels = torch.tensor([0, 3]) if model.num_classes else None
    eps = model(x_t, torch.tensor([0, 999]), labels)
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


def test_a_plain_network_starts_at_zero_and_its_attention_at_the_identity():
    model = _small(**PLAIN)
    x_t, t = _inputs()
    assert torch.equal(model(x_t, t), torch.zeros_like(x_t))
    x = torch.randn(1, 64, 8, 8)
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    assert attentions and all(torch.equal(m(x), x) for m in attentions)


def test_checkpoints_of_before_there_were_options_fit():
    """Names, order and initial values of the default network's weights, as they were when it had no options."""
    with torch.device("meta"):
        names = UNet(image_size=32, num_classes=10).state_dict()
    listed = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in names.items())
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "239d03a78da8696d19968507227541c4e903ebb2f16a2b73e3f2560a8baa1932"
    )
    torch.manual_seed(0)
    model = UNet(image_size=8, base_channels=8, channel_mults=(1, 2), blocks_per_level=1, attention_resolutions=(4,))
    first, last = model.conv_in.weight, model.decoder[1].blocks[1].skip.weight  # the order of the draws is the same too
    totals = [float(weight.detach().double().abs().sum()) for weight in (first, last)]
    assert totals == pytest.approx([25.224191966233775, 29.685628056526184], rel=1e-6)


def test_plain_blocks_convolve_twice_with_t_between_and_no_way_around():
    torch.manual_seed(0)
    block, x, emb = PlainBlock(6, 8, 5, 0.0, 4), torch.randn(2, 6, 4, 4), torch.randn(2, 5)
    norm = torch.nn.functional.group_norm
    h = torch.nn.functional.silu(norm(block.conv_1(x), 4, eps=1e-6)) + block.embed(emb).view(2, 8, 1, 1)
    torch.testing.assert_close(block(x, emb), torch.nn.functional.silu(norm(block.conv_2(h), 4, eps=1e-6)))
    with torch.no_grad():
        block.conv_2.weight.zero_()
        block.conv_2.bias.zero_()
    assert torch.equal(block(x, emb), torch.zeros(2, 8, 4, 4))


def test_dropout_in_a_plain_block_comes_before_its_second_convolution():
    block = PlainBlock(4, 4, 2, 0.5, 2)
    seen = []
    block.conv_2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(torch.randn(1, 4, 8, 8), torch.randn(1, 2))
    assert 0.2 < (seen[0] == 0).float().mean() < 0.8  # 256 fair coins: beyond 9 sigma


@pytest.mark.parametrize("kind", ["conv", "transpose"])
def test_both_ways_up_double_the_size_and_keep_the_variance(kind):
    torch.manual_seed(0)
    way = upsample(kind, 64)
    reset_parameters(way)
    out = way(torch.randn(4, 64, 16, 16))
    assert out.shape == (4, 64, 32, 32)
    # 64 random rows of weights; the borders of a convolution see zeros
    assert 0.7 < float(out.detach().var()) < 1.3


def test_both_ways_down_halve_the_size_and_pooling_is_the_mean():
    x = torch.randn(2, 8, 4, 4)
    assert downsample("conv", 8)(x).shape == (2, 8, 2, 2)
    torch.testing.assert_close(downsample("pool", 8)(x), x.view(2, 8, 2, 2, 2, 2).mean((3, 5)))


@pytest.mark.parametrize(
    ("attention_in", "encoder", "decoder"),
    [("both", [0, 1], [2, 0]), ("encoder", [0, 1], [0, 0]), ("decoder", [0, 0], [2, 0])],
)
@pytest.mark.parametrize("middle", [True, False])
def test_attention_stands_where_it_is_asked_for(attention_in, encoder, decoder, middle):
    model = _small(attention_in=attention_in, middle_attention=middle)
    assert _num_attentions(model.encoder) == encoder
    assert _num_attentions(model.decoder) == decoder
    assert _num_attentions([model.bottleneck]) == [middle]


def test_the_groups_of_every_norm_can_be_chosen():
    norms = [m for m in _small(norm_groups=4).modules() if isinstance(m, nn.GroupNorm)]
    assert norms and {m.num_groups for m in norms} == {4}


def test_the_embedding_of_t_has_the_width_asked_for():
    widths = [
        (m.in_features, m.out_features) for m in _small(time_embed_channels=24).time_mlp if isinstance(m, nn.Linear)
    ]
    assert widths == [(32, 128), (128, 24)]
    assert _small(time_embed_channels=24, num_classes=3).class_embedding.weight.shape == (3, 24)


def test_no_label_has_an_embedding_of_its_own_where_labels_are_dropped():
    model = _trained(num_classes=3, null_label=True).eval()
    assert model.class_embedding.weight.shape == (4, 128)
    assert _small(num_classes=3).class_embedding.weight.shape == (3, 128)
    x_t, t = _inputs()
    without = model(x_t, t, torch.tensor([3, 3]))
    for label in range(3):
        assert (model(x_t, t, torch.tensor([label, label])) - without).abs().max() > 1e-3


def test_the_config_and_the_network_have_the_same_defaults():
    assert {k: getattr(Structure(image_size=32), k) for k in Model.model_fields} == Model().model_dump()


@pytest.mark.parametrize("options", [{}, {**PLAIN, "null_label": True}])
def test_gradients_reach_every_parameter(options):
    model = _trained(num_classes=4, **options)
    x_t, t = _inputs()
    model(x_t, t, torch.tensor([0, 3])).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_images_of_all_sizes_pass(image_size):
    model = _small(
        image_size=image_size, base_channels=8, channel_mults=(1, 1, 2), attention_resolutions=(image_size // 4,)
    )
    assert model(torch.randn(1, 3, image_size, image_size), torch.tensor([5])).shape == (1, 3, image_size, image_size)


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


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_every_block_is_given_t(options):
    model = _trained(**options).eval()
    x_t, t = _inputs()
    base = model(x_t, t)
    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock | PlainBlock):
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
    attention = Attention(32, heads)
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
    assert attentions and not any(m.fused for m in attentions)
    model.set_fused_attention(True)
    assert all(m.fused for m in attentions)
    assert all(m.fused for m in _small().modules() if isinstance(m, Attention))


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_channels_last_gives_the_same_prediction(options):
    model = _trained(**options).eval()
    x_t, t = _inputs()
    plain = model(x_t, t)
    model = model.to(memory_format=torch.channels_last)
    eps = model(x_t.to(memory_format=torch.channels_last), t)
    assert eps.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(eps, plain, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"fused_attention": True}, {"fused_attention": False}, PLAIN])
def test_autocast_predicts_and_trains(dtype, options):
    model = _trained(**options)
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


@pytest.mark.parametrize("move", [lambda model: model.to("cpu"), UNet.cpu, UNet.float])
def test_a_network_that_is_moved_or_cast_takes_torchs_kernels_until_others_are_chosen_there(move):
    """As one that was sampled on a GPU, whose kernels read no other memory."""
    model, (x_t, t) = _trained(), _inputs()
    expected = model(x_t, t)
    model.set_own_kernels(True)
    assert torch.equal(move(model)(x_t, t), expected)


@pytest.mark.parametrize(("num_classes", "options"), [(0, {}), (3, {}), (3, {**PLAIN, "null_label": True})])
def test_the_whole_network_is_one_compiled_graph(num_classes, options):
    model = _trained(num_classes=num_classes, **options).eval()
    x_t, t = _inputs()
    arguments = (x_t, t, torch.tensor([0, 2])) if num_classes else (x_t, t)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # fullgraph: a break is an error
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize("options", [{"num_classes": 3}, {**PLAIN, "num_classes": 3}])
def test_weights_cast_once_give_the_bits_of_weights_cast_at_each_evaluation(options):
    model, (x_t, t), labels = _trained(**options).eval(), _inputs(), torch.tensor([0, 2])
    with torch.no_grad(), autocast("bf16", torch.device("cpu")):
        expected = model(x_t, t, labels)
        cast_once(model, "bf16")
        assert model.conv_in.weight.dtype == torch.bfloat16 and model.norm_out.weight.dtype == torch.float32
        assert torch.equal(model(x_t, t, labels), expected)
    before = _trained().state_dict()
    other = _trained()
    cast_once(other, "fp32")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_dropout_of_places_is_part_of_the_compiled_graph_and_its_gradient():
    model = _trained(dropout=0.5)
    x_t, t = _inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in (3, 4):  # another step is no new program
        places = rng.places(rng.key(0, "dropout"), torch.arange(len(t)), step)
        gradients = []
        for network in (model, compiled):
            model.zero_grad()
            network(x_t, t, None, places).square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(gradients[0], gradients[1])
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x_t, t, None, rng.places(rng.key(0, "dropout"), torch.arange(len(t)), 5))


def test_each_layer_drops_elements_of_its_own_whatever_the_memory_layout():
    places = rng.places(rng.key(0, "dropout"), torch.arange(2), 7)
    x = torch.ones(2, 6, 4, 4)
    kept = [Dropout(0.5, layer)(x, places) for layer in (0, 1)]
    assert not torch.equal(kept[0], kept[1]) and set(kept[0].flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(Dropout(0.5, 0)(x.to(memory_format=torch.channels_last), places), kept[0])
    layers = [m.layer for m in _small(dropout=0.5).modules() if isinstance(m, Dropout)]
    assert layers == list(range(len(layers))) and len(layers) > 3


def test_dropout_acts_in_training_alone_and_without_places_follows_the_global_seed():
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
        ({"image_size": 18, "channel_mults": (1, 2, 2)}, "image_size = 18: 3 levels .* 4 must divide it"),
        ({"attention_resolutions": (16, 7)}, r"attention_resolutions = \[16, 7\]: .* 7x7; it has \[16, 8\]"),
        ({"attention_resolutions": (8, 8)}, r"attention_resolutions = \[8, 8\]: name each size once"),
        ({"attention_heads": 5}, r"attention_heads = 5: .* 64 channels .*\[1, 2, 4, 8, 16, 32, 64\]"),
        ({"attention_heads": 5, "attention_resolutions": ()}, "attention_heads = 5"),  # the bottleneck's
        ({"attention_heads": 64, "attention_resolutions": (16,)}, "attention_heads = 64: .* 32 channels"),
        ({"attention_heads": 64, "attention_resolutions": (16,), "middle_attention": False}, "attention_heads = 64"),
        ({"norm_groups": 3}, r"norm_groups = 3: does not divide the 32 channels .*\[1, 2, 4, 8, 16\]"),
        ({"norm_groups": 64, "channel_mults": (2, 4)}, "norm_groups = 64: .* 32 channels"),  # conv_in's
        ({"norm_groups": 64, "channel_mults": (2, 3), "block": "plain"}, "norm_groups = 64: .* 96 channels"),
        ({"norm_groups": 0}, "norm_groups = 0: must be at least 1"),
        ({"time_embed_channels": 0}, "time_embed_channels = 0"),
        ({"channel_mults": ()}, r"channel_mults = \[\]"),
        ({"channel_mults": (1, 0)}, r"channel_mults = \[1, 0\]"),
        ({"base_channels": 33}, "base_channels = 33: .* even"),
        ({"base_channels": 0}, "base_channels = 0: .* at least 1"),
        ({"blocks_per_level": 0}, "blocks_per_level = 0"),
        ({"attention_heads": 0}, "attention_heads = 0"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"image_size": 0}, "image_size = 0"),
        ({"dropout": 1.0}, r"dropout = 1.0: .*\[0, 1\)"),
        ({"num_classes": -1}, "num_classes = -1"),
        ({"null_label": True}, "null_label = True: needs num_classes"),
        ({"block": "fancy"}, "block = fancy: allowed are residual, plain"),
        ({"attention_in": "middle"}, "attention_in = middle: allowed are both, encoder, decoder"),
        ({"downsample": "max"}, "downsample = max: allowed are conv, pool"),
        ({"upsample": "bilinear"}, "upsample = bilinear: allowed are conv, transpose"),
    ],
)
def test_an_impossible_structure_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _small(**changes)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 3, 16, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x_t has shape .* \(3, 16, 16\)"):
        _small()(torch.zeros(shape), torch.zeros(2, dtype=torch.int64))
