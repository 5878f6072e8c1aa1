"""Files that appear whole or not at all, their digests, and the one byte form of what is kept.

Nothing final is written in place: a temporary in the same directory, fsync, rename without replacing, fsync of the
directory. A kill at any line leaves either the old state or the new one, plus at most a stale temporary that begins
with ".tmp-". Must not know: which files a run has.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")
TMP_PREFIX = ".tmp-"
SETTLED_S = 2.0
"""A file that was changed less than this before may change again without showing it: file times are coarse."""
RECORD_BYTES = 8 << 20
"""Largest JSON record, or line of JSON, that is read: thousands of times the size of ours."""
LINES_BYTES = 1 << 30
"""Largest file of JSON lines that is read: metrics of millions of logged steps."""
STALE_TRIES = 10
"""How often a file is opened again after another host has replaced it under its reader."""
PASSING = frozenset((
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EREMOTEIO))  # fmt: skip
"""Errors of a file system that may pass in a moment, and do not mean that a file is damaged."""
FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
"""Errors of a file system, or a user's part of it, that has no room for bytes or for files."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of what Git LFS leaves in a large file's place."""
ARRAYS_BYTES = 32 << 30
"""Largest file of a shard's images or features that is read: 160,000 images of 256x256."""


class DamagedFile(Exception):
    """A file whose digest, size or form is not what was published."""


def stamp(at: datetime) -> str:
    """A time as 2026-11-20T09:00:00.000Z; one without a zone is this machine's."""
    return at.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now() -> str:
    return stamp(datetime.now(timezone.utc))


def seconds(stamp: str) -> float:
    """Unix time of a `stamp`. Raises ValueError, OverflowError or OSError for anything else."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


# ---------------------------------------------------------------- digests


def canonical_json(value: Any) -> bytes:
    """The bytes of a JSON value of which digests are taken: sorted keys, no spaces. Raises DamagedFile if it is nested
    too deep."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except RecursionError:
        raise DamagedFile("nested too deep") from None


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, in hex. Raises OSError, and DamagedFile as `open_file`."""
    digest = hashlib.sha256()
    with open_file(path) as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def marks(stat: os.stat_result) -> list[int]:
    """Device, inode, size and times of a file: if it is replaced or written to, one of them changes."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def settled_marks(*paths: Path) -> tuple[int, ...]:
    """The `marks` of all these files: what was read from them may be kept as long as these stay. () if one is missing,
    or was changed within SETTLED_S: then nothing may be kept."""
    found: list[int] = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            return ()
        if time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED_S:
            return ()
        found += marks(stat)
    return tuple(found)


