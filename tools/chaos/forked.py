"""What people and jobs do, in forked processes: they start fast, as this one has loaded all and started no threads.

As root they are another user's, who is refused what modes forbid.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.chaos import lives

NOBODY = 65534
LONGEST_S = 300
"""What takes longer hangs; the longest takes a second of a quiet core."""
LOADED = (
    "PIL.PngImagePlugin", "torch._dynamo", "torch.utils.tensorboard", "ddpm.scoring.evaluate", "ddpm.training.trainer",
    "launch.jobs", "launch.life.training", "launch.life.sampling", "launch.life.scoring",
    "launch.submit", "launch.sample", "launch.evaluate", "launch.status",
)  # fmt: skip
Work = Callable[[], object]


@dataclass(frozen=True)
class Said:
    """How a process ended: its exit code, negative for a signal, None where it hung; and all that was printed, by the
    jobs too that it started."""

    code: int | None
    text: str


@functools.cache
def load() -> None:
    """All that the processes need: what they load themselves takes longer than what they do. So does what they parse
    of the code that jobs get."""
    for module in LOADED:
        importlib.import_module(module)
    lives.parse_code()


@contextmanager
def as_owner() -> Iterator[None]:
    """Within: what this process makes is the runs' owner's."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def process(log: Path, work: Work) -> Said:
    """`work` in a process of its own, whose words go to `log`; it may end that process itself."""
    load()
    log.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _become(log, work)
    code = _ended(pid)
    return Said(code, log.read_text(errors="replace"))


def _become(log: Path, work: Work) -> None:
    """This forked process does `work` as the owner of the runs, and ends."""
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(out, "wb", buffering=0), write_through=True)
        os.setsid()
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        for key in [k for k in os.environ if k.startswith(("SLURM", "SBATCH", "DDPM"))]:
            del os.environ[key]
        os.environ.update(CUDA_VISIBLE_DEVICES="", DDPM_CPUS="1", HOME=str(log.parent), PATH="/nowhere")
        lives.compile_no_code()
        work()
        os._exit(0)
    except SystemExit as e:
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _ended(pid: int) -> int | None:
    watched = os.pidfd_open(pid)
    try:
        if hangs := not select.select([watched], [], [], LONGEST_S)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    finally:
        os.close(watched)
    _, status = os.waitpid(pid, 0)
    return None if hangs else os.waitstatus_to_exitcode(status)


class Popen:
    """Takes the place of subprocess.Popen where jobs are started on this machine: each is forked, and awaited."""

    def __init__(self, argv: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> None:
        from launch import jobs

        self.pid, self.returncode = os.getpid(), 0
        for command in json.loads(argv[-1]):
            pid = os.fork()
            if pid == 0:
                os.environ.update(env, DDPM_CPUS="1")
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                jobs.main(command[command.index("launch.jobs") + 1 :])  # ends the process
            _, status = os.waitpid(pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
            if self.returncode:
                break

    def poll(self) -> int:
        return self.returncode
