"""tools/slurm_testbed/debian.sh, as far as it goes without a download."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PROJECT, requires


def test_a_release_that_there_is_not_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requires(os.geteuid() == 0, "mounts of its own need root", "run as root")
    refuses = tmp_path / "debootstrap"
    refuses.write_text('#!/bin/sh\necho "E: No such release"; mkdir "$4/debootstrap"; exit 1\n')
    refuses.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    argv = [PROJECT / "tools" / "slurm_testbed" / "debian.sh", "nosuch", tmp_path / "root", "--", "true"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "No such release" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["debootstrap"]