def sign(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with `self_sha256`, the digest of everything else in it, which shows a flipped bit."""
    body = {k: v for k, v in record.items() if k != "self_sha256"}
    return {**body, "self_sha256": sha256_json(body)}


def read_signed(path: Path) -> dict[str, Any]:
    """A signed JSON file. Raises DamagedFile with the reason, FileNotFoundError where there is none."""
    try:
        record = parse_json(read_bytes(path))
    except ValueError as e:
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
    """A file that computes sha256 and size of what is written to it: one pass over a checkpoint instead of two."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self._digest = hashlib.sha256()
        self.size = 0
        self.failed: Exception | None = None
        """Why a write failed: torch.save turns it into a RuntimeError that no longer says "disk full"."""

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.size += len(memoryview(data).cast("B"))
        try:
            self.raw.write(data)
        except Exception as e:
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
    path: Path,
    *,
    token: str = "",
    replace: bool = False,
    may_publish: Callable[[], None] | None = None,
    mode: int = 0o666,
) -> Iterator[HashingFile]:
    """Write `path` whole or not at all.

    token: names the writer in the temporary (a run's fencing token).
    replace: only for the few files that change (run.json, heartbeat.json, metrics.jsonl); otherwise an existing `path`
    raises FileExistsError and stays as it is.
    may_publish: called last before the name appears, with everything durable; it raises to withhold publication.
    mode: who may read and write it, from the first byte on, less what the umask takes.
    """
    tmp = path.with_name(f"{TMP_PREFIX}{path.name}.{token or 'x'}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _opened(tmp, may_publish, mode) as raw:
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
    except OSError as e:
        e.filename = e.filename or str(path)  # the error of a full disk names no file
        raise
    finally:
        tmp.unlink(missing_ok=True)  # gone already after a rename; stale after a failure


def _opened(tmp: Path, may_publish: Callable[[], None] | None, mode: int) -> BinaryIO:
    try:
        return open(tmp, "wb", opener=lambda path, flags: os.open(path, flags, mode))
    except FileNotFoundError:
        if may_publish is not None:
            may_publish()  # it can tell what has become of the directory
        raise


def _is_linked(tmp: Path, path: Path) -> bool:
    """Whether the link from `path` to `tmp` was made, though making it failed: an NFS server that is asked twice,
    because its answer got lost, says that the name exists (link(2), BUGS)."""
    with suppress(FileNotFoundError):
        return os.path.samestat(tmp.lstat(), path.lstat())
    return False


def rename_new(tmp: Path, path: Path) -> None:
    """Rename without replacing: a hard link is atomic and fails if the name exists, on NFS too."""
    try:
        os.link(tmp, path)
    except FileExistsError:
        if not _is_linked(tmp, path):
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


@contextmanager
def publishing_folder(path: Path) -> Iterator[Path]:
    """Within: a new folder to be filled, which at the end is `path`, whole or not at all."""
    tmp = path.with_name(f"{TMP_PREFIX}{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        tmp.mkdir(parents=True)
        yield tmp
        tmp.rename(path)
        fsync_dir(path.parent)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk does not say where
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# ---------------------------------------------------------------- reading
def link_to_nothing(path: Path) -> str:
    """For a message: that `path` is a link whose target does not exist; "" if it is not one."""
    try:
        return f"a link to {path.readlink()}, where nothing is" if path.is_symlink() and not path.exists() else ""
    except OSError:
        return ""


class _Named(io.FileIO):
    """A file whose read errors name it, as errors of opening do: those of read(2) name none."""

    def readinto(self, buffer: Any) -> int | None:
        return self._named(lambda: super(_Named, self).readinto(buffer))

    def readall(self) -> bytes:
        return self._named(super().readall)

    def _named(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except OSError as e:
            e.filename = self.name
            raise


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, without ever waiting for a writer. Raises OSError; DamagedFile if it is a FIFO, a socket
    or a device, or what Git LFS leaves in a file's place."""
    try:
        file = io.BufferedReader(_Named(os.fspath(path), opener=_open_at_once))
    except OSError as e:
        if e.errno == errno.ENXIO:  # the error of a socket, and of a device that is not there
            raise DamagedFile(f"{path.name}: a socket or a device, and no file") from None
        raise
    try:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise DamagedFile(f"{path.name}: a {'FIFO' if stat.S_ISFIFO(mode) else 'device'}, and no file")
        os.set_blocking(file.fileno(), True)  # a file system that fetches from tape may else say "try again"
        if file.peek().startswith(POINTER):
            raise DamagedFile(f"{path.name}: a pointer of Git LFS, not the file itself, which git lfs pull brings")
    except BaseException:
        file.close()
        raise
    return file


def look_anew(directory: Path) -> None:
    """Have the names in a directory looked up anew. On NFS a host remembers for a minute which file had a name, or that
    none had, unless it opens the directory."""
    os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))


def read_bytes(path: Path, at_most: int = RECORD_BYTES) -> bytes:
    """The content of a file. Raises OSError; DamagedFile if it is no regular file or larger than `at_most` bytes, so
    that whatever lies in a file's place makes no reader wait for ever or use up all memory."""
    for _ in range(STALE_TRIES):
        try:
            return _read_bytes(path, at_most)
        except OSError as e:
            if e.errno != errno.ESTALE:
                raise
        look_anew(path.parent)  # another host has replaced it
    return _read_bytes(path, at_most)


def _read_bytes(path: Path, at_most: int) -> bytes:
    with open_file(path) as f:
        pieces, size, too_large = [], 0, os.fstat(f.fileno()).st_size > at_most
        while not too_large and (piece := f.read(1 << 20)):
            pieces.append(piece)
            size += len(piece)
            too_large = size > at_most  # the file grows, or its size was not told
    if too_large:
        raise DamagedFile(f"{path.name}: more than {at_most:,} bytes, which none of its kind has")
    return b"".join(pieces)


def parse_json(data: bytes) -> Any:
    """Raises ValueError for anything but JSON, also if it is too long or nested too deep."""
    if len(data) > RECORD_BYTES:
        raise ValueError(f"more than {RECORD_BYTES:,} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file is missing or damaged (a status view must not fail for that)."""
    try:
        value = parse_json(read_bytes(path))
    except (OSError, ValueError, DamagedFile):
        return None
    return value if isinstance(value, dict) else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a JSONL file; lines that are none, such as a torn last one, are left out."""
    records = []
    for line in read_bytes(path, LINES_BYTES).split(b"\n") if path.exists() else []:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
