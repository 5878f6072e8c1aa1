"""One writer per run: a lock, and a fencing token under it.

The lock (flock on `lock`) keeps two live jobs apart; it dies with its holder. The token is a counter in `fence`: each
writer takes the next number and checks, before every publication, that nobody has taken one since. So an orphan of an
earlier life, cut off on a node that was given up, can neither commit nor overwrite. No two writers have the same
number, with locks or without: each is claimed by a file (`.fence-N`) that can be created but once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm.errors import RunBusy, RunGone
from ddpm.run.files import DamagedFile, look_anew, read_bytes, write_bytes
from ddpm.run.paths import RunDir

AWAY_S = 600.0
"""For how long the folder of runs may be away under a job before that counts as the end of the run there."""


class Fence:
    """Held by the one process that writes a run's checkpoints, metrics and run.json."""

    def __init__(
        self,
        run: RunDir,
        owner: dict[str, Any],
        *,
        wait_s: float = 60.0,
        is_orphan: Callable[[dict[str, Any]], bool] = lambda other: False,
        how_to_end: str = "",
        log: Callable[[str], None] = print,
    ) -> None:
        """Take the lock and the next token.

        owner: {"job", "restart", "host"}, written into the lock file for whoever waits.
        wait_s: how long to wait for the lock; less than other ranks wait for this one.
        is_orphan: whether the holder is an earlier life that should be gone. It is then fenced out although it still
        has the lock: at once if it is of the owner's own job, else after `wait_s` seconds.
        how_to_end: the command that ends what is at work for the run, for the message.
        Raises RunBusy after `wait_s` seconds, and OSError if the run may not be written here.
        """
        self._run, self._log = run, log
        self._away_since: float | None = None
        self._root = _identity(run.path.parent)
        self._home = os.open(run.path, os.O_RDONLY | os.O_DIRECTORY)  # open, so that no other gets its inode
        self._fd = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask: a group may share a run
        self._held, self._ours = [self._home, self._fd], (_identity(self._home), _identity(self._fd))
        self._await_lock(owner, wait_s, is_orphan, how_to_end)
        os.truncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({**owner, "pid": os.getpid(), "run": str(run.path)}).encode(), 0)
        os.fsync(self._fd)  # NFS tells other hosts of a file at its closing, and this one stays open
        self.token = self._claim()
        write_bytes(run.fence, f"{self.token}\n".encode(), replace=True, token=str(self.token))
        for claim in run.path.glob(".fence-*"):
            number = claim.name.removeprefix(".fence-")
            if number.isdecimal() and int(number) < self.token:
                claim.unlink(missing_ok=True)

    def _await_lock(
        self, owner: dict[str, Any], wait_s: float, is_orphan: Callable[[dict[str, Any]], bool], how_to_end: str
    ) -> None:
        """Return once this process has the lock, or an orphan is known to hold it. Raises RunBusy."""
        deadline = time.monotonic() + wait_s
        said = False
        while not self._try_lock():
            other = self._holder()
            late = time.monotonic() >= deadline
            if (late or (said and other.get("job") == owner.get("job"))) and is_orphan(other):
                self._log(f"lock: held by an orphan of an earlier life ({_who(other)}); fencing it out")
                break
            if late:
                theirs = other.get("run", str(self._run.path))
                is_linked = os.fstat(self._fd).st_nlink > 1 and theirs != str(self._run.path)
                self.release()
                if is_linked:
                    raise RunBusy(
                        f"run {self._run.name} has one lock with run {theirs}, as after cp -al, and {_who(other)} "
                        f"has it for that one: rm {shlex.quote(str(self._run.lock))}, then submit again"
                    )
                raise RunBusy(
                    f"run {self._run.name} is held by {_who(other)}; one job may write a run. Wait for it, or end it"
                    f"{f': {how_to_end}' if how_to_end else ''}"
                )
            if not said:
                self._log(f"lock: held by {_who(other)}; waiting up to {wait_s:.0f} s")
                said = True
            time.sleep(0.5)

    def _claim(self) -> int:
        """The next token, which no other writer has or will have."""
        token = self._current()
        while True:
            token += 1
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._run.path / f".fence-{token}", os.O_CREAT | os.O_EXCL, 0o666))
                if self._current() < token:  # else it was claimed before, and whoever came later has removed the claim
                    return token

    def _try_lock(self) -> bool:
        """Whether this process has the lock; also True on a file system without locks."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                self._locked = False
                return False
            self._log(f"lock: this file system has no locks ({e.strerror}); relying on the fencing token alone")
        self._locked = True
        return True

    def _holder(self) -> dict[str, Any]:
        """Who has the lock, as its file says; {} if that is not known."""
        try:
            value = json.loads(read_bytes(self._run.lock))  # opened anew: NFS asks its server then, and not before
        except (OSError, ValueError, DamagedFile):
            return {}
        return value if isinstance(value, dict) else {}

    def _current(self) -> int:
        """The counter: the last writer's token; 0 if there is none."""
        try:
            look_anew(self._run.path)
            number = int(read_bytes(self._run.fence))
            return number if number < 2**63 else 0  # as if it were no number
        except (FileNotFoundError, ValueError):
            return 0

    def check(self) -> None:
        """Raise RunBusy if a later writer has taken over: called before every publication.

        RunGone if the run's path is now another directory (maybe a copy with the same counter), or has an older copy's
        files in it. A missing lock file alone does not count while the counter is there. OSError, for a while, where
        the folder of runs itself is not there.
        """
        current, lock = self._current(), _identity(self._run.lock)
        our_home, our_lock = self._ours
        if _identity(self._run.path) != our_home or (lock is None and not current):
            self._be_patient()
            raise RunGone(
                f"{self._run.path} was moved, renamed or deleted while this job had it{self._whereto()}: nothing is "
                f"written under the old name. Move it back, or submit it where it is now"
            )
        if current > self.token:
            raise RunBusy(
                f"run {self._run.name} was taken over by a later job (fence {current}, ours "
                f"{self.token}): nothing more is written here"
            )
        if current < self.token or lock not in (None, our_lock):
            raise RunGone(
                f"{self._run.path} has another lock or fence than this job's (fence {current or 'none'}, ours "
                f"{self.token}), as where a copy is put over a run: nothing more is written here. See that it is "
                f"whole, then submit it again"
            )
        self._away_since = None
        if not self._locked:  # the orphan that held it may be gone: a third job shall wait
            self._try_lock()

    def _be_patient(self) -> None:
        """Raise OSError, for AWAY_S at most, if it is not the run that is gone but what its folder of runs is on: a
        mount may be away for a moment, and a save then fails as on any file system that does."""
        if _identity(self._run.path.parent) == self._root or self._whereto():
            return
        with contextlib.suppress(OSError):  # from a server that does not know it any more, or not now
            if not os.fstat(self._home).st_nlink:  # deleted
                return
        self._away_since = self._away_since or time.monotonic()
        if time.monotonic() - self._away_since < AWAY_S:
            told = "not there, or not what it was, as where a mount is away for a moment"
            raise OSError(errno.ESTALE, told, str(self._run.path.parent))

    def _whereto(self) -> str:
        """Where the run directory was moved to, for a message; "" if this machine does not know."""
        try:
            home = Path(f"/proc/self/fd/{self._home}").readlink()
        except OSError:
            return ""
        return f" (it is {home} now)" if home.exists() and home != self._run.path else ""

    def release(self) -> None:
        """Give up the lock, which another process may then take."""
        while self._held:
            os.close(self._held.pop())


def _identity(path: Path | int) -> tuple[int, int] | None:
    """Device and inode, which a rename keeps and a copy does not have; None if the file does not exist."""
    try:
        found = os.fstat(path) if isinstance(path, int) else path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    where = f" of cluster {owner['cluster']}" if owner.get("cluster") else ""
    pid = f", pid {owner['pid']}" if owner.get("pid") else ""
    return f"job {owner.get('job')} (restart {owner.get('restart')}) on {owner.get('host')}{where}{pid}"
