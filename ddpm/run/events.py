"""A run's life in events/JOB.RESTART.jsonl: the restart policy and goodput are computed from these lines."""

from __future__ import annotations

import json
import os
from typing import Any

from ddpm.run.files import now
from ddpm.run.paths import RunDir, listed
from ddpm.run.records import SIGN, Record, parse_events, read_heartbeat


class EventLog:
    """Appends to events/JOB.RESTART.jsonl. One file per writer: appends from many hosts lose lines on NFS.

    since: when this life got its nodes. The first line of a life says it, and the last sign (`last_sign`) of the life
    before it, whose heartbeat is about to be overwritten.
    """

    def __init__(
        self, run: RunDir, job: str, restart: int, host: str, *, prefix: str = "", since: str | None = None
    ) -> None:
        self.path = run.events / f"{prefix}{job}.{restart}.jsonl"
        self._base = {"job": job, "restart": restart, "host": host}
        self._run, self._since = run, since

    def append(self, event: str, **fields: Any) -> None:
        """Append one line and make it durable: the restart policy and goodput are computed from these."""
        record = {"event": event, "time": now(), **self._base, **fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as f:
            if f.tell() == 0 and self._since:
                beat = read_heartbeat(self._run)
                sign = {k: beat[k] for k in (*SIGN, "step") if k in beat}
                record.update(since=self._since, last_sign=sign or None)
            line = json.dumps(record).encode() + b"\n"
            if f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n":
                line = b"\n" + line  # the last writer was killed inside its line
            f.write(line)
            f.flush()
            os.fsync(f.fileno())


def read_events(run: RunDir) -> list[Record]:
    """Every life event of a run that can be read, in order of time. Raises OSError where it cannot look."""
    return read_events_and_damage(run)[0]


def read_events_and_damage(run: RunDir) -> tuple[list[Record], list[str]]:
    """Every life event of a run, in order of time; and what of events/ cannot be read, a line for each file.

    Raises OSError where it cannot look.
    """
    files: list[list[Record]] = []
    damage = []
    for path in sorted(p for p in listed(run.events) if p.suffix == ".jsonl"):
        name = f"events/{path.name}"
        try:
            found, wrong = parse_events(path.read_bytes(), name)
        except FileNotFoundError:
            continue
        except (IsADirectoryError, PermissionError) as e:  # it stays so; anything else may be over in a moment
            found, wrong = [], f"{name} cannot be read ({e.strerror})"
        files.append(found)
        damage += [wrong] if wrong else []
    return sorted((e for found in files for e in found), key=lambda e: str(e["time"])), damage
