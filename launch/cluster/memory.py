"""Checks before submission whether a batch can fit in memory. Refuses nothing that might work."""

from __future__ import annotations

import os
from pathlib import Path

from ddpm.config.schema import Config
from ddpm.config.train import divisors
from ddpm.errors import RequestError
from ddpm.network.made import other_than_the_unet
from ddpm.run.log import counted
from launch.cluster.site import Site
from launch.cluster.values import memory_bytes

NO_GPU, NO_GPU_HAS = "no GPU has", 1 << 40
LARGE_GPU = 80 << 30
"""Bytes of a large GPU; most have less."""


def check_batch(config: Config, site: Site) -> str | None:
    """Raise RequestError if the images that a rank holds at a time cannot fit; returns a warning, or None.

    The memory of an image is a lower bound, of the U-Net, and no other network is judged by it;
    tools/inspect_config.py estimates the real need, but loads torch.
    """
    if other_than_the_unet():
        return None
    share = config.train.global_batch // site.world_size
    micro = config.train.micro_batch
    images = 1 if micro == "auto" else micro or share
    each = config.network.least_activation_bytes
    limit, where = _memory(site)
    key = "train.micro_batch" if micro else "train.global_batch"
    told = (
        f"{key} = {getattr(config.train, key.partition('.')[2])}: {counted(images, 'image')} at a time on each rank "
        f"{'keeps' if images == 1 else 'keep'} at least {_gib(images * each)}"
    )
    if images * each > limit:
        fits = [n for n in divisors(share) if n * each <= limit]
        instead = f"train.micro_batch={fits[-1]}, which changes no step," if fits else "a smaller network"
        raise RequestError(f"{told}, and {where} {_gib(limit)}; use {instead} or more memory")
    if images * each > LARGE_GPU and where == NO_GPU:
        fits = [n for n in divisors(share) if n * each <= LARGE_GPU]
        return (
            f"{told}, which few GPUs have; train.micro_batch={fits[-1] if fits else 1} changes no step and needs less"
        )
    return None


def _memory(site: Site) -> tuple[int, str]:
    """The most memory that a rank can have, in bytes, and words for what sets that limit."""
    on_gpu = Path("/dev/nvidiactl").exists() if site.is_local else site.gpus_per_node != 0
    if on_gpu:  # null: one where the partition has GPUs
        return NO_GPU_HAS, NO_GPU
    if site.is_local:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole // site.ranks_per_node, "a rank's share of this machine is"
    if site.mem is None or memory_bytes(site.mem) == 0:  # 0: all of the node
        return NO_GPU_HAS, "no node has for a rank"
    return memory_bytes(site.mem) // site.ranks_per_node, f"a rank's share of --mem {site.mem} is"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
