"""`python -m tools.gpu`: its stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT


def test_a_stage_that_there_is_not_is_refused_with_those_there_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu", "--stages", "benhc", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "benhc" in done.stderr and "checks, bench, run" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
