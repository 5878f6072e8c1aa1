"""Rows of the chaos bench on SLURM, in reduced counts.

Pre-emptions, time limits, killed ranks, crash loops, STOP files and array tasks are in test_life.py; the slow rows
(dead nodes, stopped ranks, a second job, an orphan, packing, compiling) are only in `python -m tools.chaos`.
"""

from __future__ import annotations

import pytest

from tools.chaos import cluster, slurm_faults, slurm_stops
from tools.slurm_testbed.harness import SlurmTestbed

ROWS = {**slurm_stops.ROWS, **slurm_faults.ROWS}
HERE = [
    "startup-pre-emptions",
    "no-grace",
    "preempt-cancel",
    "requeue-forbidden",
    "scancel",
    "one-rank-signalled",
    "term-by-hand",
    "signal-in-save",
]


@pytest.fixture(scope="module")
def site(testbed: SlurmTestbed) -> cluster.Cluster:
    return cluster.Cluster(testbed, testbed.mkdir("chaos"), "submitit")


@pytest.mark.parametrize("name", HERE)
def test_the_run_survives(site: cluster.Cluster, name: str) -> None:
    row, _, reduced = ROWS[name]
    result = row(site, reduced)
    assert result.passed, result
