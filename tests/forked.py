"""Scripts and jobs that start at once: forked from a process that has loaded all that takes long to load.

Each is what `python ARGV` would be: a process with streams, a directory, variables and an exit code of its own, whose
file or module is run as __main__. So are the jobs that such a script starts in the background, in a session of their
own. What is about loading, about a Python's own start, or about whose a process is needs a real one, by subprocess. All
are pinned to one CPU: with as many threads as CPUs, a busy machine makes each step wait for a thread that has no CPU,
and a run of seconds takes minutes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

PROJECT = Path(__file__).resolve().parent.parent
LOADED = (
    "PIL.PngImagePlugin", "scipy.linalg", "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard",
    "ddpm.scoring.evaluate", "ddpm.training.trainer", "launch.life.training", "launch.life.sampling",
    "launch.life.scoring", *(f"launch.{path.stem}" for path in sorted((PROJECT / "launch").glob("[a-z]*.py"))),
    "tools.chaos.lives",
)  # fmt: skip
OF_KERNELS = (
    "ddpm.diffusion.kernels", "ddpm.network.kernels", "ddpm.network.norm_kernels", "ddpm.network.softmax",
    "ddpm.training.update_kernels", "tests.training",
)  # fmt: skip
"""What is loaded where Triton interprets kernels, which is decided when they are defined."""


class Asked:
    """What a server was asked to start. pid: its own; returncode: None while it is not known to have ended.

    out, err: its streams. background: whether it has a session of its own. bound: by the modes of files, as root is not
    """

    def __init__(
        self, server: socket.socket, argv: list[str], cwd: Path, env: dict[str, str], out: int, err: int,
        **how: bool,
    ) -> None:  # fmt: skip
        self.argv, self.returncode = argv, None
        self._server, its = socket.socketpair(type=socket.SOCK_SEQPACKET)  # of numbers, each read as it was sent
        words = {"argv": argv, "cwd": str(cwd), "env": env, **how}
        with its, tempfile.TemporaryFile() as asked:
            asked.write(json.dumps(words).encode())
            asked.flush()
            socket.send_fds(server, [b"."], [asked.fileno(), out, err, its.fileno()])
        self.pid = self._number()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.returncode = self._number()
        return self.returncode

    def _number(self) -> int:
        """The next that the server tells of it: its pid, and then its exit code."""
        told = self._server.recv(100)
        assert told, "what forks processes for tests has ended"
        return int(told)


# ---------------------------------------------------------------- in the tests


class Process(Asked):
    """A started one. one_stream: what it says on stderr goes to stdout. kernels: whether Triton interprets them there.
    bound: as of Asked."""

    def __init__(
        self, argv: list[str], cwd: Path, env: dict[str, str], one_stream: bool = False, kernels: bool = False,
        bound: bool = False,
    ) -> None:  # fmt: skip
        (out, its_out), (err, its_err) = os.pipe(), os.pipe()
        self._streams = {out: b"", err: b""}
        its_err_too = its_out if one_stream else its_err
        super().__init__(_serving(kernels)[1], argv, cwd, env, its_out, its_err_too, background=False, bound=bound)
        os.close(its_out)
        os.close(its_err)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """All that it and what it has started say, once they have closed the streams. Raises TimeoutExpired."""
        end, open_ = time.monotonic() + timeout, set(self._streams)
        while open_:
            ready = select.select(open_, [], [], max(0.0, end - time.monotonic()))[0]
            if not ready:
                self.kill()
                raise subprocess.TimeoutExpired(self.argv, timeout)
            for fd in ready:
                self._streams[fd] += (more := os.read(fd, 65536))
                if not more:
                    open_.remove(fd)
                    os.close(fd)
        select.select([self._server], [], [], max(0.0, end - time.monotonic()))
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.argv, timeout)
        out, err = (text.decode() for text in self._streams.values())
        return out, err


def run(
    argv: list[str], cwd: Path, env: dict[str, str], timeout: float, kernels: bool = False, bound: bool = False
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with the output captured. kernels, bound: as of Process."""
    process = Process(argv, cwd, env, kernels=kernels, bound=bound)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@functools.cache
def _serving(kernels: bool) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, its = socket.socketpair()
    env = {**os.environ, "PYTHONUTF8": "1"}  # or a script would start it anew, in a locale of another encoding
    env |= {"TRITON_INTERPRET": "1"} if kernels else {}
    with its:
        argv = [sys.executable, "-m", "tests.forked", str(its.fileno())]
        server = subprocess.Popen(argv, cwd=PROJECT, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()], env=env)
    return server, ours


# ---------------------------------------------------------------- in the server


ADDRESS = ""
"""Where a script that was started here asks for the jobs that it starts."""
BOUND = False
"""Whether this process is bound by the modes of files, where it would not be."""


