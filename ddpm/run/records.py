"""Reads events/, metrics.jsonl, heartbeat.json and run.json; damaged values and records are left out, and named.

Jobs die while they write these files, disks err, and people edit them. Callers need not guard against that: a record
from here has every required key with a value of its type, and optional keys only with good values. Must not know what a
record is for.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, pairwise

from ddpm.run.files import (
    LINES_BYTES,
    DamagedFile,
    link_to_nothing,
    open_file,
    parse_json,
    read_bytes,
    settled_marks,
    sign,
)
from ddpm.run.forms import BEAT, BEAT_TOO, EVENT, EVENT_TOO, METRICS, METRICS_TOO, RUN_TOO, Form, Record, checked
from ddpm.run.paths import RunDir

SKIMMED_BYTES = 4096
"""Read from the end of a long metrics.jsonl: some twenty lines."""
THINNED_LINES = 40_000
"""Lines that are kept of a long metrics.jsonl: more than a chart shows."""
SHORTEST = 100
"""Bytes of the shortest line."""
BEATS_S = 60.0
"""The heartbeat of a trainer at work is never older than this."""
ALWAYS = (b"NaN", b"Infinity", b'"validation_loss"')
"""Lines with one of these are rare, and none of them is left out."""

# ---------------------------------------------------------------- lines


def parse_lines(data: bytes, name: str, needed: Form, too: Form) -> tuple[list[Record], list[bytes], str]:
    """The records in a JSONL file; the raw lines that are damaged; and what is wrong with the file, or "".

    A torn last line is left out silently: its writer was killed, or is just writing it.
    """
    *lines, last = data.split(b"\n")
    records, lost, told = [], [], []
    for number, line in enumerate([*lines, last], start=1):
        try:
            record, wrong = checked(parse_json(line), needed, too) if line.strip() else (None, "")
        except ValueError:
            record, wrong = None, "" if number > len(lines) else "no JSON"
        if record is not None:
            records.append(record)
        if wrong:
            lost.append(line)
            told.append(f"line {number} of {name} {'cannot be used' if record is None else 'is odd'} ({wrong})")
    more = f", nor {len(told) - 1} more" if told[1:] else ""
    return records, lost, told[0] + more if told else ""


def parse_events(data: bytes, name: str) -> tuple[list[Record], str]:
    """The events in a file of events/, and what is wrong with it, or "".

    Unlike a torn line of metrics, a torn event is reported: it may have said how a life ended.
    """
    records, _, wrong = parse_lines(data, name, EVENT, EVENT_TOO)
    if not wrong and not _is_json(data.rpartition(b"\n")[2] or b"0"):
        wrong = f"{name} ends inside a line: what its life told last is lost"
    return [_by_words(record) for record in records], wrong


def _is_json(data: bytes) -> bool:
    try:
        parse_json(data)
    except ValueError:
        return False
    return True


def _by_words(event: Record) -> Record:
    """The event with job ids as text: old events have numbers."""
    sign = event.get("last_sign")
    ids = {key: str(event[key]) for key in ("job", "successor_of") if event.get(key) is not None}
    return {**event, **ids, **({"last_sign": {**sign, "job": str(sign["job"])}} if sign else {})}


def parse_metrics(data: bytes) -> tuple[list[Record], list[bytes], str]:
    """The records of metrics.jsonl, sorted, one for each step (its last line); the damaged and superseded raw lines;
    and what is wrong with the file, or ""."""
    records, lost, wrong = parse_lines(data, "metrics.jsonl", METRICS, METRICS_TOO)
    if any(a["step"] >= b["step"] for a, b in pairwise(records)):
        last = {record["step"]: record for record in records}
        wrong = wrong or f"metrics.jsonl has lines {'twice' if len(last) < len(records) else 'out of order'}"
        lost += [json.dumps(record).encode() for record in records if record != last[record["step"]]]
        records = [last[step] for step in sorted(last)]
    return records, lost, wrong


def skim_metrics(run: RunDir) -> tuple[list[Record], int, str]:
    """For a view of many runs: the last records of metrics.jsonl, the step of the record before them (0 if they are the
    first), and what is wrong with the file, or "". Of a long file whose beginning and end are in order nothing else is
    read.

    Raises OSError, DamagedFile.
    """
    with open_file(run.metrics) as f:
        size = os.fstat(f.fileno()).st_size
        if 2 * SKIMMED_BYTES < size <= LINES_BYTES:
            head = parse_metrics(f.readline(SKIMMED_BYTES) + f.readline(SKIMMED_BYTES))[0]
            f.seek(size - SKIMMED_BYTES)
            tail, _, wrong = parse_metrics(f.read(SKIMMED_BYTES).partition(b"\n")[2])
            every = head[0]["step"] if len(head) == 2 else 0
            good = bool(tail and not wrong and every and head[1]["step"] == 2 * every and tail[0]["step"] % every == 0)
            if good and size * len(tail) * every < 1.5 * SKIMMED_BYTES * tail[-1]["step"]:  # else lines are twice
                return tail, tail[0]["step"] - every, ""
    records, _, wrong = parse_metrics(read_bytes(run.metrics, LINES_BYTES))
    return records, 0, wrong


def last_validation(metrics: list[Record]) -> float | None:
    """The newest loss on held-out images in these lines; None if they have none."""
    return next((m["validation_loss"] for m in reversed(metrics) if m.get("validation_loss") is not None), None)


def read_metrics(run: RunDir) -> list[Record]:
    """The readable lines of metrics.jsonl, [] if there is none. Raises OSError, DamagedFile."""
    try:
        return parse_metrics(read_bytes(run.metrics, LINES_BYTES))[0]
    except FileNotFoundError:
        return []


def thin_metrics(run: RunDir) -> tuple[list[Record], int]:
    """For charts: of metrics.jsonl each n-th line that can be read, the last ones, and all with ALWAYS; and n, which is
    1 but in a long file. Raises as `read_metrics`.
    """
    try:
        with open_file(run.metrics) as f:
            size = os.fstat(f.fileno()).st_size
            every = max(1, size // THINNED_LINES // max(SHORTEST, len(f.readline(SKIMMED_BYTES))))
            if every == 1 or size > LINES_BYTES:
                return read_metrics(run), 1
            f.seek(0)
            kept, at = [], 0
            for number, line in enumerate(f):
                at += len(line)
                if number % every == 0 or at > size - SKIMMED_BYTES or any(mark in line for mark in ALWAYS):
                    kept.append(line)
    except FileNotFoundError:
        return [], 1
    return parse_metrics(b"".join(kept))[0], every


def missing_lines(
    records: Sequence[Record], every_steps: int, *, begin: int = 0, saved_step: int = 0, logged_step: int = 0
) -> str:
    """For a message: where lines of metrics are missing after step `begin`; "" if none are.

    every_steps: steps between lines by today's config; a larger distance that occurs three times in a row counts as an
    earlier setting. saved_step: of a checkpoint, before which every line must exist. logged_step: the last of those
    lines, if known.
    """
    steps = [begin, *(r["step"] for r in records)]
    distances = groupby(b - a for a, b in pairwise(steps))
    usual = max([every_steps, *(distance for distance, found in distances if len(list(found)) >= 3)])
    gaps = [(a, b) for a, b in pairwise(steps) if b - a > usual]
    if logged_step > steps[-1] or saved_step >= steps[-1] + usual:
        gaps.append((steps[-1], max(logged_step, saved_step)))
    more = f", nor of {len(gaps) - 1} more such gaps" if gaps[1:] else ""
    return f"metrics.jsonl lacks lines of the steps from {gaps[0][0]} to {gaps[0][1]}{more}" if gaps else ""


def parse_heartbeat(data: bytes) -> tuple[Record, str]:
    """The content of a heartbeat, {} if it is damaged; and what is wrong with it, or ""."""
    try:
        record, wrong = checked(parse_json(data), BEAT, BEAT_TOO)
    except ValueError:
        record, wrong = None, "no JSON"
    return record or {}, f"heartbeat.json cannot be used ({wrong})" if wrong else ""


def place_of(run: RunDir) -> int:
    """The run directory's inode, which tells it from its copies: a heartbeat records it. Raises OSError."""
    return run.path.stat().st_ino % 2**63


