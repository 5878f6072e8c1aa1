"""Whose a file is, for the message to a user who may not write it: on a cluster runs and caches are often shared."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def not_ours(path: Path) -> str:
    """If `path` belongs to another user: why this user cannot write it, for a message; else ""."""
    me = os.geteuid()
    while True:
        try:
            there = path.stat()
            break
        except OSError:  # missing, or in a folder that may not be looked into: its parent tells
            if path == path.parent:
                return ""
            path = path.parent
    if there.st_uid == me or me == 0:
        return ""
    told = f"{path} belongs to {_user(there.st_uid)} (mode {there.st_mode & 0o7777:04o}), and this is {_user(me)}"
    if there.st_mode & stat.S_IRWXG == stat.S_IRWXG and there.st_gid not in {os.getegid(), *os.getgroups()}:
        group = _name(grp.getgrgid, there.st_gid, "gid")
        return f"{told}, who is not in its group {group} here (id): a new login or job may be"
    return f"{told}; its owner can share it with the group: chmod -R g+rwX {path}"


def _user(uid: int) -> str:
    return _name(pwd.getpwuid, uid, "uid")


def _name(look_up: Callable[[int], Sequence[Any]], number: int, kind: str) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return f"{kind} {number}"
