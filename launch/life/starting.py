"""What a life does before it loads torch, which takes seconds: it finds out whether there is anything to do."""

from __future__ import annotations

import contextlib

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import DoNotRetry
from ddpm.run import generations
from ddpm.run.log import say
from ddpm.sampling.request import Request
from launch.cluster import code, environment, scheduler
from launch.life import compiled
from launch.life.life import Life
from launch.queue import borrowing
from launch.queue.chain import call_off, nothing_to_train
from launch.queue.sets import ensure_request


def start_training(life: Life) -> tuple[Config, str | None]:
    """The run's config, and on rank 0 why there is nothing to train, or None. Starts watching the run's STOP file."""
    run, env = life.run, life.env
    config = reading.of_run(run)
    why = nothing_to_train(run, config) if env.rank == 0 else None
    if not why:
        borrowing.check_trainable(run)
    if env.rank == 0 and not why:
        generations.read_ahead(run)
        _note_allocation(life)
    life.stop.watch(run)
    environment.prepare_cublas()
    compiled.choose_folder()
    return config, why


def request_of(life: Life, set_name: str) -> tuple[Config, Request]:
    """The run's config and the request of a set. Raises DoNotRetry if there is nothing to sample from, after cancelling
    the jobs that were to follow, each task of which would find out the same on a node of its own.
    """
    config = reading.of_run(life.run)
    try:
        return config, ensure_request(life.run, config, set_name)
    except DoNotRetry as e:
        took: list[str] = []
        if life.env.is_scheduled and life.env.rank == 0:
            with contextlib.suppress(scheduler.SchedulerError):
                took = call_off(life.env.job)
        raise DoNotRetry(f"{e}" + (f". Cancelled, as it was to follow: job {' '.join(took)}" if took else "")) from None


def _note_allocation(life: Life) -> None:
    """Record for goodput that this life has started, and when SLURM had freed the nodes of the life before.

    This life may die before it trains. The end of a killed life is not recorded otherwise: its last heartbeat is too
    early, and before training there is none.
    """
    run, env = life.run, life.env
    shown = None
    if env.is_scheduled and env.restart > 0:
        with contextlib.suppress(scheduler.SchedulerError):
            shown = scheduler.show(env.job, timeout_s=5)
    former = {"former_life_ended": shown.queued_at} if shown and shown.queued_at else {}
    former["code"] = code.digest(code.of_checkout())
    try:
        env.events(run).append("allocated", world_size=env.world_size, step=run.latest_step(), **former)
    except OSError as e:  # a full disk ends no training
        say("event not written", event="allocated", error=e)
