"""A lock for submissions: only one process at a time, on any login node, looks for a run's jobs and queues others.

It is a lock of the file system where that has locks, NFS included; else a folder that only one process can make, and
that counts as left behind after STALE_S. The files lie beside the runs, since a new run has no directory yet.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm.errors import EnvironmentLacks
from ddpm.run.owners import not_ours
from ddpm.run.paths import RunDir

PATIENCE_S = 300.0
STALE_S = 600.0
POLL_S = 0.2
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def turn(run: RunDir) -> Iterator[None]:
    """Within: this process alone looks for the run's jobs and queues others. Raises EnvironmentLacks after
    PATIENCE_S."""
    where = run.path.parent / ".cache" / "turns"
    try:
        where.mkdir(parents=True, exist_ok=True)
        fd = os.open(where / run.name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        mend = not_ours(where / run.name) or "have that mended"
        raise EnvironmentLacks(
            f"cannot write {where} ({e.strerror}), where what is done to a run waits its turn: {mend}, or choose "
            f"another place for runs with --root"
        ) from None
    claim = where / f"{run.name}.claim"
    claimed = False
    try:
        try:
            _wait(lambda: _locks(fd), run, where / run.name)
        except OSError:  # no locks here
            _wait(lambda: _claims(claim), run, claim)
            claimed = True
        yield
    finally:
        os.close(fd)
        if claimed:
            with contextlib.suppress(OSError):
                claim.rmdir()


def _wait(takes: Callable[[], bool], run: RunDir, path: Path) -> None:
    asked_at, said = time.monotonic(), False
    while not takes():
        if not said:
            print(f"another submission of {run.name} is at work: waiting for it", file=sys.stderr, flush=True)
            said = True
        if time.monotonic() - asked_at > PATIENCE_S:
            raise EnvironmentLacks(
                f"another submission of {run.name} has been at work for {PATIENCE_S:.0f} s ({path}): try again when it "
                f"has ended (ps -u $USER on each login node shows it)"
            )
        time.sleep(POLL_S)


def _locks(fd: int) -> bool:
    """Whether this process gets the lock. Raises OSError on a file system without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in BUSY:
            raise
        return False
    return True


def _claims(claim: Path) -> bool:
    try:
        claim.mkdir()
    except FileExistsError:
        with contextlib.suppress(OSError):  # gone meanwhile
            if time.time() - claim.stat().st_mtime > STALE_S:
                claim.rmdir()
        return False
    return True
