"""The chaos bench's SLURM rows, in reduced counts; pre-emptions and killed ranks are in test_life.py."""

from __future__ import annotations

import pytest

from tools.chaos import cluster
from tools.slurm_testbed.harness import SlurmTestbed

ELSEWHERE = {"pre-emptions", "one-rank-killed"}


@pytest.fixture(scope="module")
def site(testbed: SlurmTestbed) -> cluster.Cluster:
    return cluster.Cluster(testbed, testbed.mkdir("chaos"), "submitit")


@pytest.mark.parametrize("name", [n for n in cluster.ROWS if n not in ELSEWHERE])
def test_the_run_survives(site: cluster.Cluster, name: str) -> None:
    row, _, reduced = cluster.ROWS[name]
    result = row(site, reduced)
    assert result.passed, result
