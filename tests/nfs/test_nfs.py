"""Two hosts that mount one NFS, in a Linux that tools/slurm_testbed/nfs.sh boots in a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import PROJECT, requires


@pytest.mark.long
def test_two_hosts_that_mount_one_nfs_keep_a_run_whole() -> None:
    testbed = PROJECT / "tools" / "slurm_testbed" / "nfs.sh"
    inside = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", "tests/nfs/two_hosts.py"]
    done = subprocess.run([testbed, "--", *inside], capture_output=True, text=True)
    lacks = done.stderr.strip().splitlines()[-1:] if done.returncode == 3 else []
    requires(not lacks, "".join(lacks), "tools/slurm_testbed/nfs.sh --help says what it needs")
    assert done.returncode == 0, done.stdout + done.stderr
