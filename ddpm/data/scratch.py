"""A copy of packed data on a node's own disk: whole or not at all, and never required by a job."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from ddpm.data.packed import open_verified, remove_abandoned
from ddpm.errors import Stopped
from ddpm.run.files import TMP_PREFIX, DamagedFile, open_file
from ddpm.run.stopping import StopRequested

CHUNK_BYTES = 16 << 20
COPY_ABANDONED_AFTER_S = 3600
"""A copy that is alive writes a chunk every few seconds."""


def copy_to_scratch(cache: Path, key: str, scratch: Path, *, stop_requested: StopRequested = lambda: None) -> None:
    """Copy a packed dataset to node-local `scratch`, replacing an incomplete copy (clean-ups of nodes delete single
    files). stop_requested is asked after each chunk.

    Raises OSError (no room, no such disk), DamagedFile (the disk gives back something else), Stopped.
    """
    remove_abandoned(scratch, COPY_ABANDONED_AFTER_S)
    if _is_whole(scratch, key, stop_requested):
        return
    shutil.rmtree(scratch / key, ignore_errors=True)
    tmp = scratch / f"{TMP_PREFIX}{key}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        tmp.mkdir(parents=True)
        for path in sorted((cache / key).iterdir()):
            _copy(path, tmp / path.name, stop_requested)
        shutil.copymode(cache / key, tmp)
        open_verified(scratch, tmp.name, stop_requested=stop_requested)
        try:
            tmp.rename(scratch / key)
        except OSError:
            if not _is_whole(scratch, key, stop_requested):
                raise
            # another job was first
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # a kill leaves it to a later job


def _is_whole(where: Path, key: str, stop_requested: StopRequested) -> bool:
    with contextlib.suppress(OSError, DamagedFile):
        open_verified(where, key, stop_requested=stop_requested)
        return True
    return False


def _copy(path: Path, to: Path, stop_requested: StopRequested) -> None:
    with open_file(path) as source, to.open("wb") as target:
        while chunk := source.read(CHUNK_BYTES):
            target.write(chunk)
            if reason := stop_requested():
                raise Stopped(reason)
    shutil.copymode(path, to)
