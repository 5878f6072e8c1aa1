"""Work in parts that several processes share: each part is made by the process that claims it first.

A part is claimed by a lock on one byte of a file beside the parts; the lock dies with its holder, on NFS too. On a file
system without locks every process makes all parts, and the first to publish one wins. Must not know what a part is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ddpm.errors import Stopped
from ddpm.run.files import look_anew
from ddpm.run.log import counted, say
from ddpm.run.stopping import StopRequested

NAME = ".claims"
POLL_S = 0.5
BUSY = (errno.EAGAIN, errno.EACCES)


class OthersAtWork(Exception):
    """The remaining parts are being made by other processes."""


@dataclass(frozen=True)
class Worker:
    """A process that shares work with others."""

    stop_requested: StopRequested = lambda: None
    token: str = ""
    """Names it in temporaries, so that two lives on two hosts never share one."""
    stay: bool = True
    """Whether it waits until parts exist that others make, and makes them if the others die; else OthersAtWork is
    raised for them."""


ALONE = Worker()


def work_through(
    directory: Path,
    parts: Sequence[int],
    is_there: Callable[[int], bool],
    make: Callable[[int], object],
    worker: Worker = ALONE,
) -> None:
    """Make each of `parts` that does not exist yet and that no other process is making.

    is_there: whether a part exists; cheap, and asked again before a part is made. Raises Stopped while waiting,
    OthersAtWork.
    """
    todo, said = [part for part in parts if not is_there(part)], False
    while todo:
        busy = []
        for part in todo:
            with _claimed(directory / NAME, part) as mine:
                if not mine:
                    busy.append(part)
                    continue
                look_anew(directory)
                if not is_there(part):
                    make(part)
        if len(busy) == len(todo):
            if not worker.stay:
                raise OthersAtWork(f"others make what is left in {directory}: {counted(len(busy), 'part')}")
            if not said:
                say(f"waiting for others, who make {len(busy)} of the parts in {directory}")
                said = True
            if reason := worker.stop_requested():
                raise Stopped(reason)
            time.sleep(POLL_S)
        todo = [part for part in busy if not is_there(part)]


@contextmanager
def _claimed(path: Path, part: int) -> Iterator[bool]:
    """Within: whether this process has claimed the part."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask: a group may share a run
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)
            mine = True
        except OSError as e:
            mine = e.errno not in BUSY  # if the file system has no locks, everybody may
        yield mine
    finally:
        os.close(fd)
