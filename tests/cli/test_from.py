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


def test_it_is_told_what_a_new_run_starts_from_before_it_is_begun(again: Shell) -> None:
    words = ("--cluster", "local", "--dry-run", "--name", "second")
    told = again("submit", "tiny", *words, "train.total_steps=500")
    assert told.returncode == 0 and "run second is new and starts from random weights" in told.stderr, told.stderr
    assert f"--from {again.root}/tiny" in told.stderr
    brief = again("submit", "tiny.yaml", *words, "train.total_steps=10").stderr
    assert "train.ema_warmup=true" in brief, brief
    told = again("submit", "tiny", *words, "--from", "tiny@200")
    assert f"# it starts from the weights (ema) of {again.root}/tiny@200\n" in told.stdout, told.stdout
    assert "random" not in told.stderr
    assert "random" not in again("submit", "tiny", "--cluster", "local", "--dry-run").stderr


def test_exported_weights_are_no_run_and_the_command_that_begins_one_with_them_works(again: Shell) -> None:
    assert again("export", "tiny", "given").returncode == 0
    for script in ("sample", "submit"):
        told = again.refused(script, "given", "--cluster", "local")
        assert "python launch/submit.py given/config.yaml --from given --name NAME" in told, told
    done = again("submit", "given/config.yaml", "--from", "given", "--name", "n", "--cluster", "local", "--dry-run")
    assert done.returncode == 0, done.stderr
    words = ("model.base_channels=16", "--from", "given", "--name", "n", "--cluster", "local")
    told = again.refused("submit", "tiny.yaml", *words)
    assert told.endswith("/given/config.yaml\n"), told
    (again.cwd / "given" / "torn.safetensors").write_bytes(b"torn")
    assert "config.yaml" not in again.refused("submit", "tiny.yaml", "--from", "given/torn.safetensors", *words[3:])
