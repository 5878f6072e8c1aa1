"""Weights that a run starts from instead of random ones: read, checked against the network, and kept in the run as a
file.

So each life before the first save starts with the same bits, whatever becomes of their source. Must not know: how a
user asks for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ddpm.config.schema import Config
from ddpm.errors import DoNotRetry, RequestError
from ddpm.network.build import build_model
from ddpm.network.weights import PICKLED, fitted, read_pickled, read_safetensors
from ddpm.run import generations
from ddpm.run.files import open_file, sha256_file
from ddpm.run.generations import Tell
from ddpm.run.paths import RunDir


@dataclass(frozen=True)
class Start:
    """Weights to start from, and what run.json says of them."""

    data: bytes
    """The bytes of start.safetensors: float32 tensors under the network's own names."""
    record: dict[str, Any]
    """{"source", "step", "weights", "sha256", "config_digest", "start_sha256"}; sha256: of the checkpoint or file that
    they were read from; start_sha256: of `data`."""


def of_run(run: RunDir, step: int | None, weights: str, config: Config, log: Tell) -> Start:
    """Weights of a run's verified checkpoint: that of `step`, or the newest good one. weights: ema | model.

    Raises RequestError if they do not fit the config's network, and as `generations.choose`.
    """
    found = generations.choose(run, step, log)
    try:
        state = generations.load(run, found.step)
    except FileNotFoundError:  # retention has removed it since
        found = generations.choose(run, step, log)
        state = generations.load(run, found.step)
    of = {"step": found.step, "weights": weights, "sha256": found.sha256, "config_digest": state["config_digest"]}
    return _start(state[weights], run.path, run.checkpoint(found.step), of, config)


def of_file(path: Path, weights: str | None, config: Config) -> Start:
    """Weights of a .safetensors file, or of a file of torch.save. weights: which, if a torch file has several.

    Raises RequestError if they cannot be read or do not fit the config's network.
    """
    if path.suffix in PICKLED:
        state, step = read_pickled(path, weights or "ema"), 0
    elif weights is not None:
        raise RequestError(f"{path} holds one set of weights: leave --from-weights out")
    else:
        state, step = read_safetensors(path)
    of = {"step": step or None, "weights": weights or "ema", "sha256": sha256_file(path), "config_digest": None}
    return _start(state, path, path, of, config)


def _start(state: Mapping[str, Tensor], source: Path, file: Path, of: dict[str, Any], config: Config) -> Start:
    network = build_model(config, torch.device("meta"), "fp32")
    own = {name: value.float().contiguous() for name, value in fitted(network, state, str(file)).items()}
    if bad := [name for name, value in own.items() if not value.isfinite().all()]:
        raise RequestError(f"{file}: {bad[0]} is not finite: training cannot start from it; give another step")
    data = safetensors.torch.save(own)
    return Start(data, {"source": str(source), **of, "start_sha256": hashlib.sha256(data).hexdigest()})


def read_start(run: RunDir, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a run's start.safetensors, by name, float32 on the CPU. record: `from` of its run.json.

    Raises DoNotRetry if they are missing or not what was written, OSError if they cannot be read.
    """
    try:
        with open_file(run.start) as f:
            data = f.read()
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != record["start_sha256"]:
        raise DoNotRetry(
            f"{run.start} is {'damaged' if data else 'missing'}: run {run.name} has nothing saved and starts from it. "
            f"Restore it, or remove the run and submit it again --from {record['source']}"
        )
    return safetensors.torch.load(data)
