"""`python -m tools.gpu.targets`: what it builds the kernels for without having it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import PROJECT, requires
from tests.unit.diffusion.test_kernels import requires_triton_3_4, triton

TARGETS = ("sm_70", "sm_100", "gfx90a")


@pytest.mark.long
def test_every_kernel_is_built_for_old_and_new_gpus_of_both_makers_and_fits_their_shared_memory() -> None:
    requires(triton, "torch came without Triton", "install a torch wheel for Linux x86-64")
    requires_triton_3_4()
    command = [sys.executable, "-m", "tools.gpu.targets", *TARGETS, "--largest"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^(\w+), (bf16|fp16): (\d+) kernels, at most \d+ of \d+ bytes shared$", done.stdout, re.M)
    assert [name for name, *_ in told] == list(TARGETS)
    assert {precision for name, precision, _ in told if name in ("sm_70", "sm_75")} == {"fp16"}
    assert min(int(num) for *_, num in told) >= 19  # as many as there are kernels, and ways to divide a norm


@pytest.mark.long
def test_a_kernel_that_needs_more_than_a_gpu_has_is_named() -> None:
    requires(triton, "torch came without Triton", "install a torch wheel for Linux x86-64")
    requires_triton_3_4()
    code = """
from tools.gpu import targets
found = targets.launches
targets.launches = lambda *of: [it for it in found(*of) if it[0].__name__ == "_norm_kernel"]
targets.TARGETS["sm_80"] = 0
print(targets.main(["sm_80", "--largest"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert re.search(r"^  _norm_kernel: \d+ bytes shared, \d+ warps$", done.stdout, re.M), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1"
