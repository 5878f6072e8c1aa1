"""The submission of one run: the request, its checks before anything is queued, and its start.

`submit.py` uses it for one run, `sweep.py` for several.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddpm.config import reading
from ddpm.config.schema import Config, check_world_size
from ddpm.data.listing import list_anew
from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from ddpm.training.mirror import sync_command
from launch import origin, prepare
from launch.cluster import code, container, scheduler
from launch.cluster.job import Job, check_path
from launch.cluster.memory import check_batch
from launch.cluster.site import Site
from launch.queue import borrowing, chain, directory, local
from launch.queue.submitting import by_hand
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


class Here(NamedTuple):
    """A background process that was started on this machine."""

    process: subprocess.Popen[bytes]
    log: Path


class Queued(NamedTuple):
    """Ids of queued jobs, and the stages that `queue_rest` has still to queue."""

    jobs: list[str]
    left: list[str]


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


# ---------------------------------------------------------------- its beginning


def begin(
    asked: Asked,
    site: Site,
    inputs: dict[str, Any],
    start: Start | None,
    *,
    existed: bool,
    prepare_only: bool,
    code_asked: str | None,
    train_alone: bool = False,
    why: bool = True,
    behind: Sequence[local.Place] = (),
) -> Queued | Here:
    """Make or update the run directory, and queue what the run still needs, or start it on this machine.

    inputs: from `prepare_inputs`; existed: from `check`; train_alone: leave later stages for `queue_rest`; why: ask
    what a queued job waits for; behind: the process and the name of a background job for which one here waits.
    """
    run = asked.run
    with turn(run):  # two submissions at once: the second finds what the first has made and queued
        if run.path.exists():
            origin.check_same(run, asked.source)
        elif existed and asked.source is not None:
            raise RequestError(f"run {run.name} was removed meanwhile: submit it again")
        config = asked.typed.resolve_length(inputs["data"]["num_images"])
        exists, left, train = write_down(asked, config, site, inputs, start, code_asked=code_asked)
        with nullcontext() if exists else _or_nothing(run):
            if prepare_only:
                how = "queue it with"
                if site.is_local:
                    here = f"python launch/submit.py {run.quoted} --cluster local"
                    how = f"start it here with:\n{here}\nor queue it, where there is SLURM, with"
                print(f"prepared; {how}:\n{by_hand(Job('train', run, site))}")
                return Queued([], [])
            if site.is_local:
                return Here(*local.start(run, chain.jobs_of(run, config, site, left, train=train), behind))
            jobs = chain.jobs_of(run, config, site, [] if train_alone else left, train=train)
            ids, told = chain.queue(jobs, config, why=why)
        print("".join(f"{line}\n" for line in told), end="")
        return Queued(ids, left if train_alone else [])


@contextmanager
def _or_nothing(run: RunDir) -> Iterator[None]:
    """Within: a run directory that was made here goes with what fails, as where a disk is full."""
    try:
        yield
    except scheduler.NoAnswer:
        raise  # with a job in the queue, perhaps, which needs the directory
    except Exception:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def write_down(
    asked: Asked, config: Config, site: Site, inputs: dict[str, Any], start: Start | None, *, code_asked: str | None
) -> tuple[bool, list[str], bool]:
    """Make the run directory, or update it unless its training is queued.

    Returns whether it existed, the later stages that are left, and whether training is left.
    """
    run = asked.run
    exists = prepare.check_existing(run, config)
    queued = exists and prepare.is_at_work(run, config, site)
    train, left = what_is_left(run, config, asked.stages) if exists else (True, asked.stages)
    step = prepare.goes_on_from(run) if exists and train and not queued else run.latest_step()
    record = directory.describe(config, site, run, inputs) | ({"sweep": asked.sweep} if asked.sweep else {})
    if exists and not queued:
        directory.check_update(run, config, record)  # before it gets other code
    if exists:
        unsaved = train and not queued and not step  # nothing was made by what it has
        by_itself = unsaved and code_asked is None and prepare.is_idle(run)
        prepare.settle_code(run, "new" if by_itself else code_asked, None if queued else config)
    else:
        if code_asked not in (None, "kept", "new"):
            code.kept_before(run, code_asked)  # of which a new run has none
        code.check(code.of_checkout())
    if not exists and start is not None:
        directory.create_run(run, config, {**record, "from": start.record}, start=start.data, told=site.notify)
        print(f"{told_of(start)}, which it keeps as {run.start.name}")
    elif not exists:
        directory.create_run(run, config, record, told=site.notify)
    elif not queued:
        print("".join(f"{line}\n" for line in prepare.told_of_changes(run, config)), end="")
        directory.update_run(run, config, record, told=site.notify)
        chain.lift_stop(run)
    if not exists:
        with _or_nothing(run):
            prepare.settle_code(run, None)
    print(f"run: {run.path}")
    if config.log.wandb is not None:
        print(f"wandb: unless WANDB_MODE says otherwise its metrics wait for {sync_command(run)}")
    if train and step:
        print(f"it goes on from step {step} of {config.train.total_steps}")
    if queued and (kept := directory.not_taken(run, site)):
        print(f"warning: {kept}", file=sys.stderr)
    return exists, left, train


def what_is_left(run: RunDir, config: Config, stages: list[str]) -> tuple[bool, list[str]]:
    """For an existing run: whether to train, and the stages after it. Prints a line if its last checkpoint is
    damaged."""
    train, left = chain.remaining(run, config, stages)
    if train or (why := chain.damage(run)) is None:
        return train, left
    print(f"the last checkpoint is damaged ({why}): training goes on from the newest one that is not", flush=True)
    return True, stages


def queue_rest(asked: Asked, config: Config, site: Site, begun: Queued, *, why: bool) -> Queued:
    """Queue the stages after a training that was queued alone; returns all job ids. why, and errors: as
    `chain.queue`."""
    with turn(asked.run):
        jobs = chain.jobs_of(asked.run, config, site, begun.left, train=False)
        ids, told = chain.queue(jobs, config, after=begun.jobs, why=why)
    print("".join(f"{line}\n" for line in told), end="")
    return Queued([*begun.jobs, *ids], [])


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
