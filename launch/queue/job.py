"""What a job of ours is: one stage of a run, what its entry is told, and what sbatch is asked for."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from launch.cluster.environment import PROJECT
from launch.cluster.site import Site

HOME = {"DDPM_HOME": str(PROJECT), "DDPM_PYTHON": sys.executable}
"""What every batch shell is told of this project."""
SBATCH_TIMEOUT_S = 60


@dataclass(frozen=True)
class Job:
    """One stage of a run: train; sample (an array over `shards`); evaluate."""

    stage: str
    run: RunDir
    site: Site
    set_name: str = ""
    shards: tuple[int, ...] = ()
    after: str | None = None
    """A job id that must have ended, however it ended: the run directory says whether its work is done."""
    extra_args: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.site.world_size if self.stage == "train" else 1

    def arguments(self, shard: int | None = None) -> list[str]:
        """Of `python -m launch.jobs`."""
        where = [self.set_name] if self.set_name else []
        chosen = [] if shard is None else ["--shard", str(shard)]
        return [self.stage, str(self.run.path), *where, *chosen, *self.extra_args]

    def options(self, *, array: bool = True) -> dict[str, str | bool]:
        """sbatch's long options, but for --array; True is a flag. array: whether its shards are tasks of one."""
        site = self.site
        nodes = site.nodes if self.stage == "train" else 1
        gpus = site.gpus_per_node or 0
        lead = site.signal_lead_s if site.time is None else min(site.signal_lead_s, site.time * 60 // 3)
        values: dict[str, Any] = {
            "job-name": f"{self.run.name}-{self.stage}",
            "partition": site.partition,
            "account": site.account,
            "qos": site.qos,
            "constraint": site.constraint,
            "exclude": site.exclude,
            "time": site.time,
            "nodes": nodes,
            "ntasks-per-node": max(1, self.world_size // nodes),
            "gpus-per-node": (gpus if self.stage == "train" else 1) if gpus else None,
            "cpus-per-task": site.cpus_per_task,
            "mem": site.mem,
            "requeue": True,
            "export": "ALL",
            "open-mode": "append",
            "signal": f"USR2@{lead}",
            "output": str(self.run.logs / f"{self.stage}-{'%A_%a' if self.shards and array else '%j'}.out"),
            "dependency": f"afterany:{self.after}" if self.after else None,
        }
        if "no-requeue" in site.sbatch:
            del values["requeue"]
        values.update(site.sbatch)
        return {k: v if v is True else str(v) for k, v in values.items() if v is not None and v is not False}


def check_path(run: RunDir, site: Site) -> None:
    """Raises RequestError where SLURM, and submitit, would take the run's path for a pattern, and write elsewhere."""
    if not site.is_local and re.search(r"[%\\]", str(run.path)):
        raise RequestError(f"{run.path}: SLURM reads % and \\ in a path as a pattern; keep runs elsewhere (--root)")


def flags(options: dict[str, str | bool]) -> list[str]:
    """As words of a command line."""
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items()]


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
