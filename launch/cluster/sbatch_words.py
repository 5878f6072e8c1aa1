"""Options of sbatch that ask for what keys and options of ours ask for too: they count as those, so that a stage which
needs another share of it, or has its own, can say so."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ddpm.errors import RequestError
from launch.cluster.partitions import gpus_of
from launch.cluster.site import MEMORIES, Stage

OF_A_STAGE = (*MEMORIES, "cpus_per_task", "account", "qos", "constraint", "exclude")
SHARED = {name.replace("_", "-"): name for name in OF_A_STAGE}
"""Options of sbatch that are keys of ours too. A stage has its own, or asks only for its share of them."""


def put_first(tree: dict[str, Any], stage: str, typed: dict[str, Any], options: Collection[str]) -> None:
    """Have what is typed for a stage, also by options of sbatch, go before the profile's section of it."""
    own = tree.get(stage) or {}
    if not isinstance(own, dict) or not isinstance(own.get("sbatch") or {}, dict):
        return  # which is refused
    tree[stage] = own = {**own, **{k: v for k, v in typed.items() if k in Stage.model_fields}}
    for option in options:
        if key := SHARED.get(option):
            own |= {**(dict.fromkeys(MEMORIES) if key in MEMORIES else {}), key: tree[key]}
        elif option in tree["sbatch"]:
            own["sbatch"] = {**(own.get("sbatch") or {}), option: tree["sbatch"][option]}


def take_shared(tree: dict[str, Any], extra: dict[str, Any], typed: dict[str, Any], options: Collection[str]) -> None:
    """Move what an option of sbatch asks for into the key of ours that asks for the same.

    options: the options of sbatch that were typed. A profile's give way to our own options that were typed.
    """
    for option, key in SHARED.items():
        if option not in extra or extra[option] is None:
            continue
        value = extra.pop(option)
        rivals = [name for name in (MEMORIES if key in MEMORIES else (key,)) if typed.get(name) is not None]
        if rivals and option in options:
            other = f"--{rivals[0].replace('_', '-')} {typed[rivals[0]]}"
            raise RequestError(f"{other} with --sbatch {option}={value}: give one of them")
        if not rivals:
            tree.update(dict.fromkeys(MEMORIES) if key in MEMORIES else {})
            tree[key] = int(value) if key == "cpus_per_task" and str(value).isdecimal() else value


def take_gres(tree: dict[str, Any], extra: dict[str, Any], typed: str | None) -> None:
    """GPUs that are asked for by sbatch's gres count as --gpus-per-node, so that a stage which needs fewer can say so.

    typed: --gpus-per-node of the command line.
    """
    gres = str(extra.get("gres") or "")
    gpus = gpus_of(gres)
    if len(gpus) != 1:
        return
    ((kind, number),) = gpus
    if typed is not None and str(typed).rpartition(":")[2] not in ("0", str(number)):
        raise RequestError(f"--gpus-per-node {typed} with --sbatch gres={gres}: they differ; give one of them")
    if ":" in kind:  # a form that --gpus-per-node does not have: kept for every stage
        tree["gpu_request"], tree["gpus_per_node"] = "none", number
        return
    rest = ",".join(entry for entry in gres.split(",") if not gpus_of(entry))
    extra.pop("gres")
    if rest:
        extra["gres"] = rest
    tree["gpus_per_node"], tree["gpu_request"] = f"{kind}:{number}" if kind else number, "gres"
