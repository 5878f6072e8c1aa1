"""What `auto` becomes on this device, in one place: precision, layout, attention, compile, threads, determinism.

The choices follow measurements: on a CPU channels-last pays in fp32 (1.08x) and not in bf16, plain attention beats the
fused one, compiling does not pay; on a GPU the fused attention and channels-last do, and a step of kernels of our own
that is replayed beats a compiled one and loses little by being deterministic.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ddpm.config.schema import Config
from ddpm.errors import DoNotRetry, RequestError, shown
from ddpm.network import fused
from ddpm.network.build import build_model
from ddpm.run.log import counted

MALLOC_NEVER = {-4: 0, -1: -1}
"""M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's malloc.h, and the values with which it never gives memory back."""
WORK_TO_SHARE = 1 << 25
"""base_channels squared times pixels times images of a batch, to which arithmetic is proportional: from here on threads
pay. 8 times the quickstart's, a sixtieth of CIFAR-10's."""

Device = torch.device | str | None
"""None: a GPU if there is one, else the CPU."""


@dataclass(frozen=True)
class Resolved:
    """Kept in run.json by the first life; later lives compute the same way, or stop with the reason."""

    amp: str  # bf16 | fp16 | off
    compile: bool
    deterministic: bool
    threads: int
    dropout: str = "counted"
    """counted: masks are a function of the sample's place in the step; torch: of the rank's generator, as in old
    runs."""
    micro_batch: int | None = None
    """What train.micro_batch=auto was found to be."""
    kernels: str = "torch"
    """What computes the layers between convolutions, and the update: own: this project's kernels; torch: torch's, as in
    old runs."""

    @property
    def compiles(self) -> bool:
        """Whether something is compiled: the network, or kernels for it."""
        return self.compile or self.kernels == "own"

    def as_dict(self) -> dict[str, Any]:
        """`resolved` of run.json; keys that old runs lack are left out where they mean what those did."""
        return {k: v for k, v in asdict(self).items() if (k, v) not in (("micro_batch", None), ("kernels", "torch"))}


def resolve(config: Config, device: torch.device, threads: int, kept: dict[str, Any] | None = None) -> Resolved:
    """Turn every `auto` into what it means on this device, or into what an earlier life of this run found (`kept`).

    threads: CPU threads that this process may use. Raises DoNotRetry if this device cannot compute as the run began.
    """
    gpu = device.type == "cuda"
    train, kept = config.train, kept or {}
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = ("bf16" if bf16 else "fp16") if gpu else "off"
    compiled = train.compile is True  # which a later life may be the first to ask for
    own = not compiled and (kept.get("kernels") == "own" if kept else gpu and _own_kernels(config, device))
    free = own or not gpu  # on a GPU it costs 2 %
    resolved = Resolved(
        amp=kept.get("amp", amp) if train.amp == "auto" else train.amp,
        compile=_compiles(device, own, kept) if train.compile == "auto" else train.compile,
        kernels="own" if own else "torch",
        deterministic=kept.get("deterministic", free) if train.deterministic == "auto" else train.deterministic,
        threads=kept.get("threads", threads if gpu else threads_of(config, train.global_batch, threads)),
        dropout=kept.get("dropout", "torch") if kept else "counted",
        micro_batch=kept.get("micro_batch") if train.micro_batch == "auto" else None,
    )
    if resolved.amp == "fp16" and not gpu:
        raise DoNotRetry(
            "train.amp=fp16 needs a GPU, and this job has none: ask for one (--gpus-per-node 1), or start "
            "another run with train.amp=off"
        )
    return resolved


def threads_of(config: Config, batch: int, cpus: int) -> int:
    """The number of threads with which a CPU is fastest: one if there is so little work that threads mostly wait for
    each other, else `cpus`. One thread trains the quickstart's network at 500 images/s, two that sleep at barriers at
    240 and two that spin at 570; beside ten other processes at 83, 45 and 6."""
    work = config.model.base_channels**2 * config.data.image_size**2 * batch
    return cpus if work >= WORK_TO_SHARE else 1


