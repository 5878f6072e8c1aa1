"""Scripts and jobs that start at once: forked from a process that has loaded all that takes long to load.

Each is what `python ARGV` would be: a process with streams, a directory, variables and an exit code of its own, whose
file or module is run as __main__. What is about loading, about a Python's own start, or about whose a process is needs
a real one, by subprocess. All are pinned to one CPU: with as many threads as CPUs, a busy machine makes each step wait
for a thread that has no CPU, and a run of seconds takes minutes.
"""

from __future__ import annotations

import atexit
import contextlib
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
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
LOADED = (
    "PIL.PngImagePlugin", "scipy.linalg", "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard",
    "ddpm.scoring.evaluate", "ddpm.training.trainer", "launch.life.training", "launch.life.sampling",
    "launch.life.scoring", *(f"launch.{path.stem}" for path in sorted((PROJECT / "launch").glob("[a-z]*.py"))),
)  # fmt: skip


# ---------------------------------------------------------------- in the tests


class Process:
    """A started one. pid: its own; returncode: None while it is not known to have ended.

    one_stream: what it says on stderr goes to stdout.
    """

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str], one_stream: bool = False) -> None:
        self.argv, self.returncode = argv, None
        (out, its_out), (err, its_err) = os.pipe(), os.pipe()
        self._streams = {out: b"", err: b""}
        self._server, its_server = socket.socketpair()
        with tempfile.TemporaryFile() as asked:
            asked.write(json.dumps({"argv": argv, "cwd": str(cwd), "env": env}).encode())
            asked.flush()
            theirs = [asked.fileno(), its_out, its_out if one_stream else its_err, its_server.fileno()]
            socket.send_fds(_serving()[1], [b"."], theirs)
        for fd in (its_out, its_err, its_server.detach()):
            os.close(fd)
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


def run(argv: list[str], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with the output captured."""
    process = Process(argv, cwd, env)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@functools.cache
def _serving() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, its = socket.socketpair()
    with its:
        argv = [sys.executable, "-m", "tests.forked", str(its.fileno())]
        server = subprocess.Popen(argv, cwd=PROJECT, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()])
    return server, ours


# ---------------------------------------------------------------- in the server


def serve(requests: socket.socket) -> dict[str, Any]:
    """Forks a process for each request, and tells its pid and exit code. Returns in each of them what is asked of it.
    Ends with the tests."""
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready = select.select([requests, *running], [], [])[0]
        for ended in [fd for fd in ready if fd is not requests]:
            pid, reply = running.pop(ended)
            os.close(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with reply, contextlib.suppress(OSError):  # nobody asks any more
                reply.send(str(code).encode())
        if requests not in ready:
            continue
        told, fds, _, _ = socket.recv_fds(requests, 1, 4)
        if not told:
            os._exit(0)
        reply = socket.socket(fileno=fds[3])
        pid = os.fork()
        if pid == 0:
            return _become(fds, [requests, reply, *(other for _, other in running.values())], list(running))
        running[os.pidfd_open(pid)] = pid, reply
        reply.send(str(pid).encode())
        for fd in fds[:3]:
            os.close(fd)


def _become(fds: list[int], sockets: list[socket.socket], others: list[int]) -> dict[str, Any]:
    """This process takes the streams, and leaves what is the server's."""
    asked, out, err, _ = fds
    with os.fdopen(asked, "rb") as request:
        request.seek(0)
        words: dict[str, Any] = json.load(request)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in (out, err, *others):
        os.close(fd)
    for each in sockets:
        each.close()
    return words


def main() -> None:
    """Load, serve, and in each forked process be what was asked for: [python, FILE, …] or [python, -m, MODULE, …]."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for module in LOADED:
        importlib.import_module(module)
    del sys.modules["launch.first"]  # sets up the process that loads it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the tests, with which this ends
    gc.collect()
    gc.freeze()  # or each process would copy what it never changes
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        _do(asked)
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


def _do(asked: dict[str, Any]) -> None:
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    _, *words = asked["argv"]
    if words[0] == "-m":
        sys.path[0], sys.argv = asked["cwd"], words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(words[0]).parent), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
