"""`submit.py --from`: a new run from another's weights, refused before anything is written where they do not fit."""

from __future__ import annotations

import safetensors.torch
import torch

from ddpm.run.files import read_signed
from tests.cli.harness import Shell, read


def test_a_run_starts_from_anothers_weights_and_keeps_them(again: Shell) -> None:
    source, run = again.root / "tiny", again.root / "second"
    words = ("--name", "second", "train.total_steps=20", "--from", "tiny@200")
    told = again.refused("submit", "tiny.yaml", "--cluster", "local", "model.base_channels=16", *words)
    assert "(8 there, 16 here)" in told and told.endswith("; model.base_channels is 8 there and 16 here\n")

    done = again.submit(*words, "train.lr=1e-4", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"it starts from the weights (ema) of {source}@200, which it keeps as start.safetensors" in done.stdout
    said = "".join(path.read_text() for path in (run / "logs").iterdir() if path.is_file())
    assert f"starting at step 0 weights_of={source} step=200" in said
    began, there = read_signed(run / "run.json")["from"], read(source / "checkpoints" / "step-000000200.json")
    assert (began["source"], began["step"], began["weights"]) == (str(source), 200, "ema")
    assert began["sha256"] == there["sha256"] and began["config_digest"] == there["config_digest"]
    ema = torch.load(source / "checkpoints" / "step-000000200.pt", weights_only=True)["ema"]
    kept = safetensors.torch.load_file(run / "start.safetensors")
    assert kept.keys() == ema.keys() and all(torch.equal(kept[name], ema[name]) for name in ema)
