"""The submission of one run: the request, its checks before anything is queued, and its outcome.

`submit.py` uses it for one run, `sweep.py` for several.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ddpm.config import reading
from ddpm.config.schema import Config, check_world_size
from ddpm.data.listing import list_anew
from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from launch import origin, prepare
from launch.cluster import container
from launch.cluster.job import check_path
from launch.cluster.memory import check_batch
from launch.cluster.site import Site
from launch.queue import borrowing, chain, directory
from launch.queue.turns import turn
from launch.terminal import console
from launch.terminal.results import print_results, why_not

if TYPE_CHECKING:
    from ddpm.network.start import Start


@dataclass(frozen=True)
class Asked:
    """One run that a command line asks for."""

    run: RunDir
    typed: Config
    """The config as typed; its length may be in epochs or images."""
    config: Config
    """The config with its length in steps, if that is known before the data is packed."""
    stages: list[str]
    """Stages after training."""
    source: origin.Origin | None = None
    sweep: Mapping[str, Any] = field(default_factory=dict)
    """`sweep` of run.json, if the run is part of one: {"name", "values": {"train.lr": 1e-4}}."""


# ---------------------------------------------------------------- before anything is written


def check_resources(config: Config, site: Site, run: RunDir) -> list[str]:
    """Check what does not need the scheduler: the number of ranks is known already. Returns warnings; RequestError."""
    check_world_size(config, site.world_size)
    if site.is_local and site.nodes > 1:
        raise RequestError(
            f"--nodes {site.nodes}: --cluster local is one machine; give --tasks-per-node for more ranks"
        )
    warning = check_batch(config, site)
    check_path(run, site)
    return [warning] if warning else []


def check(asked: Asked) -> tuple[bool, Start | None]:
    """Check what the run will read. Returns whether the run exists, and the weights that a new one starts from.

    Raises RequestError.
    """
    prepare.check_data(asked.config, asked.stages)
    if prepare.check_existing(asked.run, asked.config):
        origin.check_same(asked.run, asked.source)
        directory.write_lost(asked.run, asked.config)
        return True, None
    return False, origin.read(asked.source, asked.config) if asked.source is not None else None


def check_dry(asked: Asked) -> tuple[int | None, Start | None]:
    """`check` without side effects, for a dry run; returns the number of training images, if it is known, and the
    weights that a new run starts from."""
    run, config, start = asked.run, asked.config, None
    if prepare.check_existing(run, config):
        origin.check_same(run, asked.source)
        if not is_complete(asked):
            borrowing.check_trainable(run)
    elif asked.source is not None:
        start = origin.read(asked.source, config)
    if not run.path.exists() and (config.data.path or config.log.validate_every_steps):
        prepare.check_data(config, asked.stages)
    return prepare.num_images(config, run), start


def told_of(start: Start) -> str:
    came = start.record
    source = str(came["source"]) + (f"@{came['step']}" if came.get("step") else "")
    return f"it starts from the weights ({came['weights']}) of {source}"


def in_container(site: Site, run: RunDir) -> list[str]:
    """The shell lines that start ranks in the profile's container; [] without a container."""
    root = run.path.parent
    return container.lines(site.container, [root, prepare.cache_of(site, root)]) if site.container.image else []


def is_complete(asked: Asked) -> bool:
    """Whether an existing run has everything that is asked for."""
    done = chain.remaining(asked.run, asked.config, asked.stages) == (False, [])
    return done and chain.damage(asked.run) is None


def told_of_changes(asked: Asked) -> list[str]:
    """For a dry run: what of an existing run's config is changed, or is not kept."""
    run = asked.run
    if run.config.exists() and (why := _not_kept(asked)) and is_complete(asked):
        return [why]
    return prepare.told_of_changes(run, asked.config) if run.path.exists() else []


def keep_changes(asked: Asked, site: Site) -> None:
    """Of a complete run: write down where its data is now, for scores to come. Other changes have nothing to act on."""
    run, config = asked.run, asked.config
    if why := _not_kept(asked):
        console.warn(why)
    if config.data.path == reading.of_run(run).data.path:
        return
    borrowing.check_trainable(run)
    record = directory.describe(config, site, run, prepare.prepare_inputs(config, site, run.path.parent, asked.stages))
    with turn(run):
        told = prepare.told_of_changes(run, config)
        directory.update_run(run, config, record, told=site.notify)
    print("\n".join(told))


def _not_kept(asked: Asked) -> str:
    """What is said of another config for a complete run; "" where it is kept, or is none."""
    differ = [key for key, *_ in reading.differences(reading.of_run(asked.run), asked.config) if key != "name"]
    if not differ or "data.path" in differ:
        return ""
    return f"not kept, since nothing of the run is left to be made: {', '.join(differ)}"


# ---------------------------------------------------------------- afterwards


def outcome(run: RunDir, config: Config, stages: list[str]) -> int:
    """The exit code after waiting, by what the run directory shows; prints the results or what is missing."""
    list_anew()
    train, left = chain.remaining(run, config, stages)
    if train or left:
        print(
            f"error: run {run.name} ended at step {run.latest_step()} of {config.train.total_steps}"
            + ("" if train else f", without what was to follow ({', '.join(left)})")
            + why_not(run),
            file=sys.stderr,
        )
        return 1
    print_results(run, config, stages)
    return 0
