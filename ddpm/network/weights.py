"""Loads trained weights into a network: from a run's checkpoint, or from a file, ours or another project's."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
"""Largest header of a .safetensors file: a tensor takes a hundred bytes there, and a network has some hundreds."""
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = ("module.", "_orig_mod.", "ema_model.")
"""Prefixes of names in state dicts: of DDP and AveragedModel, of torch.compile, of other projects' averages."""
BESIDE = ("online_model.",)
"""Prefixes of tensors that other projects keep beside an average."""
MORE = "holds more than weights"
SHOWN = 4
"""Number of tensors that a message names."""


def load_network(config: Config, run: RunDir, step: int, weights: str, device: torch.device, precision: str) -> UNet:
    """The run's network at a verified step, in eval mode. weights: ema | model. RequestError if the checkpoint was
    trained under another config digest, or does not fit."""
    state = generations.load(run, step)
    generations.check_mathematics(run.checkpoint(step), state, config.digest())
    network = build_model(config, device, precision)
    set_weights(network, state[weights], str(run.checkpoint(step)))
    return network.eval()


def cast_once(network: UNet, precision: str) -> None:
    """For evaluations in bf16: cast once the weights that autocast would cast at every call. Results keep their
    bits."""
    if precision == "bf16":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                module.to(torch.bfloat16)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of a .safetensors file, on the CPU, and the step in its metadata, or 0. RequestError if damaged."""
    with _opened(path) as f:
        state, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    step = metadata.get("step", "")
    return state, int(step) if step.isdecimal() and len(step) < 19 else 0


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises as `read_safetensors`."""
    with _opened(path) as f:
        return dict(f.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with open_file(path) as raw:
            header = int.from_bytes(raw.read(8), "little")
        if header > MAX_HEADER_BYTES:  # before a hundred megabytes of it become gigabytes of names
            raise ValueError(f"its header says to have {header:,} bytes, at most {MAX_HEADER_BYTES:,}")
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError, DamagedFile) as e:
        raise RequestError(f"{path}: not a readable .safetensors file ({e})") from None


def read_pickled(path: Path, weights: str = "ema") -> dict[str, Tensor]:
    """The tensors by name in a file of torch.save: all of it, or one set in it, as in a checkpoint of ours or of a
    training framework. Only tensors are unpickled. weights: ema | model. RequestError if there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # zipfile, pickle and torch raise a dozen kinds
        if (reason := why_unreadable(path, e)) == MORE:
            raise RequestError(f"{path}: {MORE}; have it exported as .safetensors") from None
        raise RequestError(f"{path}: not a readable file of weights (it {reason}); copy it again") from None
    if isinstance(found, dict):
        for state in (found, found.get(weights), found.get("state_dict")):
            if isinstance(state, dict) and (only := _tensors(state)):
                return only
    told = f"a {type(found).__name__}"
    if isinstance(found, dict):
        told += f" of {', '.join(map(str, list(found)[:SHOWN]))}, …"
    raise RequestError(f"{path}: holds {told}, not tensors by name; save the network's state_dict() alone")


def why_unreadable(path: Path, error: Exception) -> str:
    """Why torch could not load a file, after "it": torch's own words are about its insides, or tell how to have what
    lies in the file run. Raises OSError."""
    with open_file(path) as f:
        head = f.read(2)
    if not head:
        return "is empty"
    if head != b"PK" and head[:1] != b"\x80":  # neither a zip nor a pickle
        return "is no file of torch's"
    if isinstance(error, pickle.UnpicklingError) and "truncated" not in str(error):
        return MORE
    return "is damaged, or not all of it is there"


def _tensors(state: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a dict that has only tensors and numbers; {} for any other dict."""
    if not all(isinstance(k, str) and isinstance(v, Tensor | int | float | None) for k, v in state.items()):
        return {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _unwrapped(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], wrappers: tuple[str, ...] = WRAPPERS
) -> Mapping[str, Tensor] | None:
    """`state` without prefixes, if that gives the names of `own`; else None."""
    if own.keys() == state.keys():
        return state
    for prefix in wrappers:
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        others = [name for name in state if not name.startswith((prefix, *BESIDE))]
        if inner and all(state[name].numel() == 1 for name in others):  # counters, as of an average's updates
            rest = tuple(other for other in wrappers if other != prefix)
            if (found := _unwrapped(own, inner, rest)) is not None:
                return found
    return None


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor that only one side has, or that differs in shape."""
    both, only_there, only_here = own.keys() & state.keys(), state.keys() - own.keys(), own.keys() - state.keys()
    other_shape = (n for n in sorted(both) if own[n].shape != state[n].shape)
    return [
        *(f"{name} ({_shape(state[name])} there, {_shape(own[name])} here)" for name in other_shape),
        *(f"{name} (which the network does not have)" for name in sorted(only_there)),
        *(f"{name} (missing there)" for name in sorted(only_here)),
    ]


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"


def fitted(network: UNet, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`state` under the network's own names. RequestError naming `source` and the tensors that do not fit."""
    own = network.state_dict()
    state = _unwrapped(own, state) or state
    if wrong := misfits(own, state):
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise RequestError(
            f"{source}: not the weights of the config's network: {len(wrong)} of its {len(own)} tensors and the file's "
            f"{len(state)} are missing or of another shape, such as {', '.join(wrong[:SHOWN])}{more}; give the config "
            f"they were trained with"
        )
    return dict(state)


def set_weights(network: UNet, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the network. Raises as `fitted`."""
    network.load_state_dict(fitted(network, state, source))