def read_heartbeat(run: RunDir) -> Record:
    """The content of heartbeat.json, {} if there is no readable one."""
    try:
        return parse_heartbeat(read_bytes(run.heartbeat))[0]
    except (OSError, DamagedFile):
        return {}


def read_run(run: RunDir) -> Record:
    """The content of run.json. Raises DamagedFile if it is missing or not what was written (old ones are not
    signed)."""
    try:
        record, wrong = checked(parse_json(read_bytes(run.run_json)), {}, RUN_TOO)
    except FileNotFoundError:
        why = link_to_nothing(run.run_json) or "missing"
        raise DamagedFile(f"{run.run_json} is {why}: {_restore(run, ', or this is no run directory')}") from None
    except ValueError as e:
        record, wrong = None, f"no JSON: {e}"
    except DamagedFile as e:
        record, wrong = None, str(e)
    if record is None or wrong:
        raise DamagedFile(f"{run.run_json} cannot be used ({wrong}): {_restore(run)}")
    if "self_sha256" in record and sign(record)["self_sha256"] != record["self_sha256"]:
        raise DamagedFile(
            f"{run.run_json} is not as it was written: restore it, or take out its self_sha256 if the change is meant"
        )
    return record


def _restore(run: RunDir, otherwise: str = "") -> str:
    """The end of a message: what can be done about a lost run.json. otherwise: where nothing is saved."""
    with contextlib.suppress(OSError):
        if run.steps_saved():
            otherwise = f", or begin another run with its weights (--from {run.quoted}, with another --name)"
    return f"restore it{otherwise}"


