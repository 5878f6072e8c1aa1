"""ddpm/network/device.py: what `auto` becomes, and this process's switches."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.network import attention, device, fused
from tests.conftest import PROJECT, requires
from tests.training import make_config

CODE = """
import sys
import torch
from torch._functorch._aot_autograd import autograd_cache
from ddpm.network.device import Resolved, apply, autocast

of = autograd_cache.AOTAutogradCacheDetails
made = of.__init__

def as_in_2025(self, *arguments, **options):
    made(self, *arguments, **options)
    self.autocast_state = {}

of.__init__ = as_in_2025
cpu, layer, x = torch.device("cpu"), torch.nn.Linear(4, 4), torch.randn(2, 4)
for amp in ("bf16", "fp16"):
    apply(Resolved(amp, compile=True, deterministic=True, threads=1))
    torch.compiler.reset()
    with autocast(amp, cpu):
        y = torch.compile(layer)(x)
    (y.float() * 2.0**60).sum().backward()  # the code is kept once its gradient is compiled too
    print(y.dtype)
"""


@pytest.mark.long
def test_a_network_compiled_in_fp16_is_not_given_code_that_torch_has_kept_of_one_in_bf16(tmp_path: Path) -> None:
    requires(shutil.which("g++"), "no g++, by which torch compiles for a CPU", "install g++")
    done = subprocess.run([sys.executable, "-c", CODE], cwd=PROJECT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})  # fmt: skip
    assert done.stdout.split() == ["torch.bfloat16", "torch.float16"], done.stderr[-2000:]


@pytest.mark.parametrize("own", [False, True])
def test_determinism_is_asked_of_a_gpu_where_own_kernels_make_it_cheap_and_of_no_run_that_began_without(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_own_kernels", lambda *_: own)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "compile", lambda work: lambda x: x)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    gpu, config = torch.device("cuda"), make_config()
    found = device.resolve(config, gpu, 2)
    assert (found.deterministic, found.compile, found.kernels) == (own, not own, "own" if own else "torch")
    kept = {**found.as_dict(), "deterministic": False}
    assert device.resolve(config, gpu, 2, kept).deterministic is False
    asked = make_config(train__deterministic=not own)
    assert device.resolve(asked, gpu, 2).deterministic is not own
    assert device.resolve(config, torch.device("cpu"), 2).deterministic


def test_where_nothing_can_be_compiled_for_a_gpu_auto_leaves_it_with_a_warning_and_a_run_that_was_compiled_stays_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(work: object) -> object:
        raise RuntimeError("Failed to find C compiler\nplease")

    monkeypatch.setattr(device, "_own_kernels", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "compile", fails)
    gpu = torch.device("cuda")
    with pytest.warns(
        UserWarning, match="nothing can be compiled for cuda.*: RuntimeError: Failed to find C compiler$"
    ):
        assert device.resolve(make_config(), gpu, 1).compile is False
    for asked, before in ((True, False), ("auto", True)):
        kept = {"amp": "bf16", "compile": before, "kernels": "torch"}
        assert device.resolve(make_config(train__compile=asked), gpu, 1, kept).compile is True


def test_a_run_of_own_kernels_whose_compiling_is_asked_for_later_is_compiled_with_those_of_torch() -> None:
    kept = {"amp": "bf16", "compile": False, "deterministic": True, "dropout": "counted", "kernels": "own"}
    for asked, kernels in ((False, "own"), (True, "torch")):
        found = device.resolve(make_config(train__compile=asked), torch.device("cpu"), 1, kept)
        assert found.compile is asked and found.kernels == kernels


class Played:
    """torch.cuda's streams and recordings as torch has them: a stream is current in a thread; one recording at a time;
    one that fails leaves its stream the current one; what takes memory while one is "global" fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here, self.modes = threading.local(), list[str]()
        for name in ("current_stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self) -> str:
        return getattr(self.here, "stream", "the thread's")

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.here.stream = before

    @contextlib.contextmanager
    def graph(self, graph: str, pool: Any, stream: str | None, capture_error_mode: str = "global") -> Iterator[None]:
        before, self.here.stream = self.current_stream(), stream or "torch's"
        if self.modes:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.modes.append(capture_error_mode)
        try:
            yield
        finally:
            self.modes.pop()
        self.here.stream = before

    def take_memory(self) -> None:
        if "global" in self.modes:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recording_that_fails_leaves_the_threads_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    with pytest.raises(RuntimeError), device.recorded("graph"):  # type: ignore[arg-type]
        assert played.current_stream() == "torch's"
        raise RuntimeError("may not be recorded")
    assert played.current_stream() == "the thread's"


def test_while_one_thread_records_another_may_take_memory_and_waits_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    played, records, tries = Played(monkeypatch), threading.Event(), threading.Event()
    told: list[str] = []

    def other() -> None:
        records.wait(10)
        try:
            played.take_memory()
            tries.set()
            with device.recorded("its"):  # type: ignore[arg-type]
                told.append("recorded")
        except RuntimeError as e:
            told.append(str(e))
            tries.set()

    thread = threading.Thread(target=other)
    thread.start()
    with device.recorded("ours"):  # type: ignore[arg-type]
        records.set()
        assert tries.wait(10)
        thread.join(0.2)
    thread.join(10)
    assert told == ["recorded"]


@pytest.mark.parametrize(("gpu", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_kernels_are_tried_in_what_their_gpu_has_whichever_is_current(
    monkeypatch: pytest.MonkeyPatch, gpu: int, dtype: torch.dtype
) -> None:
    """As where a display's GPU comes first."""
    current, tried = [0], list[Any]()

    @contextlib.contextmanager
    def made_current(which: torch.device) -> Iterator[None]:
        before, current[0] = current[0], which.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[0] == 1)
    for of in (fused, attention):
        monkeypatch.setattr(of, "check", lambda *given: tried.append(given))
    on = torch.device("cuda", gpu)
    assert fused.work_on.__wrapped__(on) and tried == [(on, dtype)] * 2 and current == [0]
