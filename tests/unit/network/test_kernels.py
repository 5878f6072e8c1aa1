"""ddpm/network/kernels.py without a GPU: Triton's interpreter gives what torch's layers give, and compilers take
them. tests/gpu has the same on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm.config import reading
from ddpm.network.build import build_model
from tests.conftest import PROJECT, requires
from tests.unit.diffusion.test_kernels import interpreted, triton

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
    from ddpm.network import fused
    from ddpm.network.dropout import Dropout
    from ddpm.network.unet import UNet

    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.manual_seed(0)
    places = rng.places(rng.key(0, "dropout"), torch.arange(3), 7)

    def rows(*shape):
        return torch.randn(shape).to(memory_format=torch.channels_last)

    def gradients(y, of, given):
        return torch.autograd.grad(y, of, given)
"""


def test_norm_shift_silu_and_dropout_are_those_of_the_layers() -> None:
    code = """
    for channels, groups, height, width, all_of_it in [
        (32, 8, 4, 4, True),
        (32, 4, 16, 17, True),  # more than one tile of positions, and not whole ones
        (384, 32, 2, 3, False),  # groups of twelve
        (16, 4, 1, 1, False),
    ]:
        norm = nn.GroupNorm(groups, channels, eps=1e-6)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        x = (rows(3, channels, height, width) + 3).requires_grad_()
        shift = torch.randn(3, 2 * channels)[:, channels:].requires_grad_() if all_of_it else None  # rows apart
        dropout = Dropout(0.3, layer=3) if all_of_it else None
        of, given = [x, norm.weight, norm.bias] + [shift] * all_of_it, rows(3, channels, height, width)
        ours = fused.norm_act(x, norm, silu=channels != 16, shift=shift, dropout=dropout, places=places)
        h = norm(x if shift is None else x + shift[:, :, None, None])
        h = h if channels == 16 else F.silu(h)
        theirs = h if dropout is None else dropout(h, places)
        assert torch.equal(ours == 0, theirs == 0)
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for a, b in zip(gradients(ours, of, given), gradients(theirs, of, given), strict=True):
            assert_close(a, b, rtol=1e-4, atol=2e-5 * float(b.abs().max()))
        print("equal")
    """
    assert interpreted(SETTING + code).split() == ["equal"] * 4


def test_sums_copies_and_the_whole_network_are_those_of_the_layers() -> None:
    code = """
    a, b, bias = (rows(3, 24, 4, 6).requires_grad_() for _ in range(3))
    bias = torch.randn(24).requires_grad_()
    for ours, theirs, of in [
        (fused.add(a, b, bias), a + b + bias[:, None, None], [a, b, bias]),
        (fused.add(a, None, bias), a + bias[:, None, None], [a, bias]),
        (fused.concat(a, b), torch.cat([a, b], 1), [a, b]),
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
    for own in (False, True):
        model.set_own_kernels(own)
        y = model(x, t, None, places)
        found.append([y, *gradients(y.square().mean(), list(model.parameters()), None)])
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    print("equal")
    """
    assert interpreted(SETTING + code) == "equal\n"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_every_recipe_has_norms_that_the_kernels_serve(recipe: Path) -> None:
    from ddpm.network import kernels

    model = build_model(reading.load(recipe), torch.device("meta"), "bf16")
    for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
        kernels.Groups.of(norm.num_channels, norm.num_groups)


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (64, 64), (512, 1)])
def test_norms_of_odd_groups_are_left_to_torch(channels: int, groups: int) -> None:
    from ddpm.network import kernels

    with pytest.raises(ValueError, match=f"^{groups} groups of {channels // groups} channels$"):
        kernels.Groups.of(channels, groups)


def test_the_kernels_of_a_norm_compile_for_a_gpu_and_read_whole_words() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddpm.network import kernels

    wide, narrow, float_32 = "i32", "*bf16", "*fp32"
    tables = {n: narrow for n in ("y", "x", "dy", "dx", "shift")}
    tables |= {n: float_32 for n in ("weight", "bias", "means", "rstds", "sums")} | {"places": "*i64"}
    sizes = dict.fromkeys(("positions", "channels", "width", "in_shift"), wide)
    others = dict.fromkeys(("rows", "first_counter", "bound", "size"), wide) | {"scale": "fp32", "eps": "fp32"}
    kinds = {"C": 64, "P": 64, "SHIFT": True, "SILU": True, "DROP": True}
    for kernel in (kernels._norm_kernel, kernels._norm_backward_kernel):
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={n: {**tables, **sizes, **others}.get(n, "constexpr") for n in names},
            constexprs=kinds,
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n in {**tables, **sizes}},
        )
        ptx = str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"])
        assert "ld.global.v4.b32" in ptx, kernel
