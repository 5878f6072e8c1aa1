"""Every path of a run, and the only ways to write one: whole or not at all.

A run is one directory, the only thing that jobs, scripts and people share. Nothing final is written in place:
a temporary in the same directory, fsync, rename without replacing, fsync of the directory. A kill at any line leaves
either the old state or the new one, plus at most a stale temporary that begins with ".tmp-".
No torch here: `status` and `--dry-run` read runs on a login node.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from ddpm.errors import RequestError

SCHEMA = 1
NAME_RE = re.compile(r"[A-Za-z0-9._-]{1,100}")
TMP_PREFIX = ".tmp-"


class DamagedFile(Exception):
    """A file whose digest, size or form is not what was published."""


def check_name(name: str, what: str = "run name") -> str:
    """Return `name`, or raise RequestError: names become directories, job names and log lines."""
    if not isinstance(name, str) or not NAME_RE.fullmatch(name) or name.startswith("."):
        raise RequestError(
            f"{what} {name!r} is not allowed: use 1 to 100 of A-Z a-z 0-9 . _ - and do not begin with a dot"
        )
    return name


def stamp(at: datetime) -> str:
    """A time as 2026-11-20T09:00:00.000Z; one without a zone is this machine's."""
    return at.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now() -> str:
    return stamp(datetime.now(timezone.utc))


# ---------------------------------------------------------------- digests


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value that digests are taken of: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sign(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with `self_sha256`, the digest of everything else in it: a flipped bit in a manifest is noticed too."""
    body = {k: v for k, v in record.items() if k != "self_sha256"}
    return {**body, "self_sha256": sha256_json(body)}


def read_signed(path: Path) -> dict[str, Any]:
    """A signed JSON file. Raises DamagedFile with the reason, FileNotFoundError where there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as e:
        raise DamagedFile(f"{path.name}: not JSON ({e})") from None
    if not isinstance(record, dict) or record.get("self_sha256") != sign(record)["self_sha256"]:
        raise DamagedFile(f"{path.name}: its self_sha256 does not match its content")
    return record


# ---------------------------------------------------------------- writing


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` durable: without it a power cut can forget the name of a file that was synced."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class HashingFile:
    """A file that takes sha256 and size of what passes through it: one pass over a checkpoint, not two."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self._digest = hashlib.sha256()
        self.size = 0
        self.failed: OSError | None = None
        """Why a write failed: torch.save turns it into a RuntimeError that no longer says "disk full"."""

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.size += len(memoryview(data).cast("B"))
        try:
            self.raw.write(data)
        except OSError as e:
            self.failed = e
            raise
        return len(data)

    def flush(self) -> None:
        self.raw.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def publishing(
    path: Path, *, token: str = "", replace: bool = False, may_publish: Callable[[], None] | None = None
) -> Iterator[HashingFile]:
    """Write `path` whole or not at all.

    token: names the writer in the temporary (a run's fencing token).
    replace: only for the few files that change (run.json, heartbeat.json, metrics.jsonl); otherwise an existing `path`
    raises FileExistsError and stays as it is.
    may_publish: called last before the name appears, with everything durable; it raises to withhold publication.
    """
    tmp = path.with_name(f"{TMP_PREFIX}{path.name}.{token or 'x'}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with tmp.open("wb") as raw:
            out = HashingFile(raw)
            yield out
            raw.flush()
            os.fsync(raw.fileno())
        if may_publish is not None:
            may_publish()
        if replace:
            tmp.replace(path)
        else:
            rename_new(tmp, path)
        fsync_dir(path.parent)
    finally:
        tmp.unlink(missing_ok=True)  # gone already after a rename; stale after a failure


def rename_new(tmp: Path, path: Path) -> None:
    """rename(2) that refuses to replace: a hard link is atomic and fails where the name exists, on NFS too."""
    try:
        os.link(tmp, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the fencing token still keeps writers apart
        if path.exists():
            raise FileExistsError(path) from None
        tmp.rename(path)
        return
    tmp.unlink()


def write_bytes(path: Path, data: bytes, **publish: Any) -> None:
    """`data` as `path`, whole or not at all; keywords as for `publishing`."""
    with publishing(path, **publish) as f:
        f.write(data)


def write_json(path: Path, value: Any, **publish: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n", **publish)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is missing or no JSON (a status view must not die of it)."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# ---------------------------------------------------------------- paths


def _listed(directory: Path) -> list[Path]:
    """What lies in a directory, nothing where there is none. Unlike glob it raises OSError where it cannot look."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


@dataclass(frozen=True)
class SampleSet:
    """Paths of samples/SET: the request, the shards and their features."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def request(self) -> Path:
        return self.path / "request.json"

    @property
    def part(self) -> Path:
        """Finished batches of unfinished shards."""
        return self.path / "part"

    def shard(self, index: int, count: int) -> Path:
        return self.path / f"shard-{index:05d}-of-{count:05d}.npz"

    def shard_manifest(self, index: int, count: int) -> Path:
        return self.shard(index, count).with_suffix(".json")

    def features(self, extractor: str, index: int, count: int) -> Path:
        return self.path / f"features-{extractor}-{index:05d}-of-{count:05d}.npy"

    def features_manifest(self, extractor: str, index: int, count: int) -> Path:
        return self.features(extractor, index, count).with_suffix(".json")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. The layout is public: users script against it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def fence(self) -> Path:
        return self.path / "fence"

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def grids(self) -> Path:
        return self.path / "grids"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:09d}.pt"

    def manifest(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:09d}.json"

    def ema_weights(self, step: int) -> Path:
        return self.checkpoints / f"ema-{step:09d}.safetensors"

    def grid(self, step: int) -> Path:
        return self.grids / f"step-{step:09d}.png"

    def exit_marker(self, job: str, restart: int) -> Path:
        """The job's own exit code, past srun, which may report another rank's."""
        return self.logs / f".exit-{job}.{restart}"

    def sample_set(self, name: str) -> SampleSet:
        return SampleSet(self.samples / name)

    def sample_sets(self) -> list[SampleSet]:
        return [SampleSet(p) for p in sorted(_listed(self.samples)) if p.is_dir() and not p.name.startswith(".")]

    def steps_saved(self) -> list[int]:
        """Steps whose manifest exists, newest first: what a save has acknowledged (their content is not verified)."""
        found = (re.fullmatch(r"step-(\d{9,})\.json", p.name) for p in _listed(self.checkpoints))
        return sorted((int(m.group(1)) for m in found if m), reverse=True)

    def latest_step(self) -> int:
        """The newest saved step, 0 where there is none: what progress means to the restart policy."""
        return next(iter(self.steps_saved()), 0)


# ---------------------------------------------------------------- life events


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
                beat = read_json(self._run.heartbeat) or {}
                sign = {k: beat[k] for k in ("job", "restart", "time", "step") if k in beat}
                record.update(since=self._since, last_sign=sign or None)
            line = json.dumps(record).encode() + b"\n"
            if f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n":
                line = b"\n" + line  # the last writer was killed inside its line
            f.write(line)
            f.flush()
            os.fsync(f.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; a torn last line (killed while appending) is left out."""
    try:
        return parse_jsonl(path.read_bytes())
    except FileNotFoundError:
        return []


def parse_jsonl(data: bytes) -> list[dict[str, Any]]:
    records = []
    for line in data.decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_events(run: RunDir) -> list[dict[str, Any]]:
    """Every life event of a run, in order of time. Raises OSError where it cannot look."""
    events = [e for p in sorted(_listed(run.events)) if p.suffix == ".jsonl" for e in read_jsonl(p)]
    return sorted(events, key=lambda e: str(e.get("time", "")))
