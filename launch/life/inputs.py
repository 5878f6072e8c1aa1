"""The data that a life trains on: packed again if the cache is gone, and copied to a node's own disk if wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm.config.schema import Config
from ddpm.data import packed, scratch
from ddpm.data.labels import labels_changed, labels_record
from ddpm.data.packed import PackedImages
from ddpm.errors import DoNotRetry, EnvironmentLacks, RequestError, Stopped
from ddpm.run.fence import Fence
from ddpm.run.files import PASSING, DamagedFile, sign, write_json
from ddpm.run.log import say
from ddpm.run.records import data_of, lost_signature, read_run
from ddpm.run.stopping import STOP_REASONS, StopRequested
from ddpm.training.ranks import World, stop_code
from launch.cluster import environment
from launch.life.life import Life


def packed_data(life: Life, config: Config, world: World, fence: Fence | None = None) -> PackedImages:
    """The packed training data; called on all ranks. Raises Stopped on all ranks; DoNotRetry if the data has changed.

    Rank 0 reads all of it (once per machine and boot) before any rank maps it, and packs it again if it is damaged or
    gone; one rank of each node does the same for a copy on scratch.
    fence: on rank 0, to add labels to the run.json of an old run that has none. Raises DamagedFile if run.json does not
    say which data it is.
    """
    record, data = read_run(life.run), data_of(life.run)
    if not (data.get("key") and data.get("digest")):
        raise DoNotRetry(f"{life.run.run_json} does not say where this run's data is: restore it, or submit it again")
    cache, key = Path(data["cache"]), data["key"]
    labels = record.get("labels") if config.model.num_classes else None

    def bring(stop_requested: StopRequested) -> str:
        return _bring(cache, key, config, labels, stop_requested)

    key = _of_rank_0(life, world, bring)
    local = None
    if data.get("scratch"):
        try:
            local = environment.expand(data["scratch"]) / "ddpm-hpc"
        except EnvironmentLacks as e:
            say(f"scratch of {life.env.host} cannot be used ({e}); reading the data from {cache}")
        _copy_to(local, life, world, cache, key)
    there = packed.open_packed(cache, key, scratch=local)
    changed = labels_changed(labels, labels_record(there))
    if there.digest != data["digest"] or changed:
        pixels = f"digest {there.digest[:12]} now, {data['digest'][:12]} when it was submitted"
        raise DoNotRetry(f"the data changed under this run: {changed or pixels}. Restore it, or train another run")
    if fence is not None and ("labels" not in record or lost_signature(record)):
        if "labels" in record:
            say("run.json is signed no more, as where it was edited by hand: taken as it is, and signed again")
        _keep_labels(life, fence, there)
    return there


def held_out(life: Life, config: Config, world: World) -> PackedImages | None:
    """The packed test split, if the run validates on it, else None; called on all ranks. Raises Stopped on all ranks.

    If it is damaged or gone and cannot be packed again, or has changed since the submission, training goes on without
    validation, which is logged.
    """
    if config.log.validate_every_steps is None:
        return None
    data = data_of(life.run)
    cache, known = Path(data["cache"]), data.get("test") or {}

    def bring(stop_requested: StopRequested) -> str:
        try:
            return _bring_test(cache, known, config, stop_requested)
        except (DamagedFile, RequestError, EnvironmentLacks, OSError) as e:
            say(f"no validation in this life: the test split that it needs cannot be used: {e}")
            return ""

    key = _of_rank_0(life, world, bring)
    return packed.open_packed(cache, key) if key else None


def _of_rank_0(life: Life, world: World, bring: Callable[[StopRequested], str]) -> str:
    """What rank 0 brings, on all ranks. Raises Stopped on all ranks."""
    return str(world.broadcast(together(life.stop, world, bring if world.is_main else None)))


def _bring_test(cache: Path, known: dict[str, Any], config: Config, stop_requested: StopRequested) -> str:
    """The key of the verified test split. Raises DamagedFile if its images are not those of the submission."""
    try:
        key, there = str(known["key"]), packed.open_verified(cache, known["key"], stop_requested=stop_requested)
    except (KeyError, DamagedFile, OSError):
        key, there = packed.pack(config.data, "test", cache, stop_requested=stop_requested)
    if known and there.digest != known["digest"]:
        raise DamagedFile(f"its images changed (digest {there.digest[:12]} now, {known['digest'][:12]} then)")
    return key


def _bring(cache: Path, key: str, config: Config, labels: dict[str, Any] | None, stop_requested: StopRequested) -> str:
    """The key of the run's verified data. Damaged data is packed again, under another key if files were touched.

    Raises Stopped; DoNotRetry or EnvironmentLacks if it cannot be packed here.
    """
    why, may_pass = "gone", False
    try:
        there = packed.open_verified(cache, key, stop_requested=stop_requested)
        if changed := labels_changed(labels, labels_record(there)):
            raise DamagedFile(changed)  # packing the images again may mend it
        return key
    except (DamagedFile, OSError) as e:
        may_pass = isinstance(e, PermissionError) or (isinstance(e, OSError) and e.errno in PASSING)
        if os.path.lexists(cache / key):
            why = f"damaged ({e})"
    if why == "gone":
        say("the packed data is gone from the cache: packing it again", cache=cache)
    elsewhere = environment.OTHER_CACHE
    try:
        found = packed.pack(config.data, "train", cache, stop_requested=stop_requested, or_else=elsewhere)[0]
    except (RequestError, EnvironmentLacks) as e:
        # where a disk or a network was lacking, another node may have it; what was not read may be whole
        kind = DoNotRetry if isinstance(e, RequestError) and not may_pass else EnvironmentLacks
        raise kind(
            f"{e}. So the packed data {cache / key}, which is {why}, cannot be packed again here: where the images or "
            f"a network are, submit the run again (python launch/submit.py, with the same words), which packs it"
        ) from None
    if found != key and why != "gone":
        say(
            f"the packed data {cache / key} is {why}: using what the images, whose times changed, are packed as",
            key=found,
        )
    return found


def _keep_labels(life: Life, fence: Fence, there: PackedImages) -> None:
    """Add labels to the run.json of an old run, so that they are compared from now on."""
    try:
        record = sign({"labels": labels_record(there), **read_run(life.run)})
        write_json(life.run.run_json, record, replace=True, may_publish=fence.check)
    except OSError as e:  # a full disk ends no training
        say("the labels of the data were not added to the run's record", error=e)


def _copy_to(local: Path | None, life: Life, world: World, cache: Path, key: str) -> None:
    """Copy the data to scratch on one rank of each node; if that fails, its node reads the cache."""

    def copy(stop_requested: StopRequested) -> None:
        assert local is not None
        try:
            scratch.copy_to_scratch(cache, key, local, stop_requested=stop_requested)
        except (OSError, DamagedFile) as e:
            say(f"scratch {local} of {life.env.host} cannot be used ({e}); reading the data from {cache}")

    together(life.stop, world, copy if local and life.env.local_rank == 0 else None)


def together(stop: StopRequested, world: World, work: Callable[[StopRequested], Any] | None) -> Any:
    """Run `work` on the ranks that have some, while the others answer them, so that no rank is taken for dead.

    `work` must call its argument every few seconds, and raise Stopped if that returns a reason. Returns its result.
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
