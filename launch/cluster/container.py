"""How ranks are started in a container, as lines of shell; supervision and SLURM stay outside."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ddpm.errors import RequestError
from launch.cluster.environment import PROJECT, expand
from launch.cluster.site import Container


def lines(container: Container, needed: Iterable[Path]) -> list[str]:
    """Shell lines that set srun's options and the command for Python, in place of slurm/supervise.sh's defaults.

    needed: folders that a rank reads or writes, beside the project; they are mounted at the same paths. If a path leads
    through a link, as ~/runs to /scratch, the link's target on that node is mounted too, since the home with the link
    may be mounted inside. A folder that no longer exists, such as a removed checkout, is left out. Raises RequestError
    if one cannot be mounted; EnvironmentLacks for a $VARIABLE that is not set.
    """
    image = str(expand(container.image or "")) if container.is_file else str(container.image)
    mounts = ",".join(_mount(mount) for mount in container.mounts)
    if container.runtime == "pyxis":
        options, python = f'{shlex.quote(f"--container-image={image}")} --container-mounts="$ddpm_mounts"', "python"
    else:
        # it lets go of the signals that wait: rank.sh, which is around it, holds them in it once more
        inside = f'{shlex.quote(image)} /bin/sh "$DDPM_HOME/slurm/rank.sh" python'
        options, python = "", f'apptainer exec --nv --bind "$ddpm_mounts" {inside}'
    return [
        f"ddpm_mounts={shlex.quote(mounts)}",
        f"for ddpm_path in {shlex.join(_outermost([PROJECT, *needed]))}; do",
        '  for ddpm_path in "$ddpm_path" "$(realpath -m -- "$ddpm_path")"; do',
        '    case ,$ddpm_mounts, in *",$ddpm_path:$ddpm_path,"*) continue ;; esac',
        '    [ ! -e "$ddpm_path" ] || ddpm_mounts="$ddpm_path:$ddpm_path${ddpm_mounts:+,$ddpm_mounts}"',
        "  done",
        "done",
        f"ddpm_srun=({options})",
        f"ddpm_python=({python})",
    ]


def lent_by_a_process(mounts: Path = Path("/proc/self/mounts")) -> str:
    """What to say where this process is in a container whose files come from a process of the same job, which SLURM's
    stop signals end as well; "" where it is not."""
    with contextlib.suppress(OSError):
        for line in mounts.read_text(errors="replace").splitlines():
            if re.search(r" fuse\.(squashfuse|fuse-overlayfs)", line):
                return (
                    f"warning: this container's files come through {line.split()[0]}, which SLURM's stop signals end, "
                    "and then the save that they ask for may fail: give the image as a folder (apptainer build "
                    "--sandbox FOLDER IMAGE.sif), or have the profile's setup export APPTAINER_UNSQUASH=1, which "
                    "unpacks it at each start"
                )
    return ""


def check_image(container: Container) -> None:
    """Raise RequestError if the image is a file that does not exist."""
    if container.is_file and not (image := expand(container.image or "")).exists():
        raise RequestError(
            f"container.image = {image}: no such file or folder here; give its path as nodes see it, or where it is "
            f"fetched from, e.g. docker://ORGANISATION/NAME:TAG"
        )


def _mount(text: str) -> str:
    """FROM:TO[:ro] with the $VARIABLES and ~ of this machine."""
    source, *rest = text.split(":")
    there = str(expand(source))
    return ":".join([there, *(rest or [there])])


def _outermost(folders: Iterable[Path]) -> list[str]:
    """The folders without those inside another one of them. Raises RequestError for a path that cannot be mounted."""
    found = list(dict.fromkeys(folders))
    kept = [str(path) for path in found if not any(other in path.parents for other in found)]
    for path in kept:
        if re.search(r"[,:]", path):
            raise RequestError(f"{path}: a container cannot mount a path with , or : in it; use another place")
    return kept
