"""Where jobs run: the keys of a site profile, and the resources of a job."""

from __future__ import annotations

import shutil
from typing import Any, Literal

from pydantic import Field

from ddpm.config.section import Section
from launch.cluster.values import (
    Command,
    Gpus,
    Line,
    Mail,
    Memory,
    Minutes,
    Mounts,
    Options,
    ShellLines,
    Tasks,
    Url,
    Word,
    memory_share,
)

MEMORIES = ("mem", "mem_per_cpu", "mem_per_gpu")
LEAST_WORK_S = 120

NO_NODE = "none"
"""Value of `exclude` that excludes no node, not even one on which lives of the run died."""


class Resources(Section):
    """What a job asks for, and where."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    time: Minutes | None = None
    """Time limit of one job, as 4h, 90m, 2d or in SLURM's form, kept in minutes; a longer run is requeued."""
    cpus_per_task: int | None = Field(None, ge=1)
    mem: Memory = None
    """Per node. At most one of these three; none: unset what a profile has."""
    mem_per_cpu: Memory = None
    mem_per_gpu: Memory = None


class Stage(Resources):
    """What differs for one stage; keys that are not given are as in training, for one rank."""

    gpus_per_node: Gpus = None
    """null: one if training has some. Sampling starts a rank on each, which divide the shards; scoring uses one."""
    sbatch: Options = Field(default_factory=dict)
    """Beside training's; null takes one of those away."""


class Container(Section):
    """The container in which ranks run; the batch shell, which supervises them, stays outside."""

    image: Line | None = None
    """null: they run as they are. A file or folder, or where it is fetched from: docker://pytorch/pytorch:2.11.0,
    nvcr.io#nvidia/pytorch:26.01-py3. Its `python` has what this project depends on; the project itself is mounted."""
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    mounts: Mounts = ()
    """Further mounts, FROM[:TO[:ro]], beside the project, the runs and their data cache; for example scratch."""

    @property
    def is_file(self) -> bool:
        return (self.image or "").startswith(("/", "~", ".", "$"))


class Notify(Section):
    """How a run's owner is told that it has finished, has failed for good, or is held: once, and never at a requeue."""

    secret = True
    mail: Mail | None = None
    """Address to which SLURM mails when the job that ends the run ends; it sends no mail about a hold."""
    command: Command = ()
    """A program and its words, run without a shell where the job ran, with the message on its standard input."""
    url: Url | None = None
    """Gets the message as JSON, {"text": …}, as chat programs' webhooks take it."""


