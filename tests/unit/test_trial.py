"""`python -m tools.gpu --stages run`: killed and resumed, it brings back what it promises and leaves nothing else."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.run.paths import RunDir
from tests.conftest import requires
from tools.gpu import trial

REDUCED = {*trial.REHEARSAL}
DONE = subprocess.CompletedProcess([], 0)


@pytest.mark.long
def test_a_trial_brings_back_its_curve_grid_and_digest_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires(not torch.cuda.is_available(), "a GPU, on which the trial is none of half a minute", "a CPU")
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        (folder := tmp_path / "images" / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    smaller = ("model.base_channels=8", "model.channel_mults=[1]", "model.attention_resolutions=[]")
    monkeypatch.setattr(trial, "REHEARSAL", (*trial.REHEARSAL, *smaller))
    monkeypatch.setattr(trial, "SAVE_EVERY_MIN", 0.03)
    monkeypatch.setattr(trial, "STOP_S", 12.0)
    seen: list[RunDir] = []
    monkeypatch.setattr(
        trial, "submit", lambda data, where, ends, submit=trial.submit: (seen.append(where), submit(data, where, ends))
    )
    (out := tmp_path / "out").mkdir()
    assert trial.run(out, 50, tmp_path / "images") == 0
    told = json.loads((out / "trial.json").read_text())
    assert told["last_step"] > told["killed_at"] >= told["saved"] > 0 and len(told["sha256"]) == 64
    assert told["next_step_after_s"] <= told["back_at_that_step_after_s"]
    assert len(told["loss"]) == len(told["images_per_s"]) == len(told["steps"]) >= 1
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] >= 64
    assert "stopped reason=STOP" in (out / "run.log").read_text()
    assert not seen[0].path.parent.exists() and processes_of(seen[0]) == []


def test_on_a_gpu_the_recipe_is_trained_as_it_is_whatever_tools_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without nvidia-smi, or on an AMD GPU."""
    found: list[bool] = []
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(trial.subprocess, "run", lambda words, **_: (found.append({*words} >= REDUCED), DONE)[1])
        trial.submit(tmp_path, RunDir(tmp_path / "trial"), time.monotonic() + 99)
    assert found == [False, True]


@pytest.mark.parametrize(("submission", "why"), [
    ("import time; time.sleep(60)", "submit.py was not done in 1 s"),
    ("raise SystemExit(3)", "submit.py left with 3"),
])  # fmt: skip
def test_a_trial_that_does_not_begin_ends_in_time_and_leaves_what_it_knows(
    submission: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run
    monkeypatch.setattr(
        trial.subprocess, "run", lambda words, **options: run([sys.executable, "-c", submission], **options)
    )
    with pytest.raises(AssertionError, match=why):
        trial.run(tmp_path, 1.0, tmp_path)
    assert json.loads((tmp_path / "trial.json").read_text())["steps"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"]


def processes_of(run: RunDir) -> list[bytes]:
    found = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [line for line in [words.read_bytes()] if str(run.path).encode() in line]
    return found
