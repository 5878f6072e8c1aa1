"""Default names of runs: from the recipe, from the data if it is not the recipe's, and from what a sweep varies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ddpm.config import reading
from ddpm.config.data import Data
from ddpm.config.schema import Config
from ddpm.data.listing import is_torchvisions
from ddpm.errors import DDPMError
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir, fit_name

NAMED = ("cifar10", "celeba", "digits")
"""Data whose name may be part of a run's name."""


def name_of(config: Config, root: Path) -> str:
    """The config's own name, unless it names other data than the config has: a run on cats is not called cifar10.

    An existing run with the config's name and this data keeps its name.
    """
    name, called = config.name, _called(config.data)
    other = next((d for d in NAMED if re.match(rf"{d}(?![a-z0-9])", name) and d != called), None)
    if other is None or _is_of(RunDir(root / name), config.data):
        return name
    return fit_name(called + name.removeprefix(other))


def of_point(base: str, values: Mapping[str, str]) -> str:
    """The name of one run of a sweep, such as `cifar10-lr_1e-4`. values: by key, as they were typed."""
    words = (re.sub(r"[^A-Za-z0-9._-]+", "~", text).strip("~").replace("~", "-") for text in values.values())
    return fit_name("-".join([base, *(f"{key}_{word}" for key, word in zip(short(values), words, strict=True))]))


def of_sweep(base: str, keys: Iterable[str]) -> str:
    """The name of a sweep, such as `cifar10-lr`."""
    return fit_name("-".join([base, *short(keys)]))


def short(keys: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Each key's last part if that is unique among the keys and not `taken`, else the whole key."""
    whole = list(keys)
    last = [key.rpartition(".")[2] for key in whole]
    return [word if last.count(word) == 1 and word not in taken else key for key, word in zip(whole, last, strict=True)]


def _called(data: Data) -> str:
    """The word for the data in a run's name: the folder's name for a folder of images, or the data set's name."""
    if (path := _of(data)[1]) is None:
        return data.name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name.removesuffix(".zip")).strip("-.")
    return stem or data.name


def _of(data: Data) -> tuple[str, str | None]:
    """What identifies the images: the data set's name, and for a user's images their path."""
    if data.path is None or data.name not in ("images", "cifar10"):
        return data.name, None
    path = Path(data.path)
    is_cifar10 = data.name == "cifar10" and ("cifar" in path.name.lower() or is_torchvisions(path))
    return data.name, None if is_cifar10 else data.path


def _is_of(run: RunDir, data: Data) -> bool:
    try:
        return run.config.is_file() and _of(reading.load(run.config).data) == _of(data)
    except (DDPMError, DamagedFile, OSError):
        return False