@contextmanager
def with_fitting_threads(config: Config, batch: int, device: torch.device) -> Iterator[None]:
    """Within: on a CPU as many threads as pay (`threads_of`), and no more than there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of(config, batch, before) if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for what it computes next on the CPU.

    glibc returns a large block to the system at once, and takes the next one of that size from it page by page, which
    costs much of the time where batches are large. Elsewhere than with glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOC_NEVER.items():
            mallopt(parameter, value)


def _own_kernels(config: Config, device: torch.device) -> bool:
    with torch.device("meta"):
        return fused.serve(build_model(config, torch.device("meta"), "off"), device)


def _compiles(device: torch.device, own: bool, kept: dict[str, Any]) -> bool:
    """What train.compile=auto means; with a warning where a GPU should, and torch's compiler can build nothing for it,
    as without a C compiler or on a GPU too old for Triton."""
    wanted = device.type == "cuda" and not own
    if kept or not wanted:
        return bool(kept.get("compile", wanted))
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:  # from anything that torch.compile calls
        why = f"{type(e).__name__}: {e}".partition("\n")[0]
        warnings.warn(f"nothing can be compiled for {device}, so that layers are not: {why}", stacklevel=3)
        return False


def apply(resolved: Resolved) -> None:
    """Set torch's global switches for this process: threads, TF32, deterministic algorithms."""
    torch.set_num_threads(resolved.threads)
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not resolved.deterministic
    if resolved.compile:
        torch.use_deterministic_algorithms(resolved.deterministic)  # loads the compiler, to tell it
        _keep_apart(resolved.amp)
    else:
        torch.set_deterministic_debug_mode("error" if resolved.deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs, decides nothing


def _keep_apart(amp: str) -> None:
    """Have code compiled from here on kept by `amp` too. A torch of before May 2026 keeps it by whether autocast is on,
    not by its type: a network in fp16 was given the code of one in bf16, whose gradients do not overflow
    (https://github.com/pytorch/pytorch/pull/181564)."""
    import torch.compiler.config as compiler

    if hasattr(compiler, "cache_key_tag"):  # torch 2.6 has none
        compiler.cache_key_tag = f"ddpm {amp}"


def as_device(device: Device = None) -> torch.device:
    """The torch device that `device` names. Raises RequestError if this machine does not have it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        meant = torch.device(device)
    except (RuntimeError, TypeError):
        raise RequestError(f"device = {shown(device)}: use cpu, or cuda for a GPU") from None
    if meant.type == "cuda" and (meant.index or 0) >= (num := torch.cuda.device_count()):
        raise RequestError(f"device = {shown(str(meant))}: torch sees {counted(num, 'GPU')} here; use another, or cpu")
    return meant


def name_of(device: torch.device) -> str:
    """A GPU's product name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 | fp16: autocast on `device`; anything else: none."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


_recording = threading.Lock()
"""Held while a graph is recorded: torch records one of a process at a time."""


@contextmanager
def recorded(graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Within: work for the current GPU is recorded, while other threads (of NCCL, of a save, of another model) may use
    it. stream: of that GPU, on which it is recorded; None: torch's own, of the GPU that was the first to record."""
    here = torch.cuda.stream(torch.cuda.current_stream())  # torch stays on its own where a recording fails
    with _recording, here, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        yield


class Later:
    """A bool tensor on its way from the device to the host. bool() waits for its value alone; reading the tensor would
    also wait for all work queued after it."""

    def __init__(self, value: torch.Tensor) -> None:
        self._here, self._arrived = value, None
        if value.is_cuda:
            self._here = torch.empty_like(value, device="cpu", pin_memory=True)
            self._here.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)  # else this CPU spins, with NCCL and a save beside it
            self._arrived.record()

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._here)
