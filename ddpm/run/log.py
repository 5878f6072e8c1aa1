"""The one voice of everything that runs: a line with its time, for a job's log or a terminal."""

from __future__ import annotations

import contextlib

from ddpm.run.files import now


def say(message: str = "", **fields: object) -> None:
    """One log line: `2026-11-20T09:00:00.000Z message key=value …`."""
    with contextlib.suppress(OSError):  # a full disk ends no training, and the job's log may lie on it
        print(now(), *([message] if message else []), *(f"{k}={v}" for k, v in fields.items()), flush=True)
