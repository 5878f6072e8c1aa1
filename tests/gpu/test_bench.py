"""The figures that a GPU is asked for can be asked for anywhere: smaller, so that the way to them does not rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT


def test_the_bench_measures_training_sampling_and_saving_on_this_machine(tmp_path: Path) -> None:
    rows = ["training, not compiled", "sampling", "checkpoint"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu.bench", *rows, "--out", str(tmp_path / "bench.json")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "bench.json").read_text())
    assert list(told["rows"]) == rows and told["card"]
    training, sampling, saving = told["rows"].values()
    assert training["images_per_s"] > 0 and training["aten_ops_per_step"] > 100
    assert sampling["evaluations_images_per_s"] > 0
    assert saving["bytes"] > 1e6 and saving["blocked_ms"] > 0


def test_a_stage_that_there_is_not_is_refused_with_those_there_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu", "--stages", "benhc", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "benhc" in done.stderr and "checks, bench, run" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_name_that_is_no_row_is_refused_with_those_there_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu.bench", "trainning", "--out", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "trainning" in done.stderr and "training" in done.stderr
    assert not list(tmp_path.iterdir())
