"""launch/life/preemption.py: how long a saved job waits to be killed, and what it says where nobody does it."""

from __future__ import annotations

import pytest

from ddpm.errors import EXIT_REQUEUE
from launch.cluster.environment import JobEnvironment
from launch.cluster.scheduler import Mercy
from launch.life import preemption
from launch.life.preemption import StopFlag, after_stop


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
    env = JobEnvironment("slurm", "17", 0, "n1", 0, 1, 0, "n1", 0, 1, None, "2026-11-27T09:00:00.000Z")
    left = after_stop(StopFlag(), "preempted", env, lambda word: word, lambda: None, lambda: mercy)
    assert left == code and now[0] == pytest.approx(waits, abs=1)
    assert [line for line in said if "alive" in line] == ([f"still alive: {told}; going on"] if told else [])
