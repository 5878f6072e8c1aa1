"""Signals to a flag, and what a job does once it has saved.

A handler only sets the flag. Two signals, two answers: SIGTERM under SLURM means pre-emption or
scancel, and only SLURM knows which, so the job saves and waits to be killed; USR2, some time before the time limit,
means save and go (exit 75), and the end of the batch shell puts the job back.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ddpm.errors import EXIT_REQUEUE
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler
from launch.cluster.environment import JobEnvironment
from launch.terminal import faults

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
STOP_POLL_S = 1.0
TWICE_S = 2.0
"""Signals that come sooner after the first one are the same wish: a shutdown, or a terminal, tells every process, and
those that have started others pass it on."""
REQUEUE_AT_ONCE_ABOVE_S = 60
MARGIN_S = 30


class StopFlag:
    """Why to stop, set by signals and by the run's STOP file; everything that takes long asks it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._scheduled = environment.is_scheduled()
        self._run: RunDir | None = None
        self._known_stop = ""
        self._polled_at = 0.0
        self._asked_at = 0.0

    def install(self) -> None:
        """Install the signal handlers, in place of submitit's too, which would exit without a save."""
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGUSR2, lambda *_: self._set("time_limit"))
        signal.signal(signal.SIGCONT, lambda *_: None)  # SLURM sends it before each SIGTERM
        faults.before_cpu_limit(self._on_cpu_limit)
        signal.signal(signal.SIGINT, self._on_int)  # by hand, in an allocation too
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            # a terminal that closes may say so twice, by its shell and by the kernel
            signal.signal(signal.SIGHUP, lambda *_: self._set("interrupted"))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # slurm/rank.sh kept them waiting for this

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: stop signals are blocked, also in every process started here, and are delivered at the end.

        SLURM signals all processes of a step: a compiler that died of a signal meant for us would fail the step.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def watch(self, run: RunDir, known_stop: str = "") -> None:
        """Let the run's STOP file count from here on, unless it has the mark `known_stop`."""
        self._run, self._known_stop = run, known_stop

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        if self._scheduled:
            self._set("preempted")
        else:
            self._on_int(signum, frame)

    def _on_int(self, signum: int, _: FrameType | None) -> None:
        if self.reason is not None and time.monotonic() - self._asked_at >= TWICE_S:
            os._exit(128 + signum)  # asked twice: leave at once
        self._set("interrupted")

    def _on_cpu_limit(self) -> None:
        self._set("time_limit" if self._scheduled else "interrupted")
        say(f"{faults.of_limit('t')}. This life ends here, with a save; another start goes on")

    def _set(self, reason: str) -> None:
        if self.reason is None:
            self._asked_at = time.monotonic()
        if self.reason is None or reason == "time_limit":  # the last word: SLURM requeues nobody at the time limit
            self.reason = reason

    def __call__(self) -> str | None:
        """Why to stop, or None. Polls the STOP file at most once a second: a shared file system feels every stat."""
        if self._run is not None and time.monotonic() - self._polled_at >= STOP_POLL_S:
            self._polled_at = time.monotonic()
            if self._run.stop_mark() not in ("", self._known_stop):
                self.reason = "STOP"
        return self.reason

    def clear(self, answered: str) -> None:
        """Forget a request that has been answered, unless another has come since."""
        if self.reason == answered:
            self.reason = None


def after_stop(
    stop: StopFlag,
    reason: str,
    env: JobEnvironment,
    broadcast: Callable[[Any], Any],
    alive: Callable[[], None],
    ask: Callable[[], scheduler.Mercy],
) -> int | None:
    """After a save: the exit code to leave with, or None if nobody meant to end this job, which then goes on.

    Called on all ranks. May block until SLURM kills the job. The ranks wait in step, so that none of them takes another
    one's waiting for its death. broadcast: gives rank 0's value to all ranks. alive: called every half second of
    waiting. ask: what SLURM does to jobs that it pre-empts.
    """
    if reason == "STOP":
        return 0
    if not env.is_scheduled or reason in ("time_limit", "interrupted"):
        return EXIT_REQUEUE
    is_main = env.rank == 0
    mercy = broadcast(ask() if is_main else None)
    if not mercy.requeues or mercy.grace_s > REQUEUE_AT_ONCE_ABOVE_S:
        # the batch shell submits a successor, or requeues without wasting the grace period; only while RUNNING
        return EXIT_REQUEUE
    wait_s = mercy.grace_s + mercy.kill_wait_s + MARGIN_S
    if is_main:
        say(f"saved; waiting up to {wait_s} s for SLURM, which requeues a pre-empted job and ends a cancelled one")
    deadline = time.monotonic() + wait_s
    while True:
        time.sleep(0.5)
        alive()
        other, over = broadcast((stop(), time.monotonic() >= deadline))
        if other in ("time_limit", "STOP"):
            return 0 if other == "STOP" else EXIT_REQUEUE
        if over:
            break
    if is_main:
        unknown = "how long SLURM waits before it ends a job could not be asked here"
        say("still alive: " + ("nobody meant to end this job" if mercy.known else unknown) + "; going on")
    return None
