"""Where a job computes, and whether that is what it was given. Loads torch."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.errors import NodeUnfit
from launch.cluster import environment
from launch.cluster.environment import JobEnvironment

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def one_device(env: JobEnvironment) -> torch.device:
    """Where a job of one process computes. Raises NodeUnfit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(env, device)
    return device


def check(env: JobEnvironment, device: torch.device, gpus: Path = NVIDIA_GPUS) -> None:
    """Raises NodeUnfit where SLURM gave this job GPUs of a node that has them, and torch cannot use them."""
    if device.type == "cuda" or not environment.gpus_given() or not any(gpus.glob("*")):
        return
    why = f"torch {torch.__version__} was built with CUDA {torch.version.cuda}: is the driver as new, nvidia-smi well?"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is its CPU build: delete .venv and run tools/env.sh, or install the other"
    raise NodeUnfit(f"{env.host} has GPUs for this job, but torch cannot use them. {why}")


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
