"""A run's own copy of the code, which its jobs run, whatever happens to the checkout that submitted them.

RUN/code.zip belongs to the run. Jobs run an unpacked copy of it in .cache/code/DIGEST beside the runs, which runs with
the same code share.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.events import read_events
from ddpm.run.files import TMP_PREFIX, DamagedFile, read_bytes, sha256_json, write_bytes
from ddpm.run.log import counted
from ddpm.run.paths import RunDir
from launch.cluster.environment import PROJECT, SHIPPED, for_jobs
from launch.cluster.unpacker import MAIN, mend

TREES = ("ddpm", "launch", "slurm")
SUFFIXES = (".py", ".sh", ".sbatch", ".json", ".yaml", ".yml", ".toml", ".txt", ".csv", ".cu", ".cuh", ".cpp", ".h")
IMPORT = re.compile(r"^(?:from +([\w.]+) +import\b|import +([\w., \t]+))", re.M)
"""An import that happens when its file is loaded."""
MAX_BYTES = 64 << 20
"""Limit for all files together; ours have less than 2 MB."""
UNPACKER = "launch/cluster/unpacker.py"
READ = """
import sys, pathlib
from ddpm.config.reading import load
from ddpm.errors import RequestError
try:
    load(pathlib.Path(sys.argv[1]))
except RequestError as e:
    sys.exit(print(e) or 2)
"""
"""Has code that lies in the working directory read a config."""
READ_WITHIN_S = 60
MAX_TOLD = 5
"""Number of changed files that a message names."""

Code = Mapping[str, bytes]
"""Files by their names, relative to the project."""


@functools.cache
def of_checkout() -> Code:
    """This checkout's code; read once, so that all runs of one command get the same."""
    found = {}
    for tree in TREES:
        place = SHIPPED if tree == "slurm" else PROJECT
        for path in sorted((place / tree).rglob("*")):
            name = path.relative_to(place)
            hidden = any(part.startswith(".") for part in name.parts)  # such as an editor's copies
            if path.suffix in SUFFIXES and not hidden and path.is_file():
                found[str(name)] = path.read_bytes()
    return found


def of_run(run: RunDir) -> Code | None:
    """The code in the run's code.zip; None if it has none yet. Raises DamagedFile."""
    return _packed(run.code)


def earlier(run: RunDir, digest: str) -> Code | None:
    """Code that jobs of the run ran once; None if it is not there any more."""
    try:
        return _packed(run.earlier_code(digest))
    except (DamagedFile, OSError):
        return None


def kept_before(run: RunDir, digest: str) -> Code:
    """Code that the run's jobs ran before, and may run again. RequestError where it is not there; DamagedFile."""
    if (found := _packed(run.earlier_code(digest))) is not None:
        return found
    there = ", ".join(path.name for path in sorted(run.path.glob("code-*.zip"))) or "none"
    raise RequestError(f"--code {digest}: of code from before {run.path} has {there}; or give kept, or new")


def _packed(path: Path) -> Code | None:
    try:
        packed = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = archive.infolist()
            if sum(m.file_size for m in members) > MAX_BYTES or not all(map(_is_ours, archive.namelist())):
                raise zipfile.BadZipFile("it holds what is no code of ours")
            code = {m.filename: archive.read(m) for m in members}
            if code.pop(MAIN, b"") != code.get(UNPACKER, b""):
                raise zipfile.BadZipFile("it would unpack itself otherwise than it says")
            if archive.comment.decode(errors="replace") != digest(code):
                raise zipfile.BadZipFile("it is not what it says that it is")
            return code
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as e:
        raise DamagedFile(f"{path} is damaged ({e}): bring it back, or submit with --code new") from None


def _is_ours(name: str) -> bool:
    inside = name.startswith(tuple(f"{tree}/" for tree in TREES)) and name.endswith(SUFFIXES) and ".." not in name
    return inside or name == MAIN


def digest(code: Code) -> str:
    """A digest of the code, which names it."""
    return sha256_json({name: hashlib.sha256(data).hexdigest() for name, data in sorted(code.items())})[:16]


def check(code: Code) -> None:
    """Raise RequestError if a file has a syntax error, or imports what jobs will not have: every life would fail with
    it, on its node."""
    for name, data in code.items():
        if not name.endswith(".py"):
            continue
        if why := _mistake(name, data):
            raise RequestError(f"{PROJECT / name}, line {why}: mend it, then submit again")
        if (module := _left_behind(data)) is not None:
            raise RequestError(
                f"{PROJECT / name} imports {module}, which lies in this checkout and is no part of what jobs get "
                f"({', '.join(f'{tree}/' for tree in TREES)}): move it into ddpm/, then submit again"
            )


