"""The code of a run is kept with it: its jobs run that, whatever becomes of the checkout that submitted them.

RUN/code.zip travels with the run. Jobs run it unpacked, in .cache/code/DIGEST beside the runs, which runs of the same
code share; what lies there is only a copy.
"""

from __future__ import annotations

import compileall
import difflib
import hashlib
import io
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.files import TMP_PREFIX, DamagedFile, read_bytes, sha256_json, write_bytes
from ddpm.run.paths import RunDir
from launch.cluster.environment import PROJECT, SHIPPED

TREES = ("ddpm", "launch", "slurm")
SUFFIXES = (".py", ".sh", ".sbatch")
MAX_BYTES = 64 << 20
"""Of all files together; ours are under 2 MB."""
MAX_TOLD = 5
"""Files that a difference names."""

Code = Mapping[str, bytes]
"""Files by their names, relative to the project."""


def of_checkout() -> Code:
    """What is submitted with, as it is now."""
    found = {}
    for tree in TREES:
        place = SHIPPED if tree == "slurm" else PROJECT
        for path in sorted((place / tree).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                found[str(path.relative_to(place))] = path.read_bytes()
    return found


def of_run(run: RunDir) -> Code | None:
    """What the run's jobs run; None where it has none yet. Raises DamagedFile."""
    try:
        packed = read_bytes(run.code, MAX_BYTES)
    except FileNotFoundError:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = archive.infolist()
            if sum(m.file_size for m in members) > MAX_BYTES or not all(map(_is_ours, archive.namelist())):
                raise DamagedFile(f"{run.code} holds what is no code of ours")
            code = {m.filename: archive.read(m) for m in members}
            if archive.comment.decode(errors="replace") != digest(code):
                raise zipfile.BadZipFile("it is not what it says that it is")
            return code
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as e:
        raise DamagedFile(f"{run.code} is damaged ({e}): bring it back, or submit with --code new") from None


def _is_ours(name: str) -> bool:
    return name.startswith(tuple(f"{tree}/" for tree in TREES)) and name.endswith(SUFFIXES) and ".." not in name


def digest(code: Code) -> str:
    """A name for it, by its content."""
    return sha256_json({name: hashlib.sha256(data).hexdigest() for name, data in sorted(code.items())})[:16]


def check(code: Code) -> None:
    """Raises RequestError where a file is no Python: each life would die of it, on a node of its own."""
    for name, data in code.items():
        if name.endswith(".py"):
            try:
                compile(data, name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as e:
                where = f"{PROJECT / name}, line {getattr(e, 'lineno', None) or '?'}"
                raise RequestError(
                    f"{where}: no job could run this code ({e.args[0]}): mend it, then submit again"
                ) from None


def home(run: RunDir) -> Path:
    """Where the run's code lies unpacked, or will. Raises DamagedFile."""
    return _place(run, of_run(run) or of_checkout())


def _place(run: RunDir, code: Code) -> Path:
    return run.path.parent / ".cache" / "code" / digest(code)


def keep(run: RunDir, code: Code) -> None:
    """Make it the run's."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(code.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        archive.comment = digest(code).encode()
    write_bytes(run.code, packed.getvalue(), replace=True)


def unpack(run: RunDir) -> Path:
    """Lay the run's code where its jobs find it, this checkout's where it had none; returns where.

    Raises DamagedFile; EnvironmentLacks where it cannot lie there.
    """
    code = of_run(run)
    if code is None:
        code = of_checkout()
        check(code)
        keep(run, code)
    place = _place(run, code)
    try:
        if place.is_dir():
            for name in (name for name, data in code.items() if not _holds(place / name, data)):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(place / name, code[name], replace=True)  # changed by hand, or purged
        else:
            _lay_out(code, place)
    except OSError as e:
        raise EnvironmentLacks(
            f"the run's code cannot be laid out in {place} ({e.strerror}): make room there, or choose another --root"
        ) from None
    return place


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _lay_out(code: Code, place: Path) -> None:
    """Whole or not at all. Raises OSError."""
    tmp = place.with_name(f"{TMP_PREFIX}{place.name}.{uuid.uuid4().hex}")
    try:
        for name, data in code.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_bytes(data)
            (tmp / name).chmod(0o444)  # who would edit it is told that this is a copy
        compileall.compile_dir(tmp, quiet=2, stripdir=str(tmp), prependdir=str(place))  # once, and not by each rank
        tmp.rename(place)
    except OSError:
        if not place.is_dir():  # nobody else was first
            raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def differences(old: Code, new: Code) -> str:
    """In which files, and by how many lines, `new` is another than `old`; "" where they are the same."""
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    told = [f"{name} {_lines_changed(old.get(name, b''), new.get(name, b''))}" for name in changed[:MAX_TOLD]]
    more = len(changed) - len(told)
    return ", ".join(told) + (f", and {more} file{'s' if more > 1 else ''} more" if more else "")


def _lines_changed(old: bytes, new: bytes) -> str:
    before, after = (text.decode(errors="replace").splitlines() for text in (old, new))
    marks = [line[0] for line in difflib.unified_diff(before, after, n=0, lineterm="")][2:]
    return f"+{marks.count('+')} -{marks.count('-')}"
