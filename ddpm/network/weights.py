"""A network with trained weights: those of a run's checkpoint, or of a .safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.network.build import build_model
from ddpm.network.unet import UNet
from ddpm.run import generations
from ddpm.run.files import DamagedFile, open_file
from ddpm.run.paths import RunDir

MAX_HEADER_BYTES = 8 << 20
"""A tensor takes a hundred bytes there, and a network has some hundreds."""


def load_network(config: Config, run: RunDir, step: int, weights: str, device: torch.device, precision: str) -> UNet:
    """The run's network at a verified step, in eval mode. weights: ema | model. RequestError where it is another's."""
    state = generations.load(run, step)
    generations.check_mathematics(run.checkpoint(step), state, config.digest())
    network = build_model(config, device, precision)
    set_weights(network, state[weights], str(run.checkpoint(step)))
    return network.eval()


def cast_once(network: UNet, precision: str) -> None:
    """For evaluations in bf16: the weights that autocast would cast at each one, cast now. The same bits come out."""
    if precision == "bf16":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                module.to(torch.bfloat16)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of a file of EMA weights, on the CPU, and the step that it says, or 0. RequestError if damaged."""
    try:
        with open_file(path) as raw:
            header = int.from_bytes(raw.read(8), "little")
        if header > MAX_HEADER_BYTES:  # before a hundred megabytes of it become gigabytes of names
            raise ValueError(f"its header says to have {header:,} bytes, at most {MAX_HEADER_BYTES:,}")
        with safe_open(path, "pt") as f:
            state, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, DamagedFile) as e:
        raise RequestError(f"{path}: not a readable .safetensors file ({e})") from None
    step = metadata.get("step", "")
    return state, int(step) if step.isdecimal() and len(step) < 19 else 0


def set_weights(network: UNet, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the network. RequestError naming `source` and a tensor where they do not fit each other."""
    own = network.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    if wrong:
        raise RequestError(
            f"{source}: not the weights of the config's network: {len(wrong)} of its {len(own)} tensors and the file's "
            f"{len(state)} are missing or of another shape, such as {wrong[0]}; give the config they were trained with"
        )
    network.load_state_dict(state)