def _left_behind(data: bytes) -> str | None:
    """A module of the checkout, outside of what is kept, that a file imports."""
    if SHIPPED != PROJECT:  # installed: beside us lie other packages, which jobs have too
        return None
    for of, several in IMPORT.findall(data.decode(errors="replace")):
        for module in (of or several).split(","):
            top = module.split()[0].partition(".")[0] if module.split() else ""
            there = (PROJECT / f"{top}.py", PROJECT / top / "__init__.py")
            if top and top not in TREES and any(map(Path.is_file, there)):
                return top
    return None


@functools.cache
def _mistake(name: str, data: bytes) -> str:
    try:
        compile(data, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as e:
        return f"{getattr(e, 'lineno', None) or '?'}: no job could run this code ({e.args[0]})"
    return ""


def home(run: RunDir) -> Path:
    """The folder of the run's unpacked code, which may not exist yet. Raises DamagedFile."""
    return _place(run, of_run(run) or of_checkout())


def _place(run: RunDir, code: Code) -> Path:
    return run.path.parent / ".cache" / "code" / digest(code)


def keep(run: RunDir, code: Code) -> None:
    """Write `code` as the run's code.zip. What was there before stays beside it: it may be nowhere else, and made what
    is in the run."""
    with contextlib.suppress(DamagedFile):
        if (had := of_run(run)) is not None and digest(had) != digest(code):
            write_bytes(run.earlier_code(digest(had)), read_bytes(run.code, MAX_BYTES), replace=True)
    write_bytes(run.code, _pack(code), replace=True)


def _pack(code: Code) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted({**code, MAIN: code.get(UNPACKER, b"")}.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        archive.comment = digest(code).encode()
    return packed.getvalue()


def unpack(run: RunDir) -> Path:
    """Unpack the run's code where its jobs look for it; a run without code gets this checkout's. Returns the folder.

    Raises DamagedFile; EnvironmentLacks if the folder cannot be written.
    """
    code = of_run(run)
    if code is None:
        code = of_checkout()
        check(code)
        keep(run, code)
    return _lay_out(run, code, read_bytes(run.code, MAX_BYTES))


def _lay_out(run: RunDir, code: Code, packed: bytes) -> Path:
    place = _place(run, code)
    tmp = place.with_name(f"{TMP_PREFIX}{place.name}.{uuid.uuid4().hex}")
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            if not place.is_dir():  # whole or not at all
                mend(archive, tmp)
                with contextlib.suppress(OSError):  # another was first
                    tmp.rename(place)
            mend(archive, place)
    except OSError as e:
        raise EnvironmentLacks(
            f"the run's code cannot be laid out in {place} ({e.strerror}): make room there, or choose another --root"
        ) from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return place


def refusal(run: RunDir, code: Code, config: str) -> str:
    """Why the run's code, or what it had before, would not read this config.yaml, as where it knows a key or value not
    yet; "" where it does, or cannot be asked."""
    place = _lay_out(run, code, _pack(code))
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(config)
            asked = subprocess.run([sys.executable, "-c", READ, path], cwd=place, env=for_jobs(place),
                                   capture_output=True, text=True, timeout=READ_WITHIN_S)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip().removeprefix(f"{path}: ") if asked.returncode == RequestError.exit_code else ""


def last_run(run: RunDir) -> str | None:
    """The digest of the code with which a job of the run was last submitted, or began; None if no event has it."""
    told = (e.get("code") for e in reversed(read_events(run)) if e["event"] in ("submitted", "allocated"))
    return next((digest for digest in told if isinstance(digest, str)), None)


def differences(old: Code, new: Code) -> str:
    """For a message: the files that differ, each with its lines added and removed; "" if none do."""
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    told = [f"{name} {_lines_changed(old.get(name, b''), new.get(name, b''))}" for name in changed[:MAX_TOLD]]
    more = len(changed) - len(told)
    return ", ".join(told) + (f", and {counted(more, 'file')} more" if more else "")


def of_library(code: Code) -> Code:
    """The part of it that computes."""
    return {name: data for name, data in code.items() if name.startswith("ddpm/")}


def _lines_changed(old: bytes, new: bytes) -> str:
    before, after = (text.decode(errors="replace").splitlines() for text in (old, new))
    marks = [line[0] for line in difflib.unified_diff(before, after, n=0, lineterm="")][2:]
    return f"+{marks.count('+')} -{marks.count('-')}"
