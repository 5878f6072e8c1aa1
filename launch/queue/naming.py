"""What a run is called where nobody says: after its recipe, and after its data where that recipe is another data's."""

from __future__ import annotations

import re
from pathlib import Path

from ddpm.config import reading
from ddpm.config.data import Data
from ddpm.config.schema import Config
from ddpm.data.listing import is_torchvisions
from ddpm.errors import DDPMError
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir, fitting

NAMED = ("cifar10", "celeba", "digits")
"""Data that runs are called after."""


def name_of(config: Config, root: Path) -> str:
    """The config's own name, but where that is of other data than it has: a run is not called cifar10 that is of cats.

    A run that has the config's name and this data was begun when that was enough, and goes on under it.
    """
    name, called = config.name, _called(config.data)
    other = next((d for d in NAMED if re.match(rf"{d}(?![a-z0-9])", name) and d != called), None)
    if other is None or _is_of(RunDir(root / name), config.data):
        return name
    return fitting(called + name.removeprefix(other))


def _called(data: Data) -> str:
    """In a run's name: a folder of images by its own."""
    if (path := _of(data)[1]) is None:
        return data.name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name.removesuffix(".zip")).strip("-.")
    return stem or data.name


def _of(data: Data) -> tuple[str, str | None]:
    """Which images it is: where those that have a name lie does not matter, if they may be those."""
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