def usable(run: RunDir) -> Record:
    """`read_run`, but {} if run.json is missing or damaged. Raises OSError if the file system fails for a moment."""
    try:
        return read_run(run)
    except (DamagedFile, IsADirectoryError, NotADirectoryError, PermissionError):
        return {}


def identity(run: RunDir) -> dict[str, str]:
    """What tells this run's checkpoints from those of another run of the same config: `run_id`, and `data_digest`, the
    digest of its images; without keys that run.json does not have (old runs), {} if it is damaged."""
    seen = settled_marks(run.run_json)
    return dict(_identity_at(run, seen)) if seen else _identity(run)


@lru_cache(maxsize=8)
def _identity_at(run: RunDir, seen: tuple[int, ...]) -> dict[str, str]:
    """Every set, score and checkpoint asks for it, and run.json may name thousands of classes."""
    return _identity(run)


def _identity(run: RunDir) -> dict[str, str]:
    record = usable(run)
    found = {"run_id": record.get("run_id"), "data_digest": (record.get("data") or {}).get("digest")}
    return {key: value for key, value in found.items() if value}


def lost_signature(record: Record) -> bool:
    """Whether a run.json has lost its signature: it has labels, which are only ever written with a signature."""
    return "labels" in record and "self_sha256" not in record


def has_foreign_weights(record: Record) -> bool:
    """Whether a run.json is of weights that were trained elsewhere, as tools/convert_diffusers.py makes it: there is no
    training to tell of."""
    data = record.get("data")
    return data is not None and data.get("key") is None and data.get("digest") is None


def data_of(run: RunDir) -> Record:
    """`data` of run.json: the run's packed data. For weights that were trained elsewhere it has the cache alone.

    Raises DamagedFile.
    """
    data = read_run(run).get("data")
    if data is None:
        raise DamagedFile(f"{run.run_json} does not say which data the run has: restore it")
    return dict(data)
