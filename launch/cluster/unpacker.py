"""python RUN/code.zip DIR: lay out in DIR what of the run's code is not there, or is no longer as it was.

It travels in the archive as its __main__.py and needs nothing but Python: what a job runs may have been purged.
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
"""In DIR: the digest of what this Python has compiled of it, which is trusted as it was made."""


def mend(archive: zipfile.ZipFile, place: Path) -> None:
    """Make `place` what the archive says, file by file, none of them half written. Raises OSError."""
    names = {name for name in archive.namelist() if name != MAIN}
    for name in names:
        data, there = archive.read(name), place / name
        if not (there.is_file() and there.read_bytes() == data):
            write(there, data)
    for found in [path for path in place.rglob("*") if not path.is_dir()]:
        ours = found.name.startswith((".", "bytecode-")) or "__pycache__" in found.parts
        if not ours and str(found.relative_to(place)) not in names:
            found.unlink(missing_ok=True)  # it could be imported in the place of something else
    said = place / BYTECODE
    if not (said.is_file() and said.read_text() == bytecode(place)):
        compileall.compile_dir(place, force=True, quiet=2)
        write(said, bytecode(place).encode())


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    tmp.write_bytes(data)
    tmp.chmod(0o444)  # who would edit it is told that this is a copy
    tmp.replace(path)


def bytecode(place: Path) -> str:
    """A digest of all that this Python has compiled there."""
    digest = hashlib.sha256()
    for path in sorted(place.rglob(f"*.{sys.implementation.cache_tag}.pyc")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(place)} {len(data)}\0".encode() + data)
    return digest.hexdigest()


def main(archive: str, place: str) -> int:
    with zipfile.ZipFile(archive) as opened:
        if opened.comment.decode() == Path(place).name:  # else the run has other code now, and this job is of before
            with contextlib.suppress(PermissionError):  # another's, who shares it
                mend(opened, Path(place))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[0], sys.argv[1]))
