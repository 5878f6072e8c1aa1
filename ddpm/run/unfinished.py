"""Checkpoint files without a manifest: a save's own leftovers are deleted, everything else is moved aside.

A save marks what it begins by a sign, `.saving-step-K.TOKEN`, which is durable before its .pt has a name and removed
after its manifest has one. A sign contains its own inode number, so that a copy of it is recognised: files beside a
copied sign may be somebody's only copy.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddpm.run.files import TMP_PREFIX, DamagedFile, fsync_dir, publishing, read_bytes
from ddpm.run.paths import RunDir, listed

SIGN = ".saving-"
ASIDE = "set-aside"


@dataclass(frozen=True)
class Sign:
    """A save's mark that it began."""

    path: Path
    step: int
    is_ours: bool
    """Whether it was written here, and is not a copy."""


def begin(run: RunDir, step: int, token: str, may_publish: Callable[[], None]) -> Path:
    """Write the sign of a save of `step`; returns its path, to be unlinked once the manifest exists."""
    path = run.checkpoints / f"{SIGN}{run.checkpoint(step).stem}.{token}"
    with publishing(path, token=token, replace=True, may_publish=may_publish) as f:
        f.write(f"{os.fstat(f.raw.fileno()).st_ino}\n".encode())
    return path


def signs(run: RunDir) -> list[Sign]:
    """The signs in checkpoints/, also those that a copy of the run brought."""
    found = []
    for path in sorted(listed(run.checkpoints)):
        if match := re.fullmatch(rf"{re.escape(SIGN)}step-([0-9]{{9,}})\..*", path.name):
            try:
                is_ours = read_bytes(path) == f"{path.stat().st_ino}\n".encode()
            except (OSError, DamagedFile):
                is_ours = False
            found.append(Sign(path, int(match[1]), is_ours))
    return found


def alone(run: RunDir) -> list[int]:
    """Steps with a .pt that has no manifest and was not left here by an unfinished save."""
    names = {p.name for p in listed(run.checkpoints)}
    found = (re.fullmatch(r"step-([0-9]{9,})\.pt", name) for name in sorted(names))
    steps = [int(m[1]) for m in found if m and f"{m[0][:-3]}.json" not in names]
    ours = {sign.step for sign in signs(run) if sign.is_ours}
    return [step for step in steps if step not in ours]


def clear(run: RunDir, may_remove: Callable[[], None], log: Callable[[str], None]) -> None:
    """Remove what failed or killed saves have left, which would take the space of later ones.

    EMA weights without a .pt or a sign stay, since a person may have put them there; so do folders, which no save
    makes. may_remove: called after listing and before removing; raises if a later job has the run, to which the files
    may belong. Raises OSError, after all else is done, if something cannot be moved aside.
    """
    names = sorted(p.name for p in listed(run.checkpoints))
    begun, others = signs(run), alone(run)
    may_remove()
    for name in names:
        if name.startswith(TMP_PREFIX) and not (run.checkpoints / name).is_dir():
            (run.checkpoints / name).unlink(missing_ok=True)
    for step in (sign.step for sign in begun if sign.is_ours and run.manifest(sign.step).name not in names):
        run.ema_weights(step).unlink(missing_ok=True)
        run.checkpoint(step).unlink(missing_ok=True)
    stays = None
    for step in others:
        try:
            why = "no manifest, and no save has left it here"
            set_aside(run, [run.checkpoint(step), run.ema_weights(step)], why, log)
        except OSError as e:
            stays = stays or e
    for sign in begun:
        if not sign.path.is_dir():
            sign.path.unlink(missing_ok=True)
    if stays:
        raise stays


def set_aside(run: RunDir, paths: list[Path], why: str, log: Callable[[str], None]) -> None:
    """Move files that may be somebody's only copy into checkpoints/set-aside/, and log it.

    Nothing in there counts as a checkpoint, and only people remove it. Raises OSError.
    """
    there = [p for p in paths if os.path.lexists(p)]
    if not there:
        return
    aside = run.checkpoints / ASIDE
    try:
        aside.mkdir(exist_ok=True)
    except FileExistsError:
        why = "is in the way of a folder that what is no checkpoint is moved to: move it away"
        raise NotADirectoryError(errno.ENOTDIR, why, str(aside)) from None
    number = 1
    while any(os.path.lexists(aside / _numbered(p.name, number)) for p in there):
        number += 1
    for path in there:
        path.rename(aside / _numbered(path.name, number))
    fsync_dir(aside)
    fsync_dir(run.checkpoints)
    log(f"set aside: {', '.join(p.name for p in there)} reason={why} moved_to={aside}")


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}.{number}"
