"""ddpm/training/mirror.py: one run of W&B for all lives, which is never in the way of training."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ddpm.run.paths import RunDir
from ddpm.training.mirror import sync_command
from tests.conftest import PROJECT, requires
from tests.training import live, make_config, make_run

CONFIG = make_config(log__wandb="a project", log__every_steps=4)


def identified(path: Path) -> RunDir:
    run = make_run(path)
    run.run_json.write_text(json.dumps({"run_id": "0123abcd"}))
    return run


def test_what_goes_wrong_there_is_a_line_of_the_log_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = types.SimpleNamespace(init=lambda **_: 1 / 0, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    assert live(CONFIG, identified(tmp_path)).finished
    told = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    assert len(told) == 1 and "left out from now on" in told[0] and "ZeroDivisionError" in told[0]


LIFE = """
import sys
from pathlib import Path
from ddpm.run.paths import RunDir
from ddpm.training.mirror import Mirror
from ddpm.config.schema import Config
from ddpm.config.section import build
mirror = Mirror(RunDir(Path(sys.argv[1])), build(Config, {"log": {"wandb": "a project"}}, "test"))
mirror.log({"step": int(sys.argv[2]), "loss": 0.5, "validation_loss": 0.25})
mirror.close()
"""


def test_each_life_is_written_under_the_runs_own_id_without_a_network(tmp_path: Path) -> None:
    requires(importlib.util.find_spec("wandb") is not None, "no wandb here", "pip install 'ddpm-hpc[wandb]'")
    run = identified(tmp_path / "my run")
    env = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    for step in (4, 8):
        words = [sys.executable, "-c", LIFE, str(run.path), str(step)]
        done = subprocess.run(words, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "left out" not in done.stdout, done.stdout + done.stderr
        assert sync_command(run) in done.stdout
    parts = sorted((run.path / "wandb").glob("offline-run-*-0123abcd/run-0123abcd.wandb"))
    assert len(parts) == 2 and all(b"loss/validation" in part.read_bytes() for part in parts)
    assert sync_command(run) == f"wandb sync --id 0123abcd '{tmp_path}/my run/wandb'/offline-run-*"
