"""Parts that several processes make: each by one of them, and by another where that one dies."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import Stopped
from ddpm.run import claims
from ddpm.run.claims import OthersAtWork, Worker, work_through


def _hold(directory: Path, ready: Any) -> None:
    def never(part: int) -> None:
        ready.set()
        time.sleep(60)

    work_through(directory, [1], lambda part: False, never)


def test_a_part_whose_maker_is_killed_is_made_by_who_waits_for_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(30)
    made: list[int] = []

    def work(worker: Worker) -> None:
        work_through(tmp_path, range(3), lambda part: part in made, made.append, worker)

    with pytest.raises(OthersAtWork):
        work(Worker(stay=False))
    assert made == [0, 2]
    with pytest.raises(Stopped, match="time_limit"):
        work(Worker(lambda: "time_limit"))

    def asked() -> None:
        other.kill()

    work(Worker(asked))
    other.join()
    assert made == [0, 2, 1]


def test_without_locks_all_parts_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuses)
    made: list[int] = []
    work_through(tmp_path, range(3), lambda part: part in made, made.append)
    assert made == [0, 1, 2] and (tmp_path / claims.NAME).exists()
