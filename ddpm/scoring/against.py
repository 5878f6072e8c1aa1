"""What a score compares with, by the name that a user gives it: train, test, a pytorch-fid .npz, a folder or zip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.config.data import Data
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.stopping import StopRequested

if TYPE_CHECKING:
    from ddpm.data.packed import PackedImages

SPLITS = ("train", "test")
ARRAYS = (".npz", ".npy")


def open_reference(config: Config, name: str, cache: Path, stop_requested: StopRequested) -> PackedImages | Path:
    """The split as trained on, packed in `cache`; or the statistics' file; or the images. Raises RequestError."""
    from ddpm.data.packed import load_folder, pack

    if name in SPLITS:
        return pack(config.data, name, cache, stop_requested=stop_requested)[1]
    path = check_file(name)
    return path if path.suffix == ".npz" else load_folder(path)


def check_reference(config: Config, name: str) -> None:
    """Raises RequestError where `name` is a split that the run's data does not have, no such file, or one image."""
    from ddpm.data.packed import open_source

    if name in SPLITS:
        members = open_source(config.data).members
        if name not in members:
            have = sorted(members)
            raise RequestError(f"reference = {name}: {config.data.name} has {have} here; or give a file or folder")
        listed = members[name]
    else:
        path = check_file(name)
        if path.suffix in ARRAYS:
            return
        try:
            found = open_source(Data(name="images", path=str(path))).members
        except RequestError as e:
            raise RequestError(f"reference = {str(e).removeprefix('data.path = ')}") from None
        listed = [image for names in found.values() for image in names]
    if len(listed) == 1:  # none are listed where a library reads them
        raise RequestError(f"reference = {name}: has one image; a score needs at least 2 on each side")


def check_file(name: str) -> Path:
    """The file or folder of that name. Raises RequestError."""
    path = Path(name).expanduser()
    if not path.exists():
        raise RequestError(
            f"reference = {name}: not train, not test, and no such file; a pytorch-fid .npz, or a folder "
            f"or zip of images"
        )
    return path
