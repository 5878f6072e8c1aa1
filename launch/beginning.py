"""The beginning of one run that was checked: its directory is made or updated, and what it needs is queued, or started
here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from ddpm.training.mirror import sync_command
from launch import origin, prepare
from launch.cluster import code, scheduler
from launch.cluster.job import Job
from launch.cluster.site import Site
from launch.queue import chain, directory, local
from launch.queue.submitting import by_hand
from launch.queue.turns import turn
from launch.submission import Asked, told_of

if TYPE_CHECKING:
    from ddpm.network.start import Start


class Here(NamedTuple):
    """A background process that was started on this machine."""

    process: subprocess.Popen[bytes]
    log: Path


class Queued(NamedTuple):
    """Ids of queued jobs, and the stages that `queue_rest` has still to queue."""

    jobs: list[str]
    left: list[str]


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


def what_is_left(run: RunDir, config: Config, stages: list[str], *, begins: str = "") -> tuple[bool, list[str]]:
    """For an existing run: whether to train, and the stages after it. Prints a line if its last checkpoint is
    damaged, which begins with `begins`."""
    train, left = chain.remaining(run, config, stages)
    if train or (why := chain.damage(run)) is None:
        return train, left
    told = f"the last checkpoint is damaged ({why}): training goes on from the newest one that is not"
    print(f"{begins}{told}", flush=True)
    return True, stages


def queue_rest(asked: Asked, config: Config, site: Site, begun: Queued, *, why: bool) -> Queued:
    """Queue the stages after a training that was queued alone; returns all job ids. why, and errors: as
    `chain.queue`."""
    with turn(asked.run):
        jobs = chain.jobs_of(asked.run, config, site, begun.left, train=False)
        ids, told = chain.queue(jobs, config, after=begun.jobs, why=why)
    print("".join(f"{line}\n" for line in told), end="")
    return Queued([*begun.jobs, *ids], [])
