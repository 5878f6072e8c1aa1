"""What a job is: one stage of a run, its arguments, and its sbatch options."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from ddpm.run.records import identity
from launch.cluster import asked, code
from launch.cluster.site import NO_NODE, Site

SBATCH_TIMEOUT_S = 60
LIMITS = {"AS": 2**63, "CPU": 2**63, "DATA": 2**63, "FSIZE": 2**63, "NOFILE": 1024, "NPROC": 4096}
"""Limits of the submitting shell that SLURM would have jobs take over -> the least that jobs do well with."""


@dataclass(frozen=True)
class Job:
    """One stage of a run: train; sample (an array whose tasks divide `shards`); evaluate (one job, or an array whose
    tasks claim `parts`)."""

    stage: str
    run: RunDir
    site: Site
    set_name: str = ""
    shards: tuple[int, ...] = ()
    after: str | None = None
    """Ids of jobs, joined by colons, that must have ended in any way before: the run directory says what they did."""
    extra_args: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    """Nodes to exclude, beside the site's."""
    parts: int = 1
    """Into how many an evaluation falls that several tasks may work on."""
    despite: str = ""
    """The mark of a STOP that existed when samples or a score were asked for: it was meant for training only."""

    @property
    def home(self) -> dict[str, str]:
        """Environment variables for its batch shell: the folder of the run's code, and the Python. Raises
        DamagedFile."""
        return at_home(code.home(self.run))

    @property
    def world_size(self) -> int:
        return self.site.at(self.stage).world_size

    @property
    def identity(self) -> dict[str, str]:
        """Environment variables by which its batch shell sees that the directory still is the run's. Raises OSError."""
        known = identity(self.run).get("run_id")
        return {"DDPM_RUN_ID": known} if known else {}

    @property
    def num_tasks(self) -> int:
        """How many tasks make its shards or parts: as many as are asked for, or may run at a time and have some for
        each of their ranks."""
        asked = self.site.max_parallel if self.site.tasks == "auto" else self.site.tasks
        return max(1, min(asked, -(-len(self.shards) // self.world_size) or self.parts))

    @property
    def is_array(self) -> bool:
        return self.num_tasks > 1

    def with_tasks(self, at_most: int) -> Job:
        fewer = self.site.model_copy(update={"tasks": min(self.num_tasks, at_most)})
        return replace(self, site=fewer) if self.is_array else self

    def shards_of(self, task: int) -> list[int]:
        """The shards that one of its tasks makes."""
        return share(self.shards, task, self.num_tasks)

    def arguments(self, shards: Sequence[int] = ()) -> list[str]:
        """The arguments of `python -m launch.jobs`."""
        where = [self.set_name] if self.set_name else []
        chosen = ["--shards", ranges(shards)] if shards else []
        return [self.stage, str(self.run.path), *where, *chosen, *self.extra_args]

    def options(self) -> dict[str, str | bool]:
        """The job's long sbatch options except --array; True stands for a flag without value."""
        site = self.site.at(self.stage)
        values: dict[str, Any] = {
            "job-name": f"{self.run.name}-{self.stage}",
            "partition": site.partition,
            "account": site.account,
            "qos": site.qos,
            "constraint": site.constraint,
            "exclude": None if site.exclude == NO_NODE else site.exclude,
            "time": site.time,
            "nodes": site.nodes,
            "ntasks-per-node": site.ranks_per_node,
            **site.gpu_options(),
            "cpus-per-task": site.cpus_per_task,
            "mem": site.mem,
            "mem-per-cpu": site.mem_per_cpu,
            "mem-per-gpu": site.mem_per_gpu,
            "requeue": True,
            "export": "ALL",
            "open-mode": "append",
            "propagate": _own_limits(),
            "signal": f"USR2@{site.lead_s}",
            "output": str(self.run.logs / f"{self.stage}-{'%A_%a' if self.is_array else '%j'}.out"),
            "dependency": f"afterany:{self.after}" if self.after else None,
        }
        if site.sbatch.get("no-requeue") not in (None, False):
            del values["requeue"]
        values.update({k: v for k, v in site.sbatch.items() if k != "gres" or "gres" not in values})
        values["clusters"] = asked.cluster() or None  # none in a job, which is on its own
        values["exclude"] = ",".join(filter(None, [values["exclude"], *self.without])) or None
        return {k: v if v is True else str(v) for k, v in values.items() if v is not None and v is not False}


def _own_limits() -> str | None:
    """For --propagate: jobs have the limits of their nodes where the shell has a login node's, which would end them. As
    before, they leave no core where the shell wants none."""
    here = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in LIMITS}
    is_tight = any(0 <= soft < LIMITS[name] for name, soft in here.items())
    return "CORE" if is_tight else None


def at_home(home: Path) -> dict[str, str]:
    """Environment variables for a batch shell that runs the code in `home`."""
    return {"DDPM_HOME": str(home), "DDPM_PYTHON": sys.executable}


def check_path(run: RunDir, site: Site) -> None:
    """Raise RequestError if SLURM and submitit would read the run's path as a pattern, and write elsewhere."""
    if not site.is_local and re.search(r"[%\\]", str(run.path)):
        raise RequestError(f"{run.path}: SLURM reads % and \\ in a path as a pattern; keep runs elsewhere (--root)")


def flags(options: dict[str, str | bool]) -> list[str]:
    """Options as words of a command line."""
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items()]


def share(shards: Sequence[int], task: int, tasks: int) -> list[int]:
    """The shards of task number `task`, of `tasks` tasks that divide them."""
    return list(shards[task::tasks])


def numbers(text: str) -> list[int]:
    """0-2,5 as [0, 1, 2, 5]. Raises ValueError."""
    ends = [part.partition("-") for part in text.split(",")]
    return [n for first, _, last in ends for n in range(int(first), int(last or first) + 1)]


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
