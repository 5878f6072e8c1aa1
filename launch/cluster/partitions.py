"""What the partitions of this cluster have and allow, as sinfo shows them. Knows no job."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launch.cluster import slurm
from launch.cluster.answers import SchedulerError


@dataclass(frozen=True)
class Partition:
    name: str
    gpus_per_node: int
    """The most that any of its nodes has."""
    is_default: bool
    gpu_types: frozenset[str] = frozenset()
    """Types of its nodes' GPUs; "" for GPUs without a type."""
    time_limit: str | None = None
    """The longest time limit of a job, as SLURM writes it; None: no limit."""


def partitions() -> dict[str, Partition]:
    """Every partition, hidden ones too; {} where the site shows them to no user (PrivateData). Raises
    SchedulerError."""
    found: dict[str, Partition] = {}
    try:
        told = slurm.ask(["sinfo", "-a", "-h", "-o", "%P|%G|%l"], timeout_s=10)
    except SchedulerError as e:
        if "permission denied" not in str(e):
            raise
        return found
    for line in told.splitlines():
        shown, gres, limit = (*line.split("|"), "", "")[:3]
        name = shown.removesuffix("*")
        there = found.get(name) or Partition(name, 0, shown != name)
        gpus = gpus_of(gres)
        found[name] = Partition(
            name,
            max(there.gpus_per_node, sum(number for _, number in gpus)),
            there.is_default,
            there.gpu_types | {kind for kind, _ in gpus},
            limit if limit[:1].isdigit() else None,
        )
    return found


def gpus_of(gres: str) -> list[tuple[str, int]]:
    """(type, number) of the GPUs in a gres string, as of nodes or as in requests of jobs:

    gpu, gpu:4, gpu:a100:4(S:0-1), gpu:tesla:v100:4, gpu:a100:no_consume:4, lscratch:100 beside them.
    """
    found = []
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *words = entry.strip().removeprefix("gres/").replace("=", ":").split(":")
        if name == "gpu":
            number = int(words.pop()) if words and words[-1].isdecimal() else 1
            found.append((":".join(word for word in words if word != "no_consume"), number))
    return found
