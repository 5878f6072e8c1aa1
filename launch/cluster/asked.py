"""Which cluster SLURM's commands ask, where one login node has several (sbatch --clusters); and which variables of its
surroundings sbatch must not see. Runs no command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLES = ("SLURM_CLUSTERS", "SBATCH_CLUSTERS")
"""Variables that say where sbatch queues, in the order in which it heeds them; all commands heed the first."""
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


@contextmanager
def submitting(words: list[str]) -> Iterator[None]:
    """Within: no variables of the job that this process may run in, which a submitted job would inherit and obey; no
    clusters, since `words` name the one; nor what has sbatch wait for the end of a job, or queue it several times; nor
    GPUs that the user has exported for sbatch, where `words` ask for some: SLURM would add them, and refuses --gres
    beside --gpus-per-node from 26.05 on.
    """
    of_its_job = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    ours = (*of_its_job, *VARIABLES)
    saved = {k: v for k, v in os.environ.items() if k.startswith(ours) and k != "SLURM_CONF"}
    saved |= {k: os.environ[k] for k in ("SBATCH_WAIT", "SBATCH_ARRAY_INX") if k in os.environ}
    if any(re.match("--gpus|--gres=.*gpu", word) for word in words):
        saved |= {k: v for k, v in os.environ.items() if re.match("SBATCH_GPUS|SBATCH_GRES=.*gpu", f"{k}={v}")}
    for key in saved:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(saved)


def typed(command: str) -> str:
    """The beginning of one of SLURM's commands for a person to type: with the cluster, unless their shell names it."""
    return command if cluster() == _of_the_shell() else f"{command} -M {cluster()}"
