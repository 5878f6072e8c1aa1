"""Compiled code: kept from life to life as one file of the run, and brought to each node's own disk.

Each rank compiles in a folder of its own on the node's disk, into which it first unpacks the run's file. Once all ranks
have compiled, rank 0 writes the run's file anew from the folders of its node, whole or not at all, with a digest in its
first line. So nothing from a life that died while compiling is ever used, and code that is damaged or for another kind
of node is compiled anew. Loads no torch: the folder must be chosen before torch is loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import platform
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ddpm.run.files import DamagedFile, canonical_json, open_file, parse_json, sha256_json, sign, write_bytes
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from launch.cluster import environment

if TYPE_CHECKING:
    from ddpm.training.ranks import World

PREFIX = "ddpm-hpc-compiled-"
ELSEWHERE = ("/var/tmp", "/dev/shm")
"""Where a node may take code that is loaded, if its folder for temporary files does not."""
HEADER_BYTES = 1 << 12
MOST_BYTES = 4 << 30
_LOCK = ".lock"
_held: list[tuple[Path, BinaryIO]] = []
"""This process's folder, and a lock that shows other processes that it is alive."""


def choose_folder() -> None:
    """Make the compiler use a new folder on this node, unless the user has chosen one."""
    if _held or environment.compiler_folder() is not None:
        return
    try:
        where = _place()
        _remove_left(where)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
        lock = (folder / f"new{_LOCK}").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(folder / _LOCK)  # not before: whoever starts beside this would take it for a dead one's
    except OSError as e:  # torch chooses then
        say("no folder for compiled code on this node", error=e)
        return
    _held.append((folder, lock))
    environment.set_defaults(TORCHINDUCTOR_CACHE_DIR=str(folder), TRITON_CACHE_DIR=str(folder / "triton"))


def _place() -> Path:
    """The node's folder for temporary files; another one with room where code cannot be loaded from that, or where it
    is the working directory, which Python takes where no other has room: there lies the run's code."""
    usual = Path(tempfile.gettempdir())
    return next((p for p in (usual, *map(Path, ELSEWHERE)) if p != Path.cwd() and _takes_code(p)), usual)


def _takes_code(place: Path) -> bool:
    if not os.access(place, os.W_OK):
        return False
    disk = os.statvfs(place)
    return not disk.f_flag & os.ST_NOEXEC and (disk.f_bavail > 0 or disk.f_blocks == 0)  # no blocks: no limit


def leave() -> None:
    """Remove this process's folder."""
    while _held:
        folder, lock = _held.pop()
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_left(where: Path) -> None:
    """Remove folders that killed lives have left."""
    for lock in where.glob(f"{PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused where its process lives
            shutil.rmtree(lock.parent)


@contextmanager
def compiling(
    run: RunDir, kind: str, *, world: World, may_publish: Callable[[], None] | None, anew: Callable[[bool], bool | None]
) -> Iterator[None]:
    """Within: the network or its kernels are compiled, or loaded from the run's file. Called on all ranks.

    kind: the kind of node and torch that compiled code is for. may_publish: rank 0's check that the run is still its
    own; None on other ranks. anew: called afterwards, with whether new kernels appeared; returns whether something was
    compiled, or None if the work was not done.
    """
    folder, began = _held[0][0] if _held else None, time.monotonic()
    why = _bring(run.compiled, folder, kind) if folder is not None else "in a folder of the user's"
    had = _num_kernels(folder)
    yield
    # each of a node's GPUs may have code of its own
    told = world.all_of((environment.host(), folder, anew(_num_kernels(folder) > had)))
    if may_publish is None or told[0][2] is None:
        return
    took = f"{time.monotonic() - began:.0f} s"
    if not any(was_compiled for _, _, was_compiled in told):
        say(f"compiled code: from the run's file, {took}")
        return
    say(f"compiled code: compiled anew, {took}" + (f" ({why})" if why else ""))
    if folder is None:
        return
    try:
        here = [other for host, other, _ in told if host == told[0][0] and other is not None]
        write_bytes(run.compiled, pack(here, kind), replace=True, may_publish=may_publish)
    except OSError as e:  # a full disk ends no training
        say("compiled code is not kept", error=e)


def _num_kernels(folder: Path | None) -> int:
    """The number of kernels in a folder, for NVIDIA's GPUs and for AMD's."""
    return 0 if folder is None else sum(path.suffix in (".cubin", ".hsaco") for path in folder.rglob("*"))


def pack(folders: list[Path], kind: str) -> bytes:
    """The content of the run's file: one line with the digest of the rest, and a zip archive of all folders' files. The
    compiler names files by their content, so equal names are equal files."""
    out, files = io.BytesIO(), dict[str, Path]()
    for folder in folders:
        files |= {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in sorted(files):
            if files[name].suffix != ".lock" and files[name].name != _LOCK:
                archive.writestr(name, files[name].read_bytes())
    body = out.getvalue()
    return canonical_json(sign({"kind": kind, "sha256": hashlib.sha256(body).hexdigest()})) + b"\n" + body


def unpack(file: Path, folder: Path, kind: str) -> None:
    """Unpack the output of `pack` into `folder`. Raises DamagedFile with the reason, OSError."""
    with open_file(file) as f:
        if os.fstat(f.fileno()).st_size > MOST_BYTES:
            raise DamagedFile(f"{file.name}: larger than any of its kind")
        header, body = f.readline(HEADER_BYTES), f.read()
    try:
        record: Any = parse_json(header)
        if record["self_sha256"] != sign(record)["self_sha256"] or record["sha256"] != hashlib.sha256(body).hexdigest():
            raise ValueError("other bytes than its digest is of")
        if record["kind"] != kind:
            raise DamagedFile("the run's file is of another kind of node, or of another torch")
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            archive.extractall(folder)
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        raise DamagedFile(f"{file.name} is damaged: {e}") from None


def _bring(file: Path, folder: Path, kind: str) -> str:
    """Unpack the run's file into the folder; returns why that failed, or ""."""
    try:
        unpack(file, folder, kind)
    except FileNotFoundError:
        return ""
    except (DamagedFile, OSError) as e:
        return str(e)
    return ""


def this_cpu() -> str:
    """What identifies this kind of CPU for compiled code: its feature flags."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sha256_json(sorted(line.partition(":")[2].split()))
    return platform.machine()
