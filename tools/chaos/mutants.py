"""Safeties taken away on purpose: each must make a named row fail, or the row proves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


def _unsigned(path: Path) -> dict[str, Any]:
    """read_signed without its check."""
    from ddpm.rundir import DamagedFile

    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as e:
        raise DamagedFile(str(e)) from None


@contextmanager
def _patched(target: str, replacement: Callable[..., Any]) -> Iterator[None]:
    with mock.patch(target, replacement):
        yield


MUTANTS: dict[str, tuple[str, Callable[[], Any]]] = {
    # name: (the row that must fail, how to break the code)
    "no-fsync-of-the-directory": ("power-cut", lambda: _patched("ddpm.rundir.fsync_dir", lambda path: None)),
    "no-manifest-digest": ("flipped-bits", lambda: _patched("ddpm.checkpoint.read_signed", _unsigned)),
    "no-checkpoint-digest": ("flipped-bits", lambda: _patched("ddpm.checkpoint.sha256_file", lambda path: _said(path))),
}


def _said(path: Path) -> str:
    """The digest that the manifest claims."""
    return str(json.loads(path.with_suffix(".json").read_bytes())["sha256"])
