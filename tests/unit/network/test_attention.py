"""ddpm/network/attention.py without a GPU: with Triton's interpreter it gives what torch's attention gives, and
compilers take its kernels. tests/gpu has the same on a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from ddpm.network import attention
from tests.conftest import requires
from tests.unit.diffusion.test_kernels import interpreted, requires_triton_3_4, triton


@pytest.fixture(autouse=True)
def _triton() -> None:
    requires(triton, "torch came without Triton", "install a torch wheel for Linux x86-64")


SETTING = """
    import contextlib
    import torch
    from torch.testing import assert_close
    from ddpm.network import attention, fused
    from ddpm.network.blocks import Attention

    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.manual_seed(0)

    def rows(*shape):
        return torch.randn(shape).to(memory_format=torch.channels_last)

    def found(attend, qkv, given, heads):
        qkv = qkv.detach().requires_grad_()
        y = attend(qkv, heads)
        return y, *torch.autograd.grad(y, qkv, given)

    shapes = [(side, side, heads) for side in (4, 7, 8, 16) for heads in (1, 4)]
"""


def test_output_and_gradient_are_those_of_torchs_attention() -> None:
    code = """
    for height, width, heads in [*shapes, (1, 1, 1), (3, 100, 2)]:
        qkv, given = 2 * rows(3, 3 * 32, height, width), rows(3, 32, height, width)
        ours = found(attention.Attention.apply, qkv, given, heads)
        theirs = found(attention._torchs, qkv.double(), given.double(), heads)
        for one, other in zip(ours, theirs, strict=True):
            assert one.is_contiguous(memory_format=torch.channels_last)
            off = float((one - other).norm() / other.norm())
            assert off <= 2e-6, (height, width, heads, off)
        print("equal")
    """
    assert interpreted(SETTING + code).split() == ["equal"] * 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits_it_is_as_near_to_the_exact_one_as_torchs(dtype: str) -> None:
    code = """
    from ddpm.network import softmax
    dtype = torch.DTYPE
    if dtype == torch.bfloat16:  # to which the interpreter cuts off instead of rounding
        forward, backward = softmax.softmax, softmax.softmax_backward
        softmax.softmax = lambda scores, scale, dtype: forward(scores, scale, torch.float32).to(dtype)
        softmax.softmax_backward = lambda p, dp, scale: backward(p.float(), dp, scale).to(p.dtype)
    for height, width, heads in shapes:
        qkv, given = (2 * rows(3, 3 * 64, height, width)).to(dtype), rows(3, 64, height, width).to(dtype)
        ours = found(attention.Attention.apply, qkv, given, heads)
        theirs = found(attention._torchs, qkv, given, heads)
        exact = found(attention._torchs, qkv.double(), given.double(), heads)
        for one, other, e in zip(ours, theirs, exact, strict=True):
            assert one.dtype == dtype
            here, there = (one - e).norm(), (other - e).norm()
            assert here <= 2 * there, (height, width, heads, here, there)
        print("near")
    """
    assert interpreted(SETTING + code.replace("DTYPE", dtype)).split() == ["near"] * 8


def test_scores_whose_exponentials_overflow_give_probabilities() -> None:
    code = """
    from ddpm.network import softmax
    scores = 1000 * torch.randn(2, 3, 7, 49)
    ours, theirs = softmax.softmax(scores, 0.5, torch.float32), torch.softmax(0.5 * scores, -1)
    assert_close(ours, theirs)
    given = torch.randn(2, 3, 7, 49)
    d = softmax.softmax_backward(theirs, given, 0.5)
    assert_close(d, 0.5 * torch._softmax_backward_data(given, theirs, -1, torch.float32))
    print("equal")
    """
    assert interpreted(SETTING + code) == "equal\n"


def test_the_layer_takes_it_in_training_alone_and_has_the_gradients_of_torchs_layer() -> None:
    requires(attention._WIDE, "torch multiplies no matrices of 16 bits into one of 32", "install torch 2.8 or later")
    code = """
    layer = Attention(64, heads=2).to(memory_format=torch.channels_last)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, given = rows(3, 64, 4, 4).requires_grad_(), rows(3, 64, 4, 4)
    of = [x, *layer.parameters()]
    theirs = [layer(x), *torch.autograd.grad(layer(x), of, given)]
    layer.own_kernels = True
    takes, apply = [], attention.Attention.apply
    attention.Attention.apply = lambda *of: takes.append(1) or apply(*of)
    ours = [layer(x), *torch.autograd.grad(layer(x), of, given)]
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
    assert len(takes) == 2
    with torch.no_grad():
        assert_close(layer(x), theirs[0], rtol=1e-3, atol=1e-4)
    assert len(takes) == 2
    attention.check(torch.device("cpu"), torch.bfloat16)
    print("equal")
    """
    assert interpreted(SETTING + code) == "equal\n"


@pytest.mark.parametrize(
    ("width", "side", "heads", "served"),
    [(256, 16, 1, True), (256, 8, 4, True), (256, 4, 4, True), (256, 16, 2, False), (128, 16, 1, False),
     (256, 32, 1, False), (256, 7, 1, False)],
)  # fmt: skip
def test_products_of_matrices_serve_where_probabilities_are_few(
    width: int, side: int, heads: int, served: bool
) -> None:
    requires(attention._WIDE, "torch multiplies no matrices of 16 bits into one of 32", "install torch 2.8 or later")
    assert attention.serves(torch.Size((9, 3 * width, side, side)), heads) is served


@pytest.mark.parametrize("columns", [16, 256])
def test_its_kernels_compile_for_a_gpu_read_whole_words_and_keep_all_in_registers(columns: int, tmp_path: Path) -> None:
    requires_triton_3_4()
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.compiler import ASTSource

    from ddpm.network import softmax

    cuobjdump = Path(compiler.__file__).parent / "bin" / "cuobjdump"

    kinds = {"p": "*bf16", "scores": "*fp32", "d_scores": "*bf16", "dp": "*fp32", "width": "i32"}
    for kernel in (softmax._softmax_kernel, softmax._softmax_backward_kernel):
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={n: {**kinds, "rows": "i32", "scale": "fp32"}.get(n, "constexpr") for n in names},
            constexprs={"C": columns, "R": softmax._TILE // columns},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n in kinds},
        )
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert "ld.global.v4.b32" in str(built.asm["ptx"]), kernel
        (tmp_path / "cubin").write_bytes(built.asm["cubin"])
        used = subprocess.run([cuobjdump, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True, check=True)
        assert re.findall(r"STACK:(\d+)", used.stdout + used.stderr) == ["0"], used
