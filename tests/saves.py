"""Small generations that tests save, damage and lose, without a network."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.run import unfinished
from ddpm.run.fence import Fence
from ddpm.run.files import sha256_file, sha256_json, sign, write_json
from ddpm.run.paths import RunDir
from ddpm.run.saving import Checkpointer


def state_at(step: int) -> dict[str, Any]:
    weights = {"w": torch.arange(1000.0) + step, "n": torch.tensor(step)}
    return {
        "model": weights,
        "ema": {k: v / 2 for k, v in weights.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "scaler": {},
        "step": step,
        "images": step * 4,
        "config_digest": "d" * 64,
        "extra": {"attempt": 0},
    }


def saver(run: RunDir, fence: Fence, log: list[str] | None = None, **options: Any) -> Checkpointer:
    said = [] if log is None else log
    return Checkpointer(
        run,
        fence,
        **{
            "keep_last": 3,
            "is_milestone": lambda step: False,
            "world_size": 1,
            "log": said.append,
            "on_saved": lambda step, sha256: None,
            **options,
        },
    )


def save_all(run: RunDir, fence: Fence, *steps: int, **options: Any) -> Checkpointer:
    s = saver(run, fence, **options)
    for step in steps:
        s.save(state_at(step), wait=True)
    return s


def killed_before_its_manifest(run: RunDir, step: int) -> None:
    """What a save leaves that is killed right before its last rename."""
    unfinished.begin(run, step, "1", lambda: None)
    run.checkpoint(step).write_bytes(b"whole, but without a manifest")
    run.ema_weights(step).write_bytes(b"so was this")


def ask_for_samples(run: RunDir, name: str, step: int) -> Path:
    """A sample set of a checkpoint; returns its request."""
    request = {"checkpoint": {"step": step, "sha256": "x"}, "seed": 0}
    run.sample_set(name).path.mkdir(parents=True)
    write_json(run.sample_set(name).request, {**request, "digest": sha256_json(request)})
    return run.sample_set(name).request


def flip_bit(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


class Unreadable:
    """Some files of a run fail to be opened, the first so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: dict[Path, int]) -> None:
        for owner in (os, Path):
            monkeypatch.setattr(owner, "open", self._failing(owner.open, times))
        monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read())

    def _failing(self, real: Callable[..., Any], times: dict[Path, int]) -> Callable[..., Any]:
        def opened(path: Any, *args: Any, **options: Any) -> Any:
            how = args[0] if args else options.get("mode", "r")
            reads = how & os.O_ACCMODE == os.O_RDONLY if isinstance(how, int) else "r" in how
            if reads and isinstance(path, str | Path) and times.get(Path(path), 0):
                times[Path(path)] -= 1
                raise OSError(errno.EIO, "Input/output error", str(path))
            return real(path, *args, **options)

        return opened


def save_otherwise(run: RunDir, step: int) -> None:
    """Another checkpoint in the place of one that was saved, whole and with its own manifest, as of a sibling run."""
    state = torch.load(run.checkpoint(step), weights_only=True)
    state["extra"]["of_a_sibling"] = 1
    torch.save(state, run.checkpoint(step))
    found = {"bytes": run.checkpoint(step).stat().st_size, "sha256": sha256_file(run.checkpoint(step))}
    run.manifest(step).write_text(json.dumps(sign({**json.loads(run.manifest(step).read_text()), **found})))
