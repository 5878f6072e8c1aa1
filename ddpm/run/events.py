"""A run's life in events/JOB.RESTART.jsonl: the restart policy and goodput are computed from these lines."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm.run.files import LINES_BYTES, DamagedFile, now, read_bytes
from ddpm.run.forms import SIGN, Record
from ddpm.run.paths import RunDir, files_of_kind
from ddpm.run.records import parse_events, read_heartbeat


class EventLog:
    """Appends to events/JOB.RESTART.jsonl. One file per writer: appends from many hosts lose lines on NFS.

    cluster: the job's cluster, if it has a name; put before the file's name if another cluster's job has that file.
    since: when this life got its nodes. A life's first line records it, together with the previous life's last
    heartbeat (`last_sign`), which is about to be overwritten.
    """

    def __init__(
        self,
        run: RunDir,
        job: str,
        restart: int,
        host: str,
        *,
        prefix: str = "",
        since: str | None = None,
        cluster: str = "",
    ) -> None:
        self.path = run.events / f"{prefix}{job}.{restart}.jsonl"
        if cluster and _is_of_another(self.path, cluster):
            self.path = self.path.with_name(f"{cluster}-{self.path.name}")
        self._base = {"job": job, "restart": restart, "host": host, **({"cluster": cluster} if cluster else {})}
        self._run, self._since = run, since

    def append(self, event: str, **fields: Any) -> None:
        """Append one line and make it durable. Raises OSError."""
        record = {"event": event, "time": now(), **self._base, **fields}
        self.path.parent.mkdir(exist_ok=True)  # never the run itself, which may have been moved away
        try:
            self._append(record)
        except OSError:
            with contextlib.suppress(OSError):
                if not self.path.stat().st_size:  # a full disk has room for its name alone: it would tell nothing
                    self.path.unlink()
            raise

    def _append(self, record: Record) -> None:
        with self.path.open("ab+") as f:
            if f.tell() == 0 and self._since:
                beat = read_heartbeat(self._run)
                sign = {k: beat[k] for k in (*SIGN, "cluster", "step") if k in beat}
                record.update(since=self._since, last_sign=sign or None)
            line = json.dumps(record).encode() + b"\n"
            if f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n":
                line = b"\n" + line  # the last writer was killed inside its line
            f.write(line)
            f.flush()
            os.fsync(f.fileno())


def _is_of_another(path: Path, cluster: str) -> bool:
    """Whether the file's first line is of another cluster's job."""
    try:
        with path.open("rb") as f:
            first = parse_events(f.readline(LINES_BYTES), path.name)[0]
    except OSError:
        return False
    return bool(first) and first[0].get("cluster", cluster) != cluster


def read_events(run: RunDir) -> list[Record]:
    """Every readable life event of a run, by life and then by time. Raises OSError if events/ cannot be listed."""
    return read_events_and_damage(run)[0]


def read_events_and_damage(run: RunDir) -> tuple[list[Record], list[str]]:
    """Every readable life event of a run, by life and then by time; and a line for each file that is damaged.

    Raises OSError if events/ cannot be listed.
    """
    files: list[list[Record]] = []
    damage = []
    for path in files_of_kind(run.events, ".jsonl"):
        name = f"events/{path.name}"
        try:
            found, wrong = parse_events(read_bytes(path, LINES_BYTES), name)
            if not found and not wrong:
                wrong = f"{name} tells nothing"
        except FileNotFoundError:
            continue
        except (IsADirectoryError, PermissionError) as e:  # these last; any other error may be over in a moment
            found, wrong = [], f"{name} cannot be read ({e.strerror})"
        except DamagedFile as e:
            found, wrong = [], f"{name} cannot be read ({e})"
        files.append(found)
        damage += [wrong] if wrong else []
    return in_order(_without_copies(files)), damage


def _without_copies(files: list[list[Record]]) -> list[list[Record]]:
    """Without files whose every event is in another file: a copy beside the original must not count twice."""
    kept: dict[tuple[str, int, str], list[list[Record]]] = {}  # by the beginning of the file, which no two lives share
    for events in sorted(filter(None, files), key=len, reverse=True):
        alike = kept.setdefault((*life_of(events[0]), events[0]["time"]), [])
        if not any(all(event in other for event in events) for other in alike):
            alike.append(events)
    stays = {id(events) for alike in kept.values() for events in alike}
    return [events for events in files if id(events) in stays]


def in_order(files: list[list[Record]]) -> list[Record]:
    """Merge the events of several files by time, keeping the order within each file.

    Whatever the hosts' clocks say, a life comes after the one that it follows: after lives of its job with a lower
    restart number and after its submission; a successor after the job that it succeeds; a life that trained after the
    life whose heartbeat it found; any other after that heartbeat.
    """
    lives = [_File(events) for events in files if events]
    order = _Order(lives)
    for life in sorted(lives, key=lambda life: life.times[0]):
        life.settle(order)
    placed = [(at, life.depth, e) for life in lives for at, e in zip(life.times, life.events, strict=True)]
    return [e for *_, e in sorted(placed, key=lambda p: p[:2])]


class _File:
    """One file of events/: a life, or the submission of a job. `times`: the times by which its events are sorted."""

    def __init__(self, events: list[Record]) -> None:
        first = events[0]
        self.events, self.depth, self._settled = events, 0, False
        self.key = life_of(first) if first.get("event") != "submitted" else (life_of(first)[0], -1)
        self.times = [e["time"] for e in events]

    def settle(self, order: _Order) -> None:
        """Make `times` increase from event to event, and begin after the files that this one follows."""
        chain: dict[_File, None] = {}
        life: _File | None = self
        while life is not None and life not in chain and not life._settled:
            chain[life] = None
            life = order.former(life)
        for life in reversed(chain):  # no recursion: there may be thousands, and clocks that are years off
            life._settle(order)

    def _settle(self, order: _Order) -> None:
        if self._settled:
            return
        self._settled = True  # before the others: they may follow this one, by damaged words of theirs
        floor = ""
        for before, until in self._follows(order):
            before.settle(order)
            floor, self.depth = max(floor, until or before.times[-1]), max(self.depth, before.depth + 1)
        for i, at in enumerate(self.times):
            self.times[i] = floor = max(floor, at)

    def _follows(self, order: _Order) -> Iterator[tuple[_File, str]]:
        """The files that this one comes right after, each with the time after which it comes; "" stands for the file's
        end."""
        first = self.events[0]
        sign = first.get("last_sign")
        if (former := order.former(self)) is not None:
            yield former, ""
        life = order.of_life.get(life_of(sign)) if sign else None
        if sign and life is not None and life is not self:
            trained = any(e.get("event") in ("started", "resumed") for e in self.events)
            yield life, "" if trained else sign["time"]


class _Order:
    """The files of a run's lives, and which each comes after."""

    def __init__(self, lives: list[_File]) -> None:
        self.of_life = {life.key: life for life in lives}
        self._before: dict[tuple[str, int], _File] = {}
        self._last: dict[str, _File] = {}
        for job, restart in sorted(self.of_life):
            if job in self._last:
                self._before[job, restart] = self._last[job]
            self._last[job] = self.of_life[job, restart]

    def former(self, life: _File) -> _File | None:
        """The life before it of its job; of the first one the last of the job that it succeeds."""
        first = life.events[0]
        succeeds = first.get("successor_of") and life_of({**first, "job": first["successor_of"]})[0]
        before = self._before.get(life.key)
        return self._last.get(succeeds) if before is None and succeeds and succeeds != life.key[0] else before


def life_of(record: Record) -> tuple[str, int]:
    """The life of an event or a heartbeat: its job, with the cluster's name where there is one, and its restart."""
    cluster = record.get("cluster", "")
    return f"{cluster}:{record['job']}" if cluster else str(record["job"]), int(record["restart"])
