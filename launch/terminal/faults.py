"""Which exceptions are shown as a sentence: those caused by the request, a file or the machine, on which a person can
act. Any other one is a fault of this program, and keeps its traceback."""

from __future__ import annotations

import errno
import math
import os
import resource
import shlex
import signal
import stat
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ddpm.errors import DDPMError, DoNotRetry, NodeUnfit
from ddpm.run.files import FULL, DamagedFile, link_to_nothing
from ddpm.run.owners import not_ours
from launch.cluster import environment

LIMITS = {
    "n": (resource.RLIMIT_NOFILE, "open files"),
    "u": (resource.RLIMIT_NPROC, "processes and threads"),
    "v": (resource.RLIMIT_AS, "memory"),
    "f": (resource.RLIMIT_FSIZE, "a file"),
    "t": (resource.RLIMIT_CPU, "CPU time"),
}
"""ulimit's letter -> the limit and its name."""
OF_ERRNO = {errno.EMFILE: "n", errno.EAGAIN: "u", errno.ENOMEM: "v", errno.EFBIG: "f"}
OF_WORDS = {
    "too many open files": "n",
    "can't start new thread": "u",
    "pthread_create failed": "u",
    "cannot allocate memory": "v",
    "failed to map segment": "v",
    "can't allocate memory": "v",
    "not enough memory": "v",
}
"""Text in libraries' own errors -> ulimit's letter."""
LIBRARIES = ("undefined symbol", "GLIBC_", "GLIBCXX_", "CXXABI_", "cannot open shared object file")
"""Text in the error of an import that found a shared library, and not the one that was meant."""


class Spent(BaseException):
    """This process has all but used the CPU time that its shell allows it."""

    def __str__(self) -> str:
        return of_limit("t")


def words(error: BaseException, where: object = "") -> str | None:
    """The message for `error`, in a line or a few; None if it is a fault of this program.

    where: the path that it is about, if it does not say so: an error about a full disk does not.
    """
    if isinstance(error, OSError) and where:
        error.filename = error.filename or str(where)
    if isinstance(error, DDPMError | DamagedFile):
        return str(error)
    if letter := _limit(error):
        return f"{_in_short(error)}: {of_limit(letter)}"
    if isinstance(error, ImportError):
        return _of_libraries(error)
    if not isinstance(error, OSError):
        return None
    return ". ".join(filter(None, [_in_short(error), _whose(error), _room(error), _folder(error)]))


def of_a_job(error: BaseException, where: object) -> Exception | None:
    """The error as one of our exceptions, None if it is a fault of this program: NodeUnfit for what another start may
    not meet, as a mount or a group that one node alone lacks; DoNotRetry for what stays in the way."""
    told = words(error, where)
    if isinstance(error, DDPMError | DamagedFile) or told is None:
        return error if isinstance(error, Exception) and told is not None else None
    shut = isinstance(error, PermissionError) and error.filename and _shut(Path(os.fsdecode(error.filename)))
    in_the_way = isinstance(error, IsADirectoryError | NotADirectoryError) or shut or _link(error)
    return DoNotRetry(told) if in_the_way else NodeUnfit(told)


def _whose(error: BaseException) -> str:
    """For a permission error: whose the file is; else ""."""
    if not isinstance(error, PermissionError) or not error.filename:
        return ""
    path = Path(os.fsdecode(error.filename))
    return not_ours(path) or _shut(path)


def _shut(path: Path) -> str:
    """That this user's own folder or file has a mode that keeps its owner out; "" if it has not."""
    for place in (path, *path.parents):
        with suppress(OSError):
            there = place.stat()
            needed = stat.S_IRWXU if stat.S_ISDIR(there.st_mode) else stat.S_IRUSR | stat.S_IWUSR
            shut = there.st_uid == os.geteuid() != 0 and there.st_mode & needed != needed
            return f"Its mode is {there.st_mode & 0o7777:04o}: chmod u+rwX {shlex.quote(str(place))}" if shut else ""
    return ""


