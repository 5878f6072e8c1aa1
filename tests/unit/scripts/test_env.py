"""tools/env.sh, as far as it goes without an installation."""

import shutil
import subprocess
from pathlib import Path

from tests.conftest import PROJECT


def test_an_extra_that_there_is_not_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(PROJECT / "tools" / "env.sh", tmp_path / "tools")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        ["bash", str(tmp_path / "tools" / "env.sh"), "digits,nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "no extra 'nonsense'; there are digits, " in done.stderr, done.stderr
    assert not (tmp_path / ".venv").exists()