def serve(requests: socket.socket) -> list[str]:
    """Forks a process for each request, which tells its pid, and tells its exit code. Returns in each of them the words
    of its command. Ends with the tests."""
    global ADDRESS
    ADDRESS = f"\0ddpm-forked-{os.getpid()}"
    scripts = socket.socket(socket.AF_UNIX)
    scripts.bind(ADDRESS)
    scripts.listen()
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready = select.select([requests, scripts, *running], [], [])[0]
        for ended in [fd for fd in ready if isinstance(fd, int)]:
            pid, reply = running.pop(ended)
            os.close(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with reply, contextlib.suppress(OSError):  # nobody asks any more
                reply.send(str(code).encode())
        for came in (fd for fd in ready if not isinstance(fd, int)):
            asking = scripts.accept()[0] if came is scripts else requests
            told, fds, _, _ = socket.recv_fds(asking, 1, 4)
            if asking is not requests:
                asking.close()
            elif not told:
                os._exit(0)
            if not told:
                continue
            reply = socket.socket(fileno=fds[3])
            pid = os.fork()
            if pid == 0:
                sockets = [requests, scripts, *(other for _, other in running.values())]
                return _become(fds, reply, sockets, list(running))
            running[os.pidfd_open(pid)] = pid, reply
            for fd in fds[:3]:
                os.close(fd)


def _become(fds: list[int], reply: socket.socket, sockets: list[socket.socket], others: list[int]) -> list[str]:
    """This process takes streams, variables and directory, and leaves what is the server's. Returns its words."""
    asked, out, err, _ = fds
    with os.fdopen(asked, "rb") as request:
        request.seek(0)
        wanted: dict[str, Any] = json.load(request)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in (out, err, *others):
        os.close(fd)
    for each in sockets:
        each.close()
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    if wanted["background"]:
        os.setsid()
        _show_variables()
    if wanted["bound"]:
        _bind()
    with reply:
        reply.send(str(os.getpid()).encode())
    return list(wanted["argv"])


def _bind() -> None:
    """Give up what lets root pass over the modes of files, here and in all that is started from here."""
    global BOUND
    BOUND, libc, those = True, ctypes.CDLL(None), (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(head, sets)
    for i in range(3):  # effective, permitted, inheritable
        sets[i] &= ~sum(1 << capability for capability in those)
    if os.geteuid() == 0 and (
        any(libc.prctl(24, capability, 0, 0, 0) for capability in those)  # PR_CAPBSET_DROP
        or libc.capset(head, sets)
    ):
        os._exit(99)


def main() -> None:
    """Load, serve, and in each forked process be what was asked for: [python, FILE, …], [python, -m, MODULE, …] or
    [python, -c, CODE]."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})  # or several servers would share one
    for module in OF_KERNELS if "TRITON_INTERPRET" in os.environ else LOADED:
        importlib.import_module(module)
    if lives := sys.modules.get("tools.chaos.lives"):
        lives.parse_code()
        lives.compile_no_code()
    sys.modules.pop("launch.first", None)  # sets up the process that loads it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the tests, with which this ends
    gc.collect()
    gc.freeze()  # or each process would copy what it never changes
    _be(serve(socket.socket(fileno=int(sys.argv[1]))))


def _be(argv: list[str]) -> NoReturn:
    try:
        _do(argv[1:])
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as an interpreter ends, which takes longer to forget all
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _do(words: list[str]) -> None:
    unbuffered = words[0] == "-u"
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1 if unbuffered else -1, closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    local = sys.modules.get("launch.queue.local")
    if local is not None:
        local.subprocess = types.SimpleNamespace(Popen=_start, DEVNULL=None, STDOUT=None)  # type: ignore[attr-defined]
    what, *more = words[int(unbuffered) :]
    if what == "-c":
        sys.path[0], sys.argv = str(Path.cwd()), ["-c", *more[1:]]
        exec(compile(more[0], "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.path[0], sys.argv = str(Path.cwd()), more
        if local is not None and more[0] == local.__name__:
            sys.exit(local.main())
        sys.modules.pop(more[0], None)
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(what).parent), [what, *more]
        runpy.run_path(what, run_name="__main__")


# ---------------------------------------------------------------- jobs on this machine


def _show_variables() -> None:
    """Have /proc show this process's variables, in the place of those that the server began with."""
    begin, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    job_first = sorted(os.environ.items(), key=lambda variable: variable[0] != "DDPM_JOB")
    told = b"".join(os.fsencode(f"{key}={value}") + b"\0" for key, value in job_first)
    ctypes.memmove(begin, told[: end - begin].ljust(end - begin, b"\0"), end - begin)


def _start(argv: list[str], **options: Any) -> Any:
    """In the place of subprocess's Popen in launch/queue/local.py."""
    if argv[2:4] == ["-m", "launch.queue.local"]:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(ADDRESS)
            out = options["stdout"].fileno()
            return Asked(server, argv, options["cwd"], options["env"], out, out, background=True, bound=BOUND)
    return Stage(argv) if argv[2:4] == ["-m", "launch.jobs"] else subprocess.Popen(argv)


class Stage:
    """A stage of a job: forked by it, and so in its session."""

    def __init__(self, argv: list[str]) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        self._pid = os.fork()
        if self._pid == 0:
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(signum) != signal.SIG_IGN:
                    signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _be(argv)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def send_signal(self, signum: int) -> None:
        os.kill(self._pid, signum)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


if __name__ == "__main__":
    main()
