"""How ranks are started in a container, as lines of shell; supervision and SLURM stay outside."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ddpm.errors import RequestError
from launch.cluster.environment import PROJECT, expand
from launch.cluster.site import Container


def lines(container: Container, needed: Iterable[Path]) -> list[str]:
    """Shell lines that set srun's options and the command for Python, in place of slurm/supervise.sh's defaults.

    needed: folders that a rank reads or writes, beside the project; they are mounted at the same paths. Raises
    RequestError if one cannot be mounted; EnvironmentLacks for a $VARIABLE that is not set.
    """
    image = str(expand(container.image or "")) if container.is_file else str(container.image)
    mounts = [*_outermost([PROJECT, *needed]), *(_mount(mount) for mount in container.mounts)]
    if container.runtime == "pyxis":
        there = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        options, python = [f"--container-image={image}", f"--container-mounts={there}"], ["python"]
    else:
        options, python = [], ["apptainer", "exec", "--nv", "--bind", ",".join(mounts), image, "python"]
    return [f"ddpm_srun=({shlex.join(options)})", f"ddpm_python=({shlex.join(python)})"]


def check_image(container: Container) -> None:
    """Raise RequestError if the image is a file that does not exist."""
    if container.is_file and not (image := expand(container.image or "")).exists():
        raise RequestError(
            f"container.image = {image}: no such file or folder here; give its path as nodes see it, or where it is "
            f"fetched from, e.g. docker://ORGANISATION/NAME:TAG"
        )


def _mount(text: str) -> str:
    """FROM[:TO[:ro]] with the $VARIABLES and ~ of this machine."""
    source, *rest = text.split(":")
    return ":".join([str(expand(source)), *rest])


def _outermost(folders: Iterable[Path]) -> list[str]:
    """The folders without those inside another one of them. Raises RequestError for a path that cannot be mounted."""
    found = list(dict.fromkeys(folders))
    kept = [str(path) for path in found if not any(other in path.parents for other in found)]
    for path in kept:
        if re.search(r"[,:]", path):
            raise RequestError(f"{path}: a container cannot mount a path with , or : in it; use another place")
    return kept
