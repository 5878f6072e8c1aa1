"""What a piece of work starts: operations as torch dispatches them, those that make a host wait for a GPU, and on a GPU
the kernels of a step. Views and allocations start nothing, and are not counted.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.diffusion import rng
from ddpm.training.trainer import Trainer
from ddpm.training.update import Update

SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
REST = "rest"
LAUNCH = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")


class Operations(TorchDispatchMode):
    """Within: operations and would-be waits are counted, by the part that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.started: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.part = REST
        self._since = time.perf_counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        is_view = bool(aliases) and not any(a.is_write for a in aliases)
        room, _, name = func._schema.name.partition("::")
        if not is_view and name not in NOTHING and room != "profiler":
            self.started[self.part] += 1
            self.waits[self.part] += name in SYNCS
        return func(*args, **(kwargs or {}))

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        outer = self._turn_to(part)
        try:
            with torch.profiler.record_function(f"part:{part}"):
                yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, part: str) -> str:
        now, outer = time.perf_counter(), self.part
        self.seconds[outer] += now - self._since
        self.part, self._since = part, now
        return outer


def operations(work: Callable[[], Any]) -> int:
    with Operations() as counted:
        work()
    return counted.started.total()


@contextmanager
def parts_of(trainer: Trainer, counted: Operations) -> Iterator[None]:
    """Within: what a step of the trainer does is put down to its parts."""
    step, state = trainer.step, trainer.state
    places = [
        ("data", step, "_parts"),
        ("data", step.batches, "images"),
        ("forward", step, "network"),
        ("backward", torch.Tensor, "backward"),
        ("clip", torch.nn.utils, "clip_grad_norm_"),
        ("optimizer", state.optimizer, "step"),
        ("average", state.ema, "update"),
        ("update", Update, "__call__"),
        *(("randomness", rng, draw) for draw in ("normal", "uniform_int", "places")),
    ]
    with contextlib.ExitStack() as stack:
        for part, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, _told(counted, part, getattr(owner, name))))
        yield


def _told(counted: Operations, part: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        with counted.within(part):
            return real(*args, **kwargs)

    return told


def launched(profile: Any, names: tuple[str, ...] = LAUNCH) -> Counter[str]:
    """Launches in a profile by the part in whose time they were made, on whichever thread."""
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU]
    parts = [e for e in events if e.name.startswith("part:")]
    found: Counter[str] = Counter()
    for launch in (e for e in events if e.name.startswith(names)):
        at = launch.time_range.start
        inside = [p for p in parts if p.time_range.start <= at <= p.time_range.end]
        innermost = min(inside, key=lambda p: p.time_range.elapsed_us(), default=None)
        found[innermost.name.removeprefix("part:") if innermost else REST] += 1
    return found


def profiled(device: torch.device) -> Any:
    kinds = torch.profiler.ProfilerActivity
    gpu = [kinds.CUDA] if device.type == "cuda" else []
    return torch.profiler.profile(activities=[kinds.CPU, *gpu], record_shapes=True)


def launches(prof: Any, steps: int) -> dict[str, Any]:
    """Per step: kernels, their time, operators, host waits; and the kernels and operators that take most."""
    averages = prof.key_averages()
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    runtime_calls = {e.key: e.count / steps for e in averages if e.key.startswith(("cuda", "cu")) and "_" not in e.key}
    top = sorted(kernels, key=lambda e: -e.self_device_time_total)[:25]
    return {
        "kernels_per_step": sum(e.count for e in kernels) / steps,
        "kernel_ms_per_step": sum(e.self_device_time_total for e in kernels) / steps / 1e3,
        "aten_ops_per_step": sum(e.count for e in averages if e.key.startswith("aten::")) / steps,
        "runtime_calls_per_step": runtime_calls,
        "top_kernels": [
            {"name": e.key[:100], "calls": e.count / steps, "ms": e.self_device_time_total / steps / 1e3} for e in top
        ],
        "top_host_ms": [
            {"name": e.key[:60], "calls": e.count / steps, "ms": e.self_cpu_time_total / steps / 1e3}
            for e in sorted(averages, key=lambda e: -e.self_cpu_time_total)[:20]
        ],
        "top_operators": [
            {
                "name": e.key,
                "shapes": str(e.input_shapes)[:90],
                "calls": e.count / steps,
                "ms": e.self_device_time_total / steps / 1e3,
            }
            for e in sorted(prof.key_averages(group_by_input_shape=True), key=lambda e: -e.self_device_time_total)
            if e.key.startswith("aten::")
        ][:60],
    }
