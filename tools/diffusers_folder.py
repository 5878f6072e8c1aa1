"""A folder in diffusers' layout, a model's own or a whole pipeline's: which of its files are meant, and what they hold.

Must not know: what of that ours can be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddpm.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
STEM = "diffusion_pytorch_model"
KINDS = (".safetensors", ".bin")
WEIGHTS = tuple(f"{STEM}{variant}{kind}" for variant in ("", ".fp16") for kind in KINDS)
INDICES = tuple(
    f"{STEM}{kind}{end}" for end in (".index.json", ".index.fp16.json", ".fp16.index.json") for kind in KINDS
)
"""Names of the index of weights that are divided among several files."""


class Folder(NamedTuple):
    """A UNet2DModel and, where there is one, its scheduler."""

    network: Path
    """The folder of config.json and the weights."""
    scheduler: Path | None
    """The model's scheduler_config.json."""


def find(source: Path) -> Folder:
    """What is meant in `source`: unet/ and scheduler/ of a pipeline, or a model's own files.

    Raises RequestError for another pipeline, naming it.
    """
    if (index := source / "model_index.json").exists():
        kind = read_object(index).get("_class_name")
        if kind not in PIPELINES:
            raise RequestError(f"{index}: _class_name = {kind!r}: only {' and '.join(PIPELINES)} can be converted")
    network = source / "unet" if (source / "unet").is_dir() else source
    places = (source / "scheduler" / "scheduler_config.json", source / "scheduler_config.json")
    return Folder(network, next((path for path in places if path.exists()), None))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. RequestError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(
            f"{path} does not exist: give the folder that holds config.json and the weights, or one with unet/ in it"
        ) from None
    except ValueError as e:
        raise RequestError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Which file it is, and its tensors, those of whole precision first; an index stands for the files that it names.

    RequestError for none, or a damaged one, or one that an index names and that is not there.
    """
    path = next((folder / name for name in (*WEIGHTS[:2], *INDICES[:2], *WEIGHTS[2:], *INDICES[2:])
                 if (folder / name).exists()), None)  # fmt: skip
    if path is None:
        raise RequestError(f"{folder}: holds none of {', '.join(WEIGHTS)}, nor an index; download one of them into it")
    return path, (_of_index(path) if path.suffix == ".json" else _read(path))


def _of_index(index: Path) -> dict[str, Tensor]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        raise RequestError(f"{index}: says no weight_map, from tensors to files beside it; download it again")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if not (index.parent / name).exists():
            raise RequestError(f"{index}: names {name}, which is not there; download it into {index.parent}")
        weights |= _read(index.parent / name)
    if lost := sorted(places.keys() - weights.keys()):
        raise RequestError(f"{index}: {places[lost[0]]} does not hold {lost[0]}; download both again")
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    from ddpm.network.weights import read_pickled, read_safetensors

    return read_pickled(path) if path.suffix == ".bin" else read_safetensors(path)[0]
