"""Faults in file operations: record them, fail one, or die at one.

`Shim` stands between the project's code and the operating system for files under one directory: opening for writing,
write, fsync of a file or directory, link, rename, unlink. It counts and records these operations, and at a chosen one
raises an OSError or kills the process. It patches `os` and `io` in this process, so it sees what Python code does and
not what C++ does: torch.save goes through the project's own Python file object.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Operation:
    """One file operation: kind, path relative to the watched directory, and what it carried."""

    kind: str  # create | write | fsync | fsync_dir | link | rename | unlink
    path: str
    other: str = ""
    data: bytes = b""


@dataclass
class Shim:
    """What to do at which operation; `operations` is what happened."""

    root: Path
    fault_at: int | None = None
    error: int | None = None
    """errno to raise at operation number `fault_at` (0-based); None there means SIGKILL."""
    keep_failing: bool = False
    operations: list[Operation] = field(default_factory=list)

    def note(self, operation: Operation) -> None:
        number = len(self.operations)
        self.operations.append(operation)
        if self.fault_at is None or number < self.fault_at or (number > self.fault_at and not self.keep_failing):
            return
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise OSError(self.error, os.strerror(self.error), operation.path)

    def inside(self, path: Any) -> str | None:
        """`path` relative to the watched directory, None for any other."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        given = Path(os.fsdecode(path))
        full, root = given.parent.resolve() / given.name, self.root.resolve()
        return str(full.relative_to(root)) if full.is_relative_to(root) else None


class _File:
    """A file opened for writing whose writes are noted. Everything else is the real file's."""

    def __init__(self, raw: Any, shim: Shim, path: str) -> None:
        self._raw, self._shim, self._path = raw, shim, path

    def write(self, data: Any) -> Any:
        chunk = data.encode() if isinstance(data, str) else bytes(data)
        self._shim.note(Operation("write", self._path, data=chunk))
        return self._raw.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def __enter__(self) -> _File:
        self._raw.__enter__()
        return self

    def __exit__(self, *exc: Any) -> Any:
        return self._raw.__exit__(*exc)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._raw)


@contextmanager
def shimmed(shim: Shim) -> Iterator[Shim]:
    """Within: file operations under `shim.root` go through `shim`."""
    real: dict[str, Callable[..., Any]] = {n: getattr(os, n) for n in ("fsync", "link", "rename", "replace", "unlink")}
    real_open = io.open

    def fake_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        path = shim.inside(file) if not isinstance(file, int) else None
        if path is None or not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        if "w" in mode or "x" in mode:
            shim.note(Operation("create", path))
        return _File(real_open(file, mode, *args, **kwargs), shim, path)

    def fake_fsync(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink()
        path = shim.inside(name)
        if path is not None:
            shim.note(Operation("fsync_dir" if name.is_dir() else "fsync", path))
        real["fsync"](fd)

    def two(name: str) -> Callable[..., None]:
        def call(src: Any, dst: Any, **kwargs: Any) -> None:
            a, b = shim.inside(src), shim.inside(dst)
            if a is not None and b is not None:
                shim.note(Operation("link" if name == "link" else "rename", a, other=b))
            real[name](src, dst, **kwargs)

        return call

    def fake_unlink(path: Any, **kwargs: Any) -> None:
        inside = shim.inside(path)
        if inside is not None and os.path.lexists(path):
            shim.note(Operation("unlink", inside))
        real["unlink"](path, **kwargs)

    patches: dict[str, Any] = {
        "fsync": fake_fsync, "unlink": fake_unlink,
        "link": two("link"), "rename": two("rename"), "replace": two("replace"),
    }  # fmt: skip
    try:
        for name, function in patches.items():
            setattr(os, name, function)
        io.open = builtins.open = fake_open  # type: ignore[assignment]
        yield shim
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        io.open = builtins.open = real_open  # type: ignore[assignment]


# ---------------------------------------------------------------- power cuts


def crash_state(operations: list[Operation], cut: int, choose: Callable[[], bool], into: Path) -> None:
    """Build in `into` a directory as a power cut after `operations[:cut]` may leave it.

    What was synced is there. Of the rest each write and each change of a directory is kept or lost as `choose` says,
    independently, which allows every reordering. A file's unsynced writes are lost from some point on.
    """
    contents: dict[int, bytes] = {}  # inode -> bytes that survive
    names: dict[str, int] = {}  # what the directory holds
    live: dict[str, int] = {}  # what it held before the cut
    synced_file = {i: max((j for j in range(cut) if _syncs_file(operations, i, j)), default=-1) for i in range(cut)}
    synced_dir = max((j for j in range(cut) if operations[j].kind == "fsync_dir"), default=-1)
    torn: set[int] = set()
    for i, op in enumerate(operations[:cut]):
        keep_name = i < synced_dir or choose()
        if op.kind == "create":
            live[op.path] = i
            contents[i] = b""
            if keep_name:
                names[op.path] = i
        elif op.kind == "write":
            inode = live[op.path]
            if inode in torn or not (i < synced_file[inode] or choose()):
                torn.add(inode)
            else:
                contents[inode] += op.data
        elif op.kind in ("link", "rename"):
            live[op.other] = live[op.path]
            if keep_name:
                names[op.other] = live[op.path]
            if op.kind == "rename":
                del live[op.path]
                if keep_name:
                    names.pop(op.path, None)
        elif op.kind == "unlink":
            live.pop(op.path, None)
            if keep_name:
                names.pop(op.path, None)
    for path, inode in names.items():
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(contents[inode])


def _syncs_file(operations: list[Operation], created: int, j: int) -> bool:
    """Whether operation j syncs the file that operation `created` made."""
    return (
        operations[created].kind == "create"
        and operations[j].kind == "fsync"
        and j > created
        and (operations[j].path == operations[created].path)
    )
