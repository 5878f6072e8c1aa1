"""Rows of the chaos bench on SLURM, in reduced counts: those that test_life.py does not cover and that are quick.

All others are in `python -m tools.chaos` alone: dead and hanging nodes, stopped ranks, two jobs on a run, slurmctld,
other settings of a partition, and stops during start-up, packing, compiling and scoring.
"""

from __future__ import annotations

import pytest

from tools.chaos import cluster, slurm_faults, slurm_stops
from tools.slurm_testbed.harness import SlurmTestbed

ROWS = {**slurm_stops.ROWS, **slurm_faults.ROWS}
HERE = ["requeue-forbidden", "scancel", "time-limit", "one-rank-signalled", "term-by-hand", "signal-in-save"]


@pytest.fixture(scope="module")
def site(testbed: SlurmTestbed) -> cluster.Cluster:
    return cluster.Cluster(testbed, testbed.mkdir("chaos"), "submitit")


@pytest.mark.parametrize("name", HERE)
def test_the_run_survives(site: cluster.Cluster, name: str) -> None:
    row, _, reduced = ROWS[name]
    result = row(site, reduced)
    assert result.passed, result
