"""Which cluster SLURM's commands ask, where one login node has several (sbatch --clusters). Runs no command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLES = ("SLURM_CLUSTERS", "SBATCH_CLUSTERS")
"""By which a user has sbatch queue elsewhere, as it heeds them; the first is every command's."""
_ASKED: ContextVar[str] = ContextVar("the cluster that this process asks, whatever its shell has exported", default="")


def cluster() -> str:
    """The cluster to ask, in lower case; "": the one of slurm.conf."""
    return _ASKED.get() or _of_the_shell()


def _of_the_shell() -> str:
    named = os.environ.get("SLURM_CLUSTERS", "")
    return named.lower() if is_one(named) else ""


def is_one(named: str) -> bool:
    """Whether a value of --clusters names one cluster."""
    return bool(named) and "," not in named and named.lower() != "all"


def exported() -> tuple[str, str]:
    """The variable by which the user has exported where jobs are to go, and its value; ("", "") without one."""
    return next(((name, os.environ[name]) for name in VARIABLES if os.environ.get(name)), ("", ""))


def ask(cluster: str) -> None:
    """From now on this process asks that cluster."""
    _ASKED.set(cluster.lower())


@contextmanager
def asking(cluster: str) -> Iterator[None]:
    """Within: SLURM's commands ask that cluster."""
    before = _ASKED.set(cluster)
    try:
        yield
    finally:
        _ASKED.reset(before)


def typed(command: str) -> str:
    """The beginning of one of SLURM's commands for a person to type: with the cluster, unless their shell names it."""
    return command if cluster() == _of_the_shell() else f"{command} -M {cluster()}"
