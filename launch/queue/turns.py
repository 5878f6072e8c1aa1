"""One at a time: between looking for a run's jobs and queueing others, nobody else does either, on any login node.

A lock of the file system where it has some, NFS included; else a folder that only one can make, and that counts as left
behind once it is STALE_S old. The files lie beside the runs, since a run that is submitted first is not there yet.
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
from ddpm.run.paths import RunDir

PATIENCE_S = 300.0
STALE_S = 600.0
POLL_S = 0.2
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def turn(run: RunDir) -> Iterator[None]:
    """Within: this process alone looks and queues for the run. Raises EnvironmentLacks where another does for long."""
    where = run.path.parent / ".cache" / "turns"
    try:
        where.mkdir(parents=True, exist_ok=True)
        fd = os.open(where / run.name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise EnvironmentLacks(
            f"cannot write {where} ({e.strerror}): choose another place for runs with --root"
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
    """Raises OSError where there are no locks."""
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
