"""python RUN/code.zip DIR: unpack into DIR the files of the run's code that are missing there or have changed.

It is the archive's __main__.py and needs only Python, since a purge may have removed the code that a job runs.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import os
import sys
import zipfile
from pathlib import Path

MAIN = "__main__.py"
BYTECODE = f"bytecode-{sys.implementation.cache_tag}.sha256"
"""File in DIR with the digest of the bytecode that this Python has made of it, which is then trusted."""


def mend(archive: zipfile.ZipFile, place: Path) -> None:
    """Make `place` equal to the archive, writing each file whole. Raises OSError."""
    names = {name for name in archive.namelist() if name != MAIN}
    for name in names:
        data, there = archive.read(name), place / name
        if not (there.is_file() and there.read_bytes() == data):
            write(there, data)
    for found in [path for path in place.rglob("*") if not path.is_dir()]:
        ours = found.name.startswith((".", "bytecode-")) or "__pycache__" in found.parts
        if not ours and str(found.relative_to(place)) not in names:
            found.unlink(missing_ok=True)  # a foreign file could be imported in the place of something else
    said = place / BYTECODE
    if not (said.is_file() and said.read_text() == bytecode(place)):
        compileall.compile_dir(place, force=True, quiet=2)
        write(said, bytecode(place).encode())


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    tmp.write_bytes(data)
    tmp.chmod(0o444)  # read-only, which tells whoever would edit it that it is a copy
    tmp.replace(path)


def bytecode(place: Path) -> str:
    """A digest of all bytecode of this Python in `place`."""
    digest = hashlib.sha256()
    for path in sorted(place.rglob(f"*.{sys.implementation.cache_tag}.pyc")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(place)} {len(data)}\0".encode() + data)
    return digest.hexdigest()


def main(archive: str, place: str) -> int:
    with zipfile.ZipFile(archive) as opened:
        if opened.comment.decode() == Path(place).name:  # else the run was given other code since this job was queued
            with contextlib.suppress(PermissionError):  # another's, who shares it
                mend(opened, Path(place))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[0], sys.argv[1]))
