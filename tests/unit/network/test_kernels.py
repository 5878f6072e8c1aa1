"""ddpm/network/kernels.py and norm_kernels.py without a GPU: Triton's interpreter gives what torch's layers give, and
compilers take them. tests/gpu has the same on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm.config import reading
from ddpm.network.build import build_model
from tests.conftest import PROJECT, requires
from tests.unit.diffusion.test_kernels import interpreted, requires_triton_3_4, triton

CONFIGS = PROJECT / "configs"


@pytest.fixture(autouse=True)
def _triton() -> None:
    requires(triton, "torch came without Triton", "install a torch wheel for Linux x86-64")


SETTING = """
    import contextlib
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.testing import assert_close
    from ddpm.diffusion import rng
    from ddpm.network import fused, prepared
    from ddpm.network.prepared import Prepared
    from ddpm.network.dropout import Dropout
    from ddpm.network.unet import UNet

    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.manual_seed(0)
    places = rng.places(rng.key(0, "dropout"), torch.arange(3), 7)

    def rows(*shape):
        return torch.randn(shape).to(memory_format=torch.channels_last)

    def gradients(y, of, given):
        return torch.autograd.grad(y, of, given, retain_graph=True)
"""


@pytest.mark.long
def test_norm_shift_silu_and_dropout_are_those_of_the_layers() -> None:
    code = """
    for channels, groups, height, width, all_of_it in [
        (32, 8, 4, 4, True),
        (32, 4, 16, 17, True),  # not a whole tile
        (32, 8, 36, 40, True),  # more than one tile, and not whole ones
        (384, 32, 2, 3, False),  # groups of twelve
        (16, 4, 1, 1, False),
    ]:
        norm = nn.GroupNorm(groups, channels, eps=1e-6)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        x = (rows(3, channels, height, width) + 3).requires_grad_()
        shift = torch.randn(3, 2 * channels)[:, channels:].requires_grad_() if all_of_it else None  # rows apart
        dropout = Dropout(0.3, layer=3) if all_of_it else None
        of, given = [x, norm.weight, norm.bias] + [shift] * all_of_it, rows(3, channels, height, width)
        ours, again = fused.norm_act(x, norm, silu=channels != 16, shift=shift, dropout=dropout, places=places)
        assert torch.equal(again, x)
        h = norm(x if shift is None else x + shift[:, :, None, None])
        h = h if channels == 16 else F.silu(h)
        theirs = h if dropout is None else dropout(h, places)
        assert torch.equal(ours == 0, theirs == 0)
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        more = rows(3, channels, height, width)
        for one, other in [([ours], [theirs]), ([ours, again], [theirs, x])]:  # x used again, or not
            both = zip(gradients(one, of, [given, more][:len(one)]), gradients(other, of, [given, more][:len(one)]))
            for a, b in both:
                assert_close(a, b, rtol=1e-4, atol=2e-5 * float(b.abs().max()))
        print("equal")
    """
    assert interpreted(SETTING + code).split() == ["equal"] * 5


def test_without_places_masks_come_from_torchs_generator_as_those_of_the_layer_do() -> None:
    """As where somebody trains on with a network that was sampled."""
    code = """
    norm, dropout, x = nn.GroupNorm(4, 32), Dropout(0.3), rows(3, 32, 4, 4)
    found = []
    for layer in (lambda: fused.norm_act(x, norm, silu=True, dropout=dropout)[0], lambda: dropout(F.silu(norm(x)))):
        for mode in (dropout.train, dropout.eval):
            mode(), torch.manual_seed(1)
            found.append(layer())
    for ours, theirs in zip(found[:2], found[2:]):
        assert torch.equal(ours == 0, theirs == 0)
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    print([bool((y == 0).any()) for y in found])
    """
    assert interpreted(SETTING + code) == "[True, False, True, False]\n"


def test_a_layer_that_has_more_elements_than_masks_are_counted_for_is_refused_as_by_the_layers() -> None:
    """Its masks would be those of the next layer again."""
    code = """
    from ddpm.network import norm_kernels
    norm_kernels.norm = lambda x, *others: (x, x, x)
    norm, dropout, x = nn.GroupNorm(1, 8), Dropout(0.3, layer=3), torch.empty(1).expand(1, 8, 4096, 4096)
    fused._rows = lambda x: x
    for height in (4096, 4097):
        try:
            fused.norm_act(x[:, :, :1].expand(1, 8, height, 4096), norm, silu=True, dropout=dropout, places=places)
            print("drawn")
        except ValueError as e:
            print(e)
    """
    refused = f"layer is 3 and num is {8 * 4097 * 4096}; at most 255 and 2**27 are allowed"
    assert interpreted(SETTING + code) == f"drawn\n{refused}\n"


@pytest.mark.long
def test_sums_copies_and_the_whole_network_are_those_of_the_layers() -> None:
    requires_triton_3_4()
    code = """
    a, b = (rows(3, 24, 4, 6).requires_grad_() for _ in range(2))
    c = rows(3, 72, 4, 6).requires_grad_()
    bias, bias_2 = torch.randn(2, 24).requires_grad_().unbind()
    for ours, theirs, of in [
        (fused.add(a, b, bias, bias_2), a + b + (bias + bias_2)[:, None, None], [a, b, bias, bias_2]),
        (fused.add(a, b, bias), a + b + bias[:, None, None], [a, b, bias]),
        (fused.add(a, None, bias), a + bias[:, None, None], [a, bias]),
        (fused.concat(a, c), torch.cat([a, c], 1), [a, c]),
        (fused.double(a), F.interpolate(a, scale_factor=2.0), [a]),
    ]:
        given = rows(*ours.shape)
        assert_close(ours, theirs)
        for one, other in zip(gradients(ours, of, given), gradients(theirs, of, given), strict=True):
            assert_close(one, other)
    weight = (0.2 * torch.randn(40, 24, 1, 1)).requires_grad_()
    wide = torch.randn(40).requires_grad_()
    ours, theirs, given = fused.pointwise(a, weight, wide), F.conv2d(a, weight, wide), rows(3, 40, 4, 6)
    assert_close(ours, theirs)
    for one, other in zip(*(gradients(y, [a, weight, wide], given) for y in (ours, theirs)), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    fused.check(torch.device("cpu"), torch.float16)
    shape = {"base_channels": 16, "channel_mults": (1, 2), "blocks_per_level": 1, "attention_resolutions": (4,)}
    model = UNet(image_size=8, dropout=0.2, **shape).to(memory_format=torch.channels_last)
    for p in model.parameters():
        p.data = p.data if p.any() else 0.05 * torch.randn_like(p)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([1, 5, 9])
    found = []
    for own, with_prepared in [(False, False), (True, False), (True, True)]:
        model.set_own_kernels(own)
        y = (Prepared(model, "off") if with_prepared else model)(x, t, None, places)
        found.append([y, *gradients(y.square().mean(), list(model.parameters()), None)])
    theirs, *ours = found
    for one in ours:
        for a, b in zip(one, theirs, strict=True):
            assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    names = prepared.by_sample(model)
    assert {"conv_in.bias", "norm_out.weight", "encoder.0.resample.bias", "decoder.0.resample.1.bias"} <= set(names)
    assert "conv_out.bias" not in names and len(names) == len(set(names))
    print("equal")
    """
    assert interpreted(SETTING + code) == "equal\n"


def test_many_rows_of_pictures_are_within_what_a_gpu_can_launch() -> None:
    """65,535 programs along the second and third dimension of a grid: 2048 pictures of CIFAR-10 have more rows."""
    code = """
    from ddpm.network import kernels
    grids = []
    class Noted:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *given, **options: None
    kernels._double_kernel = kernels._halve_kernel = Noted()
    small = torch.empty(2048, 1, 16, 16).to(memory_format=torch.channels_last)
    large = kernels.double(small)
    assert large.shape == (2048, 1, 32, 32) and kernels.halve(large).shape == small.shape
    assert [x * y * z for x, y, z in grids] == [2048 * 32, 2048 * 16]
    assert all(y <= 65_535 and z <= 65_535 for _, y, z in grids), grids
    print("within")
    """
    assert interpreted(SETTING + code) == "within\n"


def test_more_samples_than_a_grid_has_programs_for_are_computed_in_parts_of_the_same_bits() -> None:
    """The second axis of a grid ends at 65,535; here at 2."""
    code = """
    from ddpm.diffusion import kernels as draws
    from ddpm.network import kernels, norm_kernels
    from ddpm.network.norm_kernels import Masks

    def found():
        torch.manual_seed(1)
        places = rng.places(rng.key(0, "dropout"), torch.arange(5), 7)
        x, dy, more = (rows(5, 32, 2, 2) for _ in range(3))
        shift, weight, bias, masks = torch.randn(5, 64)[:, 32:], *torch.randn(2, 32), Masks(places, 3, 9000, 1.4)
        for moved, drop in [(shift, masks), (None, None)]:
            y, means, rstds = norm_kernels.norm(x, moved, weight, bias, 8, 1e-6, True, drop)
            yield from (y, means, rstds)
            back = norm_kernels.norm_backward(dy, more, x, moved, weight, bias, means, rstds, 8, True, drop)
            yield from back if moved is not None else back[:3]
        yield kernels.sum_positions(x)
        normal, mask = torch.empty(5, 9), torch.empty(5, 40, dtype=torch.bool)
        draws.normal(normal, torch.arange(5), rng.key(0, "x"), 3)
        draws.keep_mask(mask, places, 3, 9000)
        yield from (normal, mask)

    def noted(kernel):
        class Noted:
            def __getitem__(self, grid):
                grids.append(grid)
                return kernel[grid]
        return Noted()

    grids = []
    for of, names in [(norm_kernels, ["_norm_kernel", "_norm_backward_kernel"]), (kernels, ["_sum_positions_kernel"]),
                      (draws, ["_normal_kernel", "_mask_kernel"])]:
        for name in names:
            setattr(of, name, noted(getattr(of, name)))
    whole = list(found())
    assert len(grids) == 7 and {grid[1] for grid in grids} == {5} and draws._MOST == 65_535, grids
    grids.clear()
    draws._MOST = 2
    for a, b in zip(whole, found(), strict=True):
        assert torch.equal(a, b)
    assert len(grids) == 21 and {grid[1] for grid in grids} == {2, 1}, grids
    print("equal")
    """
    assert interpreted(SETTING + code) == "equal\n"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_every_recipe_has_norms_that_the_kernels_serve(recipe: Path) -> None:
    from ddpm.network.norm_kernels import Division

    model = build_model(reading.load(recipe), torch.device("meta"), "bf16")
    for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
        Division.of(norm.num_channels, 64, norm.num_groups)


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (64, 64), (512, 1)])
def test_norms_of_odd_groups_are_left_to_torch(channels: int, groups: int) -> None:
    from ddpm.network.norm_kernels import Division

    with pytest.raises(ValueError, match=f"^{groups} groups of {channels // groups} channels$"):
        Division.of(channels, 64, groups)


@pytest.mark.parametrize(("channels", "positions", "whole"), [
    (128, 1024, True), (256, 256, True), (512, 64, True), (384, 1024, False), (128, 4096, False),
])  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_the_kernels_of_a_norm_compile_for_a_gpu_keep_their_tiles_in_registers_and_read_whole_words(
    channels: int, positions: int, whole: bool, backward: bool
) -> None:
    requires_triton_3_4()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddpm.network import norm_kernels

    by = norm_kernels.Division.of(channels, positions, 32)
    assert by.whole == whole
    wide, narrow, float_32 = "i32", "*bf16", "*fp32"
    tables = {n: narrow for n in ("y", "x", "dy", "dx", "more", "shift", "of_shift")}
    tables |= {n: float_32 for n in ("weight", "bias", "means", "rstds", "of_weight", "of_bias")} | {"places": "*i64"}
    sizes = dict.fromkeys(("positions", "channels", "in_shift"), wide)
    others = dict.fromkeys(("rows", "first_counter", "bound", "size", "words"), wide) | {"scale": "fp32", "eps": "fp32"}
    kinds = {"C": by.C, "P": by.P, "WHOLE": by.whole, "SHIFT": True, "SILU": True, "DROP": True}
    kernel = norm_kernels._norm_backward_kernel if backward else norm_kernels._norm_kernel
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: {**tables, **sizes, **others}.get(n, "constexpr") for n in names},
        constexprs=kinds | ({"MORE": True} if backward else {}),
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n in {**tables, **sizes}},
    )
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": by.num_warps})
    assert "ld.global.v4.b32" in str(found.asm["ptx"]), kernel
    assert "st.local" not in str(found.asm["ptx"]), kernel
