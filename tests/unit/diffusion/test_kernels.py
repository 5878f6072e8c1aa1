"""ddpm/diffusion/kernels.py without a GPU: Triton's interpreter gives the bits of tensor_draws.py, and what is compiled
for a GPU fuses no multiplication with an addition."""

from __future__ import annotations

import os
import re
import sys
import textwrap

import pytest

from tests import forked
from tests.conftest import PROJECT, requires

try:
    import triton
except ImportError:
    triton = None


@pytest.fixture(autouse=True)
def _triton() -> None:
    requires(triton, "torch came without Triton", "install a torch wheel for Linux x86-64")


def requires_triton_3_4() -> None:
    """Before it, no constant may be a tuple, the interpreter knows less, and what is compiled is described otherwise:
    such a GPU takes torch's operations, with a warning."""
    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    requires(version >= (3, 4), f"Triton {triton.__version__} is older than 3.4", "install torch 2.8 or later")


def interpreted(code: str) -> str:
    """What the code prints where Triton interprets its kernels."""
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    done = forked.run(argv, PROJECT, {**os.environ, "TRITON_INTERPRET": "1"}, timeout=300, kernels=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SETTING = """
    import torch
    from ddpm.diffusion import kernels, rng
    from ddpm.diffusion.philox import words

    index = torch.tensor([0, 1, 127, 128, 49_999, (1 << 33) + 1, (1 << 48) - 1])
    keys = [rng.key(0, "test"), rng.key(5, "test"), rng.Key(0x80000000, 0xFFFFFFFF)]
    steps = [0, 16, 799_999, (1 << 31) + 1, (1 << 48) - 1]
"""


@pytest.mark.long
def test_normals_have_the_bits_of_the_tensor_operations() -> None:
    code = (
        SETTING
        + """
    for shape in [(3, 16, 16), (3, 5, 7), (1,), (2, 1025)]:
        for key, step in zip(keys, steps):
            theirs = rng.normal(key, index, step, shape).flatten(1)
            ours = torch.empty_like(theirs)
            kernels.normal(ours, index, key, step)
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), (shape, step)
            kernels.normal(ours, index, key, torch.tensor(step))
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), (shape, step)
            assert torch.equal(rng.normal(key, index, torch.tensor(step), shape).flatten(1), theirs)
            print("equal")
    """
    )
    assert interpreted(code).count("equal") == 12


@pytest.mark.long
def test_masks_and_first_words_are_those_of_the_tensor_operations() -> None:
    code = (
        SETTING
        + """
    for key, step in zip(keys * 2, steps):
        first = torch.empty_like(index)
        kernels.first_word(first, index, key, step)
        assert torch.equal(first, words(key, index, step)[0]), step
        kernels.first_word(first, index, key, torch.tensor(step))
        assert torch.equal(first, words(key, index, torch.tensor(step))[0]), step
        places = rng.places(key, index, step)
        for layer, num, probability in [(0, 2051, 0.1), (255, 8, 0.5), (7, 4, 0.999), (3, 100, 0.0)]:
            theirs = rng.keep_mask(places, layer, num, probability)
            ours = torch.empty_like(theirs)
            kernels.keep_mask(ours, places, layer << 24, round(probability * 65536) - 32768)
            assert torch.equal(ours, theirs), (step, layer)
            print("equal")
    """
    )
    assert interpreted(code).count("equal") == 20


def compiled(fuse: bool) -> str:
    """The normals' kernel as PTX for an H100, whichever machine this is."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddpm.diffusion import kernels

    scalars = dict.fromkeys(["num_elements", *kernels._SCALARS], "i32")
    constants = {**kernels.TERMS, "AT": False, "BLOCK": 256}
    types = {"out": "*fp32", "index": "*i64", **scalars, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernels._normal_kernel, signature=types, constexprs=constants)
    options = kernels.FUSE if not fuse else {"enable_fp_fusion": True}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def test_the_compiled_normals_fuse_nothing_and_round_divisions_and_roots_correctly() -> None:
    requires_triton_3_4()

    def operations(ptx: str) -> set[str]:
        found = re.findall(r"\b(?:fma|div|sqrt|rcp|rsqrt)\S*", ptx)
        return {name.replace(".ftz", "") for name in found}  # Triton 3.4 and 3.5 flush denormals; here are none

    assert operations(compiled(fuse=False)) == {"div.rn.f32", "sqrt.rn.f32"}
    assert any(op.startswith("fma") for op in operations(compiled(fuse=True)))  # else this would notice nothing
