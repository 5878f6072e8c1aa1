"""Checks a site's requests against what the partitions of this cluster have and allow."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

from ddpm.errors import EnvironmentLacks, RequestError
from launch.cluster import slurm
from launch.cluster.answers import NOT_REACHED, SchedulerError
from launch.cluster.container import check_image
from launch.cluster.environment import default_partition
from launch.cluster.partitions import Partition, partitions
from launch.cluster.site import Site, Stage
from launch.cluster.values import slurm_minutes

GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
"""Devices in /dev of NVIDIA's driver, of AMD's, and of WSL's."""


def settle(site: Site, *, dry_run: bool) -> Site:
    """Fill in what only the scheduler knows, and check the partition against it.

    Raises EnvironmentLacks without SLURM, RequestError for a partition or an image that does not exist. A dry run works
    without a scheduler, and then assumes one GPU per node.
    """
    if site.container.image and site.is_local:
        print("warning: the profile's container is for SLURM's jobs: here the run uses this Python", file=sys.stderr)
    elif not dry_run:
        check_image(site.container)
    if site.is_local:
        if site.num_gpus and not any(path for kind in GPU_DEVICES for path in Path("/dev").glob(kind)):
            told = f"--gpus-per-node {site.gpus_per_node}: this machine shows no GPU, so that its CPU computes"
            print(f"warning: {told}", file=sys.stderr)
        return site.model_copy(update={"gpus_per_node": 0 if site.gpus_per_node is None else site.gpus_per_node})
    known: dict[str, Partition] = {}
    if not slurm.available():
        if not dry_run:
            raise EnvironmentLacks(
                "sbatch is not on this machine: log in to the cluster's login node, load its slurm "
                "module, or run here with --cluster local"
            )
    else:
        if site.via == "submitit" and not dry_run and not slurm.available("srun"):
            raise EnvironmentLacks("srun is not on this machine, and submitit needs it: use --via sbatch")
        try:
            known = partitions()
        except SchedulerError as e:
            if not dry_run:
                raise EnvironmentLacks(
                    f"SLURM does not answer ({e}): {NOT_REACHED}, or run here with --cluster local"
                ) from None
    for where in (site, site.sample, site.evaluate) if known else ():
        _check_partition(where, known)
    if site.gpus_per_node is None:
        gpus = site.tasks_per_node or 1
        has_gpu = all(p.gpus_per_node for p in _meant(site.partition, known)) if known else True
        site = site.model_copy(update={"gpus_per_node": gpus if has_gpu else 0})
    for where in (site, site.at("sample")):
        there = _meant(where.partition, known)
        most = max((p.gpus_per_node for p in there), default=0)
        if most and where.num_gpus > most:
            raise RequestError(
                f"--gpus-per-node {where.gpus_per_node}: no node of {', '.join(p.name for p in there)} has more than "
                f"{most}; ask for at most {most}, and for more by --nodes, or to sample by --tasks"
            )
    return _with_types(site, known) if known else site


def _meant(names: str | None, known: dict[str, Partition]) -> list[Partition]:
    """The partitions that are asked for, or the default one."""
    asked = names or default_partition()
    found = [known[name] for name in asked.split(",") if name in known] if asked else []
    return found or [p for p in known.values() if p.is_default] or list(known.values())


def _check_partition(asked: Site | Stage, known: dict[str, Partition]) -> None:
    """Raise RequestError for an unknown partition, or a time limit that none of the requested ones allows."""
    for name in (asked.partition or "").split(","):
        if name and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise RequestError(
                f"--partition {name}: this cluster has no such partition; "
                + (f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}")
            )
    if asked.time is None or asked.qos is not None:  # a QOS may allow more
        return
    there = _meant(asked.partition, known)
    limits = [slurm_minutes(p.time_limit) for p in there if p.time_limit]
    if len(limits) == len(there) and asked.time > max(limits):
        which = "; ".join(f"partition {p.name} allows {p.time_limit}" for p in there)
        raise RequestError(
            f"--time: {asked.time} minutes are more than any job may have here ({which}), so it would wait for ever; "
            f"ask for less: the run continues in the next job"
        )


def _with_types(site: Site, known: dict[str, Partition]) -> Site:
    """The site with the GPUs' type added if there is only one, and without GPUs for stages whose partition has none."""

    def types(names: str | None) -> set[str]:
        return {kind for p in _meant(names, known) for kind in p.gpu_types}

    def typed(gpus: int | str, names: str | None) -> int | str:
        (only,) = types(names) if len(types(names)) == 1 else ("",)
        number = str(gpus)
        bare = number.isdecimal() and number != "0" and site.gpu_request == "auto"
        return f"{only}:{number}" if bare and re.fullmatch(r"[\w.-]+", only) else gpus

    update: dict[str, Any] = {"gpus_per_node": typed(site.gpus_per_node or 0, site.partition)}
    for name in ("sample", "evaluate"):
        stage: Stage = getattr(site, name)
        own = stage.gpus_per_node
        if stage.partition and own is None and types(stage.partition) != types(site.partition):
            has_gpu = all(p.gpus_per_node for p in _meant(stage.partition, known))
            own = 1 if has_gpu and site.num_gpus else 0
        if own is not None:
            own = typed(own, stage.partition or site.partition)
        update[name] = stage.model_copy(update={"gpus_per_node": own})
    return site.model_copy(update=update)
