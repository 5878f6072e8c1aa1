"""The data that a life trains on: packed again where the cache is gone; from a node's own disk where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm.config.schema import Config
from ddpm.data import packed, scratch
from ddpm.data.packed import PackedImages
from ddpm.errors import DoNotRetry, Stopped
from ddpm.run.log import say
from ddpm.run.records import data_of
from ddpm.run.stopping import STOP_REASONS, StopRequested
from ddpm.training.ranks import World, stop_code
from launch.cluster import environment
from launch.life.life import Life


def packed_data(life: Life, config: Config, world: World) -> PackedImages:
    """The packed training data, on all ranks. Raises Stopped, on all ranks; DoNotRetry where the data is another."""
    record = data_of(life.run)
    cache, key = Path(record["cache"]), record["key"]
    if world.share(world.is_main and not (cache / key / "meta.json").exists()):
        key = _pack_again(life, config, world, cache)
    local = None
    if record.get("scratch"):
        local = environment.expand(record["scratch"]) / "ddpm-hpc"
        _copy_to(local, life, world, cache, key)
    there = packed.open_packed(cache, key, scratch=local)
    if there.digest != record["digest"]:
        raise DoNotRetry(
            f"the data changed under this run: digest {there.digest[:12]} now, "
            f"{record['digest'][:12]} when it was submitted. Restore it, or train another run"
        )
    return there


def _pack_again(life: Life, config: Config, world: World, cache: Path) -> str:
    """Rank 0 packs. Returns the key, on all ranks."""

    def pack(stop_requested: StopRequested) -> str:
        say("the packed data is gone from the cache: packing it again", cache=cache)
        elsewhere = environment.OTHER_CACHE
        return packed.pack(config.data, "train", cache, stop_requested=stop_requested, or_else=elsewhere)[0]

    return str(world.share(together(life.stop, world, pack if world.is_main else None)))


def _copy_to(local: Path, life: Life, world: World, cache: Path, key: str) -> None:
    """One rank of each node copies; where it cannot, its node reads the cache."""

    def copy(stop_requested: StopRequested) -> None:
        try:
            scratch.copy_to_scratch(cache, key, local, stop_requested=stop_requested)
        except OSError as e:
            say(f"scratch {local} cannot be used ({e}); reading the data from {cache}")

    together(life.stop, world, copy if life.env.local_rank == 0 else None)


def together(stop: StopRequested, world: World, work: Callable[[StopRequested], Any] | None) -> Any:
    """`work` on the ranks that have some; the others answer it meanwhile, so that none takes its silence for death.

    `work` asks what it is given every few seconds, and raises Stopped where that says so. Returns what it returns.
    Raises Stopped on all ranks, also where `work` met an error of its own while it stopped.
    """
    heard = ""

    def agreed(busy: bool) -> tuple[str, int]:
        reason, any_busy = world.agree([stop_code(stop), int(busy)])
        return STOP_REASONS[reason], any_busy

    def stop_requested() -> str | None:
        nonlocal heard
        heard = heard or agreed(busy=True)[0]  # once there is a reason the others have left
        return heard or None

    done = work(stop_requested) if work else None
    if heard:
        raise Stopped(heard)
    while True:
        reason, any_busy = agreed(busy=False)
        if not any_busy:
            return done
        if reason:
            raise Stopped(reason)
