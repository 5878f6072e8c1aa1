"""Options that nothing would heed where the jobs run: refused, so that whatever is typed is done.

Of what is typed alone: a profile, and what a run was submitted with, describe a site, and each stage takes its own from
them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ddpm.errors import RequestError
from launch.cluster.site import Site

OF_A_QUEUE = (
    *("partition", "account", "qos", "constraint", "exclude", "time", "mem", "mem_per_cpu", "mem_per_gpu"),
    *("max_parallel", "tasks", "via"),
)
"""Options that mean nothing to processes of this machine."""


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_local(typed: Mapping[str, Any], sbatch: Collection[str]) -> None:
    """Raise RequestError where what is typed asks a queue for something, and there is none."""
    given = [flag(name) for name in OF_A_QUEUE if typed.get(name) is not None] + (["--sbatch"] if sbatch else [])
    if given:
        raise RequestError(
            f"{', '.join(given)}: nothing heeds {'these' if given[1:] else 'this'} with --cluster local, where jobs "
            f"are processes of this machine; leave {'them' if given[1:] else 'it'} out, or give --cluster slurm"
        )


def check_stage(typed: Mapping[str, Any], site: Site, stage: str) -> None:
    """Raise RequestError where what is typed asks for more than one task of this stage takes."""
    here, what = site.is_local, "a sample job" if stage == "sample" else "an evaluation"
    one, more = (
        (f"{what} here", ": leave it out") if here else (f"a task of {what}", "; for more at a time give --tasks")
    )
    own = site.at(stage).ranks_per_node
    if (nodes := typed.get("nodes", 1)) != 1:
        raise RequestError(f"--nodes {nodes}: {one} is on one node{more}")
    if (tasks := typed.get("tasks_per_node", own)) != own:
        has_gpus = stage == "sample" and not here
        each = "has a process for each of its GPUs, else one" if has_gpus else "is one process"
        raise RequestError(
            f"--tasks-per-node {tasks}: {one} {each}{more}" + (f", or --gpus-per-node {tasks}" if has_gpus else "")
        )
    gpus = typed.get("gpus_per_node") or 0
    if int(str(gpus).rpartition(":")[2]) > 1 and (here or stage == "evaluate"):
        raise RequestError(f"--gpus-per-node {gpus}: {one} uses one GPU{more}")
