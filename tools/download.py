"""A published file by HTTP: from one of several addresses, gone on with where it was cut short, checked, then there."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ddpm.errors import EnvironmentLacks
from ddpm.run.files import fsync_dir, open_file

TIMEOUT_S = 30
"""Longest wait for an answer: a firewall may just drop the packets."""


def digest_of(source: BinaryIO, algorithm: str) -> str:
    """The digest of the content of a file."""
    digest = hashlib.new(algorithm)
    while piece := source.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def download(urls: Sequence[str], target: Path, algorithm: str, expected: str) -> None:
    """The file at `target`, by the first of `urls` that has it. What has come lies beside it until all is there.

    expected: how its digest begins. Raises EnvironmentLacks where no address has it; OSError where it cannot be kept.
    """
    part, refused = target.with_name(f".{target.name}.part"), []
    target.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        print(f"fetching {url}", flush=True)
        try:
            _fetch(url, part)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            refused.append(f"{url}: {_why(e)}")
            continue
        with open_file(part) as f:
            found = digest_of(f, algorithm)
        if found.startswith(expected):
            part.rename(target)
            fsync_dir(target.parent)
            return
        part.unlink()
        refused.append(f"{url}: its {algorithm} is {found}, and not that of the published file ({expected}…)")
    raise EnvironmentLacks(f"{target.name} could not be had ({'; '.join(refused)})")


def _fetch(url: str, part: Path) -> None:
    """Raises URLError, HTTPException, ConnectionError, TimeoutError where not all of it came."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "ddpm-hpc", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
            goes_on = answer.status == 206
            due = (have if goes_on else 0) + int(answer.headers.get("Content-Length") or 0)
            with part.open("ab" if goes_on else "wb") as f:
                shutil.copyfileobj(answer, f, 1 << 20)
                f.flush()
                os.fsync(f.fileno())
    except urllib.error.HTTPError as e:
        if e.code != 416:  # all of it was there
            raise
        return
    if part.stat().st_size < due:
        raise ConnectionError(f"cut short after {part.stat().st_size:,} of {due:,} bytes: the same command goes on")


def _why(e: Exception) -> str:
    if isinstance(e, urllib.error.HTTPError):
        return f"it answered {e.code}"
    if isinstance(e, http.client.HTTPException):  # of an address with no port's number, of what answers another way
        return f"{type(e).__name__}: {' '.join(str(e).split())}"
    reason = e.reason if isinstance(e, urllib.error.URLError) else e
    return (isinstance(reason, OSError) and reason.strerror) or str(reason) or type(reason).__name__
