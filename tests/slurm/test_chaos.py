"""Rows of the chaos bench on SLURM that are quick, in reduced counts: some of them, drawn anew each time.

All others are in `python -m tools.chaos` alone: dead and hanging nodes, stopped ranks, two jobs on a run, slurmctld,
other settings of a partition, and stops during start-up, packing, compiling and scoring.
"""

from __future__ import annotations

import pytest

from tests.draws import drawn
from tools.chaos import cluster, slurm_faults, slurm_stops
from tools.slurm_testbed.harness import SlurmTestbed

ROWS = {**slurm_stops.ROWS, **slurm_faults.ROWS}
HERE = [
    "requeue-forbidden", "scancel", "time-limit", "one-rank-signalled", "term-by-hand", "signal-in-save", "stop-file",
    "one-rank-killed", "crash-loop",
]  # fmt: skip
CASES = [(name, "submitit") for name in HERE] + [("one-rank-killed", "sbatch"), ("crash-loop", "sbatch")]


@pytest.fixture(scope="module")
def site(testbed: SlurmTestbed) -> cluster.Cluster:
    return cluster.Cluster(testbed, testbed.mkdir("chaos"), "submitit")


@pytest.mark.long
@pytest.mark.parametrize(("name", "via"), drawn("rows on SLURM", CASES, 3))
def test_the_run_survives(site: cluster.Cluster, name: str, via: str) -> None:
    row, _, reduced = ROWS[name]
    site.via = via
    result = site.row(row, reduced)
    assert result.passed, result