class Site(Resources):
    """A site profile (configs/cluster/NAME.yaml); the command line may override the keys in options.FLAGS."""

    all_keys = "configs/cluster/example.yaml shows them"
    cluster: Literal["auto", "slurm", "local"] = "auto"
    via: Literal["submitit", "sbatch"] = "submitit"
    nodes: int = Field(1, ge=1)
    gpus_per_node: Gpus = None
    """A number, or TYPE:NUMBER. null: one if the partition has GPUs, else none."""
    gpu_request: Literal["auto", "gpus-per-node", "gres", "gpus-per-task", "none"] = "auto"
    """The option by which this site wants GPUs requested. auto: --gpus-per-node, with the type if the partition has
    only one; none: by sbatch.gres or another option here."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks per node; one per GPU where there are GPUs."""
    sbatch: Options = Field(default_factory=dict)
    """Further sbatch options without their dashes, e.g. {reservation: course}."""
    setup: ShellLines = ()
    """Shell lines that every job runs first: module load …"""
    container: Container = Field(default_factory=Container)
    scratch: Line | None = None
    """Node-local disk where jobs keep a copy of the packed data, e.g. /scratch/$USER."""
    data_cache: Line | None = None
    """Shared place of packed data; null: .cache beside the runs."""
    network_interface: Word | None = None
    """Interface by which ranks on several nodes reach each other, e.g. ib0; null: the one that leads to rank 0's
    node."""
    signal_lead_s: int = Field(120, ge=10)
    """Seconds before the time limit at which a job saves and asks to be put back."""
    rank_timeout_s: int = Field(600, ge=10)
    """If a rank does not answer the others for this long, the job ends and is tried again. Must be longer than a save
    at a stop takes, for which all ranks wait."""
    max_parallel: int = Field(16, ge=1)
    """Array tasks that run at a time."""
    tasks: Tasks = "auto"
    """Tasks of a sample job, which divide the shards. auto: as many as may run at a time; fewer if SLURM accepts only
    fewer."""
    sample: Stage = Field(default_factory=Stage)
    """What differs for tasks that sample."""
    evaluate: Stage = Field(default_factory=Stage)
    """What differs for the job that scores."""
    notify: Notify = Field(default_factory=Notify, exclude=True)
    """Whom to tell of a run's end. It may contain secrets: it is in no record of a submission, only in a file of the
    run that its owner alone can read."""

    @property
    def is_local(self) -> bool:
        return self.cluster == "local"

    @property
    def lead_s(self) -> int:
        """Seconds before its time limit at which a job is told to save: at most a third of the limit."""
        return self.signal_lead_s if self.time is None else min(self.signal_lead_s, self.time * 60 // 3)

    def warnings(self) -> list[str]:
        """Warnings about requests that are valid but hardly intended."""
        told = []
        for stage in ("train", "sample", "evaluate"):
            site = self.at(stage)
            if site.time is not None and site.time * 60 < site.lead_s + LEAST_WORK_S:
                minutes = "1 minute" if site.time == 1 else f"{site.time} minutes"
                told.append(
                    f"time = {minutes} leaves {stage} jobs less than {LEAST_WORK_S // 60} minutes of work "
                    f"before they save, {site.lead_s} s before their end: ask for more"
                )
        told = told[:1]
        if self.notify.command and shutil.which(self.notify.command[0]) is None:
            told.append(
                "notify.command: this machine has no such program, or may not run it; unless the nodes have it, nobody "
                "is told of the run's end: give the whole path of one that they share"
            )
        return told

    @property
    def num_gpus(self) -> int:
        """Per node."""
        return _number(self.gpus_per_node)

    @property
    def gpu_type(self) -> str:
        return str(self.gpus_per_node or "").rpartition(":")[0]

    def typed(self, number: int) -> str:
        """A number of GPUs in the form of SLURM's options, with their type."""
        return f"{self.gpu_type}:{number}" if self.gpu_type else str(number)

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.num_gpus or 1

    def at(self, stage: str) -> Site:
        """The site of one stage. Training: this one. Other stages: with one rank (sampling: one for each GPU of its
        own), and these ranks' share of a node's memory."""
        if stage == "train":
            return self
        own: Stage = self.sample if stage == "sample" else self.evaluate
        values = own.model_dump(exclude_none=True, exclude={"sbatch"})
        ranks = max(1, _number(own.gpus_per_node)) if stage == "sample" else 1
        memory: dict[str, Any] = {"mem": memory_share(self.mem, max(1, self.ranks_per_node // ranks))}
        if any(name in values for name in MEMORIES):
            memory = dict.fromkeys(MEMORIES, None)
        values = {**memory, **values, "nodes": 1, "tasks_per_node": ranks}
        asked = self.model_copy(update=values)
        sbatch = {**self.sbatch, **own.sbatch}
        if total := sbatch.get("gpus"):
            sbatch["gpus"] = ":".join([*str(total).split(":")[:-1], str(ranks)])
        gpus = asked.typed(ranks) if asked.num_gpus else 0
        return asked.model_copy(update={"gpus_per_node": gpus, "sbatch": sbatch})

    def gpu_options(self) -> dict[str, str]:
        """The sbatch options that request the GPUs of this site."""
        others = {"gpus", "gpus-per-task", "gpus-per-socket"} & {k for k, v in self.sbatch.items() if v is not None}
        if "gpus-per-task" in others:
            return {"ntasks": str(self.world_size)}
        if not self.num_gpus or self.gpu_request == "none" or others:
            return {}
        if self.gpu_request == "gres":
            rest = self.sbatch.get("gres")
            return {"gres": f"gpu:{self.typed(self.num_gpus)}" + (f",{rest}" if rest else "")}
        if self.gpu_request == "gpus-per-task":  # which SLURM takes beside --ntasks alone
            return {"gpus-per-task": self.typed(1), "ntasks": str(self.world_size)}
        return {"gpus-per-node": self.typed(self.num_gpus)}

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def _number(gpus: Gpus) -> int:
    return int(str(gpus or 0).rpartition(":")[2])
