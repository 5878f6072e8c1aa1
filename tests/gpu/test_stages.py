"""`python -m tools.gpu`: its stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tools.gpu import __main__ as gpu


@pytest.mark.parametrize(("words", "told"), [
    (["--stages", "benhc"], "benhc; there are: checks, bench, run"),
    (["--rows", "quick", "lop"], "no row lop;"),
    (["--minutes", "0"], "--minutes 0: give a number above 0"),
    (["--stages", "run"], "--stages run: needs images"),
    (["--data", "nowhere.zip"], "--data nowhere.zip: does not exist;"),
    (["--out", "/dev/null/here"], "--out /dev/null/here: Not a directory;"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_any_minute_is_spent(words: list[str], told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu", "--out", str(tmp_path / "out"), *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and told in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout and not list(tmp_path.iterdir())


def test_figures_of_an_earlier_call_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text('{"rows": {"feed": {"notes": []}}}')
    command = [sys.executable, "-m", "tools.gpu", "--out", str(tmp_path), "--stages", "bench", "--rows", "feed"]
    done = subprocess.run([*command, "--minutes", "0.4"], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert "no time left: feed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1 and "{'bench': 1}" in done.stdout


def test_the_files_that_take_longest_are_begun_first_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gpu, "bounded", lambda commands, *_, **__: seen.extend(c[-1] for c in commands.values()))
    gpu.checks(Path("out"), 60)
    assert seen[: len(gpu.LONGEST)] == [f"tests/gpu/test_{name}.py" for name in sorted(gpu.LONGEST)]
    assert sorted(seen) == sorted(str(f.relative_to(PROJECT)) for f in (PROJECT / "tests" / "gpu").glob("test_*.py"))