def _folder(error: OSError) -> str:
    """For a folder where a file belongs: what to do; else ""."""
    is_there = isinstance(error, IsADirectoryError) and error.filename
    return "A folder lies where a file belongs: move it away, then again" if is_there else ""


def _room(error: OSError) -> str:
    """For a full file system or quota: how to get room; else ""."""
    if error.errno not in FULL:
        return ""
    return (
        "Make room there (python launch/remove.py frees a run's); a disk or quota may be full of files where it has "
        "bytes left (df -i, quota)"
    )


def cannot_write(folder: Path) -> str:
    """Why nothing can be written into a folder now; "" if something can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        return words(e, folder) or ""
    return ""


def check_threads(num: int) -> None:
    """Raise RuntimeError if this process cannot start `num` threads: OpenMP would end it without saying why."""
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(num)]
    try:
        for thread in threads:
            thread.start()
    finally:
        done.set()


def before_cpu_limit(act: Callable[[], object]) -> None:
    """Have `act` called, once, a little before this process has used the CPU time that its shell allows it, when the
    kernel would kill it without a word."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft == resource.RLIM_INFINITY:
        return

    def heard(*_: object) -> None:
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # from now on it comes every second
        act()

    signal.signal(signal.SIGXCPU, heard)
    if soft == hard:
        resource.setrlimit(resource.RLIMIT_CPU, (_early(hard), hard))


def _early(hard: int) -> int:
    return max(1, hard - max(1, hard // 10))


def small_files(num_bytes: float = math.inf) -> str:
    """Why this process and its children cannot write a file of `num_bytes`; "" if they can."""
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return "" if soft == resource.RLIM_INFINITY or num_bytes <= soft else of_limit("f")


def _in_short(error: BaseException) -> str:
    if why := _link(error):
        return why
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    return str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"


def _link(error: BaseException) -> str:
    """That the path of the error is a link to nothing; "" if it is not."""
    if not isinstance(error, FileExistsError | FileNotFoundError) or not error.filename:
        return ""
    path = Path(os.fsdecode(error.filename))
    return f"{why}: {path}" if (why := link_to_nothing(path)) else ""


def _of_libraries(error: ImportError) -> str | None:
    """For an import that a library of LD_LIBRARY_PATH breaks, as a module's old libstdc++ does."""
    said = [line for line in str(error).splitlines() if any(mark in line for mark in LIBRARIES)]
    places = os.environ.get("LD_LIBRARY_PATH")
    if not said or not places:
        return None
    what = said[0].removeprefix("Original error was: ").strip()
    return (
        f"{what}: LD_LIBRARY_PATH={places} may name another library than the one meant: unset it, or unload the "
        f"modules that set it"
    )


def _limit(error: BaseException) -> str | None:
    """ulimit's letter of the limit behind the error; None if it is not about a limit."""
    if isinstance(error, MemoryError):
        return "v"
    if isinstance(error, OSError) and error.errno in OF_ERRNO:
        return OF_ERRNO[error.errno]
    if isinstance(error, OSError | ImportError | RuntimeError):
        said = str(error).lower()
        return next((letter for mark, letter in OF_WORDS.items() if mark in said), None)
    return None


def of_limit(letter: str) -> str:
    """What the shell's limit behind ulimit's letter allows, and what to do."""
    number, what = LIMITS[letter]
    soft, hard = resource.getrlimit(number)
    if soft == resource.RLIM_INFINITY:
        return "this file system takes no file so large" if letter == "f" else f"this machine has no more {what}"
    if letter == "t":
        allowed = f"{hard if soft == _early(hard) else soft} s of"
    else:
        allowed = f"{soft // 1024} KiB of" if letter in "vf" else str(soft)
    here = "" if environment.is_scheduled() else ", or do this in a job, which has its node's limits"
    return f"this shell allows a process {allowed} {what} (ulimit -{letter}): raise it{here}"
