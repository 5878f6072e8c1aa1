"""One start of one job: what it is, its stop flag, and how it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ddpm.errors import EXIT_REQUEUE, Stopped
from ddpm.run.claims import OthersAtWork, Worker
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler
from launch.cluster.environment import JobEnvironment
from launch.cluster.job import ranges
from launch.life import preemption
from launch.life.last_words import last_words
from launch.life.preemption import StopFlag
from launch.queue import ending
from launch.queue.waiting import known_stop, mercy_for

T = TypeVar("T")


@dataclass(frozen=True)
class Life:
    """What every stage gets: its run, what tells it to stop, and its place among the job's processes."""

    run: RunDir
    stop: StopFlag
    env: JobEnvironment
    speaks: bool = True
    """Whether rank 0's exit marker stands for all ranks; else the batch shell goes by srun's exit code, but where time
    is up, which all are told: srun ends others for the first that leaves, and tells how they died."""

    def alone(self) -> Life:
        """The life of a rank that works on its own shards and waits for no other rank."""
        return replace(self, env=replace(self.env, rank=0, world_size=1), speaks=False)

    @property
    def worker(self) -> Worker:
        """This process to those with which it shares work: of an array the first task merges, the others leave."""
        return Worker(self.stop, self.env.token, stay=not self.env.array_task)

    def heed_stop(self) -> None:
        """Watch the run's STOP file from here on, unless samples or a score were asked for despite that very one."""
        self.stop.watch(self.run, known_stop(self.run, self.env.job) if self.run.is_stopped() else "")

    def leave(self, code: int, reason: str = "") -> int:
        """Write the exit marker for the batch shell, which reads it instead of srun's exit code; returns `code`."""
        if self.speaks or reason == "time_limit":
            self._mark(self.run.exit_marker(self.env.job, self.env.restart), f"{code} {reason or 'crash'}")
        return code

    def result_of(self, compute: Callable[[], T]) -> T | int:
        """What is computed, and again where a stop was none; the exit code instead, if this job leaves before: it is
        told to stop, or others are still at their parts, of whom the first task merges."""
        while True:
            try:
                return compute()
            except OthersAtWork as e:
                say(str(e))
                return self.leave(0)
            except Stopped as e:
                say("stopped; finished parts are kept", reason=e.reason)
                code = self.until_killed_or_on(e.reason)
                if code is not None:
                    return self.leave(code, e.reason)

    def works_on(self, shards: list[int]) -> None:
        """Tell the batch shell which shards' progress is this job's own."""
        self._mark(self.run.shard_marker(self.env.job), ranges(shards))

    def _mark(self, path: Path, text: str) -> None:
        if self.env.rank == 0 and self.env.is_scheduled:
            with contextlib.suppress(OSError):  # of an exit code srun has one too; without a shard there is no progress
                self.run.logs.mkdir(exist_ok=True)
                path.write_text(text)

    def until_killed_or_on(
        self, reason: str, broadcast: Callable[[Any], Any] = lambda v: v, alive: Callable[[], None] = lambda: None
    ) -> int | None:
        """After a saved stop, on all ranks: the exit code to leave with, or None to go on."""
        if reason == "preempted" and self.env.is_scheduled:
            if broadcast(environment.batch_shell_can_ask() and not scheduler.available("scontrol")):
                return EXIT_REQUEUE  # in a container: the batch shell finds out why, and does the rest
            if self.env.rank == 0:
                after_scancel(self.run, self.env)
                ending.of_hold(self.run, self.env, environment.stage(), environment.sample_set())
        ask = partial(mercy_for, self.run, self.env.job)
        code = preemption.after_stop(self.stop, reason, self.env, broadcast, alive, ask)
        if code is None:
            self.stop.clear(reason)
        return code


def after_scancel(run: RunDir, env: JobEnvironment) -> None:
    """If the owner cancelled this job: say so, and if it was training, cancel the jobs that wait for it too.

    SLURM calls a cancelled job COMPLETING, like one that it requeues; only the job's log tells them apart.
    """
    stage = environment.stage()
    with contextlib.suppress(scheduler.SchedulerError, OSError):
        shown = scheduler.show(env.job, timeout_s=5)
        if shown is None or shown.state not in ("COMPLETING", "CANCELLED") or shown.preempted:
            return
        if not last_words(run, stage, env).cancelled:
            return
        followers = scheduler.followers(env.job) if stage == "train" else []
        what = f", and with it what was to follow: job {' '.join(followers)}" if followers else ""
        say(f"cancelled by scancel{what}")
        # the event first, as this process may be killed in a moment
        env.events(run).append(
            "cancelled", world_size=env.world_size, step=run.latest_step(), stage=stage, with_it=followers
        )
        if followers:
            scheduler.cancel(followers)


def begin(run: RunDir) -> Life:
    stop = StopFlag()
    stop.install()  # before all that takes time
    return Life(run, stop, environment.current())
