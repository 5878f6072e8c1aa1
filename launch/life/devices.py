"""The device of a process, and whether torch can use the GPUs that the job was given. Loads torch."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.errors import DoNotRetry, NodeUnfit
from ddpm.network.device import as_device, keep_freed_memory
from ddpm.training.ranks import World
from launch.cluster import environment
from launch.cluster.environment import JobEnvironment

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def one_device(env: JobEnvironment) -> torch.device:
    """The device of this process: its own GPU if several ranks share a node, else the first one or the CPU, for which
    the process then keeps its memory. Raises NodeUnfit."""
    device = as_device()
    if device.type == "cuda" and env.local_rank:
        device = torch.device("cuda", env.local_rank % torch.cuda.device_count())
    check(env, device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def check(env: JobEnvironment, device: torch.device, gpus: Path = NVIDIA_GPUS) -> None:
    """Raise NodeUnfit if SLURM gave this job GPUs, the node has them, and torch cannot use them."""
    if device.type == "cuda" or not environment.gpus_given() or not any(gpus.glob("*")):
        return
    why = f"torch {torch.__version__} was built with CUDA {torch.version.cuda}: is the driver as new, nvidia-smi well?"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is its CPU build: delete .venv and run tools/env.sh, or install the other"
    raise NodeUnfit(f"{env.host} has GPUs for this job, but torch cannot use them. {why}")


def check_apart(world: World, host: str) -> None:
    """Called on all ranks. Raise DoNotRetry if two of them would have one GPU, which NCCL refuses; NodeUnfit if some
    have a GPU and others none: they would wait for each other."""
    if world.world_size == 1:
        return
    gpu = str(torch.cuda.get_device_properties(world.device).uuid) if world.device.type == "cuda" else ""
    told = world.all_of((host, gpu))
    gpus = [gpu for _, gpu in told]
    if any(gpus) and (without := [rank for rank, gpu in enumerate(gpus) if not gpu]):
        hosts = ", ".join(sorted({told[rank][0] for rank in without}))
        raise NodeUnfit(f"torch sees no GPU on rank {without[0]} ({hosts}), and others have one: is the driver well?")
    for rank, (host, gpu) in enumerate(told):
        if gpu and (other := gpus.index(gpu)) < rank:
            raise DoNotRetry(
                f"ranks {other} and {rank} would both compute on one GPU of {host}: a job needs a GPU for each task of "
                f"a node, as --gpus-per-node 4 gives; by hand --ntasks-per-node 4 beside it"
            )


def check_precision(env: JobEnvironment, device: torch.device, precision: str, *, has_bf16: bool | None = None) -> None:
    """Raise NodeUnfit if bf16 would be emulated: seventy times slower than fp32 on a CPU that only has AVX2.

    has_bf16: whether this CPU's convolutions support it; None: ask torch.
    """
    if precision != "bf16" or device.type != "cpu":
        return
    if has_bf16 is None:
        has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not has_bf16:
        raise NodeUnfit(
            f"this asks for bf16, which the CPU of {env.host} has not, and there is no GPU: it would take many times "
            f"as long as fp32. Ask for a GPU (--gpus-per-node 1) or another node (--constraint); or ask for fp32: "
            f"train.amp=off in a new run, for samples --precision fp32 and another --set"
        )
