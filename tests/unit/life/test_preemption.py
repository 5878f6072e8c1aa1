"""launch/life/preemption.py: what each signal asks for, how long a saved job waits to be killed, and what it says where
nobody does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm.errors import EXIT_REQUEUE
from ddpm.run.paths import RunDir
from launch.cluster.environment import PROJECT, JobEnvironment
from launch.cluster.scheduler import Mercy
from launch.life import preemption, training
from launch.life.life import Life
from launch.life.preemption import StopFlag, after_stop

ENV = JobEnvironment("slurm", "17", 0, "n1", 0, 1, 0, "n1", 0, 1, None, "2026-11-27T09:00:00.000Z")
HERE = JobEnvironment("local", "local-1", 0, "n1", 0, 1, 0, "n1", 0, 1, None, "2026-11-27T09:00:00.000Z")


@pytest.mark.parametrize(("mercy", "waits", "code", "told"), [
    (Mercy(True, 20, 5), 55, None, "nobody meant to end this job"),
    (Mercy(True, 60, 30), 120, None, "nobody meant to end this job"),
    (Mercy(True, 61, 30), 0, EXIT_REQUEUE, ""),  # the batch shell has it put back at once
    (Mercy(False, 0, 30), 0, EXIT_REQUEUE, ""),  # and a successor goes on
    (Mercy(True, 0, 30, known=False), 60, None, "how long SLURM waits before it ends a job could not be asked here"),
])  # fmt: skip
def test_a_grace_period_that_is_longer_than_the_wait_or_not_known_is_not_taken_for_nobodys_wish(
    monkeypatch: pytest.MonkeyPatch, mercy: Mercy, waits: int, code: int | None, told: str
) -> None:
    now, said = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preemption.time, "sleep", sleep)
    monkeypatch.setattr(preemption, "say", said.append)
    left = after_stop(StopFlag(), "preempted", ENV, lambda word: word, lambda: None, lambda: mercy)
    assert left == code and now[0] == pytest.approx(waits, abs=1)
    assert [line for line in said if "alive" in line] == ([f"still alive: {told}; going on"] if told else [])


@pytest.mark.parametrize(("env", "reason", "code"), [
    (ENV, "STOP", 0), (HERE, "STOP", 0), (ENV, "time_limit", EXIT_REQUEUE), (HERE, "interrupted", EXIT_REQUEUE),
    (ENV, "interrupted", EXIT_REQUEUE),
])  # fmt: skip
def test_what_is_no_pre_emption_ends_the_job_at_once_and_asks_nobody(
    env: JobEnvironment, reason: str, code: int
) -> None:
    def asked() -> Mercy:
        raise AssertionError("SLURM was asked")

    assert after_stop(StopFlag(), reason, env, lambda word: word, lambda: None, asked) == code


@pytest.mark.parametrize(("later", "code"), [("time_limit", EXIT_REQUEUE), ("STOP", 0)])
def test_a_job_that_waits_to_be_killed_heeds_a_later_word(
    monkeypatch: pytest.MonkeyPatch, later: str, code: int
) -> None:
    stop, alive = StopFlag(), []
    monkeypatch.setattr(preemption.time, "sleep", lambda seconds: alive and setattr(stop, "reason", later))
    monkeypatch.setattr(preemption.time, "monotonic", lambda: 0.0)
    stop.reason = "preempted"
    left = after_stop(stop, "preempted", ENV, lambda word: word, lambda: alive.append(1), lambda: Mercy(True, 9, 9))
    assert left == code and len(alive) == 2


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], StopFlag]]:
    """A flag whose handlers are installed, in a job of SLURM's or not."""
    signals = (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def make(scheduled: bool) -> StopFlag:
        monkeypatch.setattr(preemption.environment, "is_scheduled", lambda: scheduled)
        stop = StopFlag()
        stop.install()
        return stop

    yield make
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize(("scheduled", "numbers", "reason"), [
    (True, [signal.SIGCONT], None),
    (True, [signal.SIGTERM], "preempted"),
    (True, [signal.SIGTERM, signal.SIGTERM], "preempted"),  # as many as SLURM likes to send
    (True, [signal.SIGUSR2, signal.SIGTERM], "time_limit"),
    (True, [signal.SIGTERM, signal.SIGUSR2], "time_limit"),  # SLURM requeues nobody at the time limit
    (True, [signal.SIGINT], "interrupted"),  # by hand, in an allocation
    (True, [signal.SIGHUP], "interrupted"),
    (False, [signal.SIGTERM], "interrupted"),
    (False, [signal.SIGINT], "interrupted"),
    (False, [signal.SIGHUP, signal.SIGHUP], "interrupted"),  # by a terminal that closes
])  # fmt: skip
def test_a_signal_is_why_a_job_stops(
    flag: Callable[[bool], StopFlag], scheduled: bool, numbers: list[signal.Signals], reason: str | None
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, preemption.STOP_SIGNALS)  # as slurm/rank.sh starts a rank
    stop = flag(scheduled)
    for number in numbers:
        signal.raise_signal(number)
    assert stop() == reason


def test_a_job_here_under_nohup_outlives_its_terminal(flag: Callable[[bool], StopFlag]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = flag(False)
    signal.raise_signal(signal.SIGHUP)
    assert stop() is None


@pytest.mark.parametrize(("scheduled", "first"), [
    (False, signal.SIGINT), (False, signal.SIGTERM), (False, signal.SIGHUP), (True, signal.SIGTERM),
])  # fmt: skip
def test_a_job_that_is_asked_twice_leaves_at_once_but_what_comes_together_is_one_wish(
    flag: Callable[[bool], StopFlag], monkeypatch: pytest.MonkeyPatch, scheduled: bool, first: signal.Signals
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    flag(scheduled)
    for number in (first, signal.SIGTERM, signal.SIGINT):  # of a shutdown, of the terminal, of who has started it
        signal.raise_signal(number)
    assert left == []
    later = time.monotonic() + preemption.TWICE_S
    monkeypatch.setattr(preemption.time, "monotonic", lambda: later)
    signal.raise_signal(signal.SIGINT)
    assert left == [130]


def test_a_closing_terminal_and_a_shutdown_are_one_wish_too(
    flag: Callable[[bool], StopFlag], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = flag(False)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.raise_signal(number)
    assert stop() == "interrupted" and left == []
    later = time.monotonic() + preemption.TWICE_S
    monkeypatch.setattr(preemption.time, "monotonic", lambda: later)
    signal.raise_signal(signal.SIGTERM)
    assert left == [143]


def test_a_signal_that_comes_while_a_compiler_works_is_heeded_and_does_not_end_the_compiler(
    flag: Callable[[bool], StopFlag],
) -> None:
    stop = flag(True)
    with stop.held():
        signal.raise_signal(signal.SIGTERM)  # to this thread: to the process, another thread of torch's may take it
        compiler = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('compiled')"
        done = subprocess.run([sys.executable, "-c", compiler], capture_output=True, text=True, cwd=PROJECT)
        assert done.stdout == "compiled\n"
    assert stop() == "preempted"


def test_a_stop_file_is_looked_for_once_a_second_and_one_that_was_known_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, marks, looked = [100.0], ["1"], []
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(RunDir, "stop_mark", lambda run: looked.append(now[0]) or marks[0])
    stop = StopFlag()
    stop.watch(RunDir(tmp_path), known_stop="1")
    for now[0] in (100.0, 100.4, 100.8, 101.2):
        assert stop() is None
    assert looked == [100.0, 101.2]
    marks[0] = "2"
    now[0] = 103.0
    assert stop() == "STOP"


def test_a_request_that_was_answered_is_forgotten_and_another_that_came_since_is_not() -> None:
    stop = StopFlag()
    for reason, left in (("preempted", None), ("time_limit", "time_limit")):
        stop.reason = reason
        stop.clear("preempted")
        assert stop() == left


def test_how_long_a_stop_may_try_to_save_hangs_on_no_file_of_the_run(tmp_path: Path) -> None:
    """Its disk may be the reason why it tries again."""
    env = JobEnvironment("local", "1", 0, "n1", 0, 1, 0, "", 0, 1, None, "")
    life = Life(RunDir(tmp_path / "away"), StopFlag(), env)
    assert training.save_patience_s(life, "time_limit", 40.0) == 20.0
    assert training.save_patience_s(life, "preempted", 600.0) >= 10
