"""The device of a process, and whether torch can use the GPUs that the job was given. Loads torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from ddpm.errors import DoNotRetry, NodeUnfit
from ddpm.network.device import as_device, keep_freed_memory, name_of
from ddpm.run.log import say
from ddpm.training.ranks import World
from launch.cluster import environment
from launch.cluster.environment import JobEnvironment

DRIVERS = {"NVIDIA": Path("/proc/driver/nvidia/gpus"), "AMD": Path("/sys/bus/pci/drivers/amdgpu")}
"""Where the maker's driver shows a node's GPUs, by their addresses."""
ADDRESS = "*:*:*.*"
MIG = "MIG"
"""A word in the name of a slice of an NVIDIA GPU."""


def one_device(env: JobEnvironment) -> torch.device:
    """The device of this process: its own GPU if several ranks share a node, else the first one or the CPU, for which
    the process then keeps its memory. Raises NodeUnfit."""
    device = as_device()
    if device.type == "cuda" and env.local_rank:
        device = torch.device("cuda", env.local_rank % torch.cuda.device_count())
    check(env, device)
    if device.index is not None:
        torch.cuda.set_device(device)  # what names none is meant for it
    if device.type == "cpu":
        keep_freed_memory()
    return device


def check(env: JobEnvironment, device: torch.device, drivers: Mapping[str, Path] = DRIVERS) -> None:
    """Raise NodeUnfit if torch cannot compute on the GPU, or if it sees none, though SLURM gave this job GPUs and the
    node has them."""
    if device.type == "cuda":
        if why := _fault(device):
            raise NodeUnfit(f"torch {torch.__version__} cannot compute on the GPU of {env.host}, {why}")
        return
    makers = [maker for maker, where in drivers.items() if any(where.glob(ADDRESS))]
    if not environment.gpus_given() or not makers:
        return
    cuda, hip = torch.version.cuda, torch.version.hip
    why = f"torch {torch.__version__} is its CPU build: delete .venv and run tools/env.sh, or install the other"
    if cuda or hip:
        built = f"CUDA {cuda}" if cuda else f"ROCm {hip}"
        why = f"torch {torch.__version__} was built with {built}: is the driver as new, nvidia-smi well?"
        if ("NVIDIA" if cuda else "AMD") not in makers:
            why = (
                f"torch {torch.__version__} was built with {built}, and they are {makers[0]}'s: install its other build"
            )
    raise NodeUnfit(f"{env.host} has GPUs for this job, but torch cannot use them. {why}")


def _fault(device: torch.device) -> str:
    """Why this GPU computes nothing: another process has it for itself, or torch has no code for it; "" if it does."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as e:
        why = str(e).splitlines()[0]
        with contextlib.suppress(RuntimeError):  # it may not even say its name
            why = f"a {torch.cuda.get_device_name(device)}: {why}"
        if "no kernel image" in why:
            kinds = " ".join(torch.cuda.get_arch_list())
            major, minor = torch.cuda.get_device_capability(device)
            why += f" (it is sm_{major}{minor}, and this torch for {kinds}): README, Installing, names torch for others"
        return why
    return ""


def check_apart(world: World, host: str) -> None:
    """Called on all ranks. Raise DoNotRetry if two of them would have one GPU, which NCCL refuses; NodeUnfit if some
    have a GPU and others none: they would wait for each other. Say so if they compute by different things."""
    if world.world_size == 1:
        return
    gpu = _identity(world.device) if world.device.type == "cuda" else ""
    answers = world.all_of((host, gpu, kind(world.device)))
    told = [(host, gpu) for host, gpu, _ in answers]
    gpus = [gpu for _, gpu in told]
    if any(gpus) and (without := [rank for rank, gpu in enumerate(gpus) if not gpu]):
        hosts = ", ".join(sorted({told[rank][0] for rank in without}))
        raise NodeUnfit(f"torch sees no GPU on rank {without[0]} ({hosts}), and others have one: is the driver well?")
    for rank, (host, gpu) in enumerate(told):
        if gpu and (other := told.index((host, gpu))) < rank:
            raise DoNotRetry(
                f"ranks {other} and {rank} would both compute on one GPU of {host}: "
                + (
                    f"it is divided ({MIG}), and NCCL joins no slices of one GPU: ask for one slice "
                    f"(--gpus-per-node 1), or for whole GPUs"
                    if gpu.startswith(MIG)
                    else "a job needs a GPU for each task of a node, as --gpus-per-node 4 gives; by hand "
                    "--ntasks-per-node 4 beside it"
                )
            )

    kinds: dict[str, str] = {}
    for rank, (host, _, found) in enumerate(answers):
        kinds.setdefault(", ".join(found.values()), f"rank {rank} on {host}")
    if world.is_main and len(kinds) > 1:
        those = "; ".join(f"{where}: {what}" for what, where in kinds.items())
        say(f"ranks round their sums differently, so that another life's bits may be others: {those}. Ask for nodes of "
            f"one kind (--constraint)")  # fmt: skip


def kind(device: torch.device) -> dict[str, str]:
    """What a process computes with, as far as rounding depends on it: device, torch and more."""
    found = {"device": name_of(device), "torch": str(torch.__version__)}
    return found | ({"cpu": torch.backends.cpu.get_cpu_capability()} if device.type == "cpu" else {})


def _identity(gpu: torch.device) -> str:
    """Two processes of a node are on one GPU if this is the same; not each maker's UUID alone tells its GPUs apart, and
    each slice of one has its own."""
    found = torch.cuda.get_device_properties(gpu)
    names = ("uuid", "pci_domain_id", "pci_bus_id", "pci_device_id")
    uuid, *where = (str(getattr(found, name, "")) for name in names)
    return " ".join([MIG if any(where) and f" {MIG} " in getattr(found, "name", "") else uuid, *where])


def check_precision(env: JobEnvironment, device: torch.device, precision: str, *, has_bf16: bool | None = None) -> None:
    """Raise NodeUnfit if bf16 would be emulated: seventy times slower than fp32 on a CPU that only has AVX2, and on a
    GPU from before 2020 without cuDNN.

    has_bf16: whether this device has it; None: ask torch.
    """
    if precision != "bf16":
        return
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if has_bf16 is None else has_bf16
        lacks, ask, instead = (
            f"the {name_of(device)} of {env.host} has not",
            "a newer GPU (--gpus-per-node a100:1)",
            "fp16",
        )
    else:
        has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if has_bf16 is None else has_bf16
        lacks = f"the CPU of {env.host} has not, and there is no GPU"
        ask, instead = "a GPU (--gpus-per-node 1)", "off"
    if not has_bf16:
        raise NodeUnfit(
            f"this asks for bf16, which {lacks}: it would take many times as long as fp32. Ask for {ask} or another "
            f"node (--constraint); or ask for less: train.amp={instead} in a new run, for samples --precision fp32 and "
            f"another --set"
        )
