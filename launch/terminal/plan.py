"""What a submission asks for, in five lines: model, data, steps, GPUs and what they cost, time and what ends it.

Must not know: torch, or any file of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from ddpm.config.model import Model
from ddpm.config.schema import Config
from ddpm.network.made import other_than_the_unet
from ddpm.run.log import counted
from ddpm.run.paths import RunDir
from launch.cluster.job import Job
from launch.cluster.site import Site
from launch.queue import chain
from launch.queue.submitting import describe
from launch.terminal import columns as table
from launch.terminal import recipes

MEASURED = {(Model(dropout=0.1), 32): (8779, "one H200, bf16")}
"""Images a second in training, by network and image size, and on what: README's table, by python -m tools.gpu."""


class Left(NamedTuple):
    """What is left to do of a run."""

    train: bool
    stages: list[str]
    step: int = 0
    """That is saved."""

    @property
    def word(self) -> str:
        """For a table."""
        if self.train:
            return f"goes on at step {self.step}"
        return "trained" if self.stages else "complete"


def print_dry_run(
    config: Config, site: Site, run: RunDir, left: Left, num_images: int | None, *,
    scripts: bool, in_container: Sequence[str],
) -> None:  # fmt: skip
    """num_images: where it is known without packing; scripts: those of its jobs too.

    in_container: what the run keeps of how ranks are started in one.
    """
    stages, train = left.stages, left.train
    for line in lines(config, site, num_images, left):
        print(f"# {line}")
    print(f"# run directory: {run.path}")
    known = config.train.total_steps is not None
    if stages:
        print(f"# then: {', '.join(stages)}" + ("" if known else ", of a set that is named after the last step"))
    print(f"# config, resolved (digest {config.digest()[:12]}):" if known else "# config:")
    print(config.to_yaml())
    jobs = chain.jobs_of(run, config, site, stages if known else [], train=train)
    if not scripts or not jobs:
        print(_nothing_done(jobs, scripts=False))
        return
    if site.is_local:
        print("# processes on this machine, one after another:")
    for job in jobs:
        if not site.is_local:
            after = " (after the job before has ended)" if job.stage != "train" else ""
            print(f"# {job.stage} job{after}, via {site.via}:")
        print(describe(job))
    if in_container and not site.is_local:
        print("# container.sh of the run, by which slurm/supervise.sh has ranks started in their container:")
        print("\n".join(in_container))
    print(_nothing_done(jobs, scripts=True))


def print_jobs(jobs: Sequence[Job], *, scripts: bool) -> None:
    """The end of a dry run of later stages. scripts: those of their jobs too."""
    if scripts:
        print("\n\n".join(map(describe, jobs)))
    else:
        print("\n".join(dict.fromkeys(f"# {job.stage}: {_asked(job)}" for job in jobs)))
    print(_nothing_done(jobs, scripts=scripts))


def _asked(job: Job) -> str:
    """What a job of a later stage asks for."""
    site = job.site
    if site.is_local:
        return f"GPUs: {_devices(site)}"
    gpus = f"{job.num_tasks} tasks; GPUs of each" if job.num_tasks > 1 else "GPUs"
    return f"{gpus}: {_devices(site)}; time: {_limit(site)}"


def _nothing_done(jobs: Sequence[Job], *, scripts: bool) -> str:
    more = ""
    if jobs and not scripts:
        what = "command" if jobs[0].site.is_local else "job script"
        more = f"; --verbose shows the exact {what}{'s' * (len(jobs) > 1)}"
    return f"# dry run: nothing was written or queued{more}"


def print_sweep(
    points: Sequence[tuple[str, Config, Mapping[str, Any]]], lefts: Sequence[Left | None], nums: Sequence[int | None],
    site: Site,
) -> None:  # fmt: skip
    """points: name, config, and the values that differ, by key; lefts: what is left of each, None of a new one; nums:
    its images to train on."""
    asked, new = [], Left(True, [])
    for (_, config, _), num, left in zip(points, nums, lefts, strict=True):
        asked.append([*lines(config, site, num, new if left and left.train else left or new)])
    stand = ["new" if left is None else left.word for left in lefts]
    print(f"# {counted(len(points), 'run')}, each:")
    for line, *others in zip_longest(*asked):
        if set(others) <= {line}:
            print(f"#   {line}")
    keys = list(points[0][2])
    rows = [{"run": name, "is": is_, **values} for (name, _, values), is_ in zip(points, stand, strict=True)]
    shown = [table.Column(name, (table.value(name),), needed=True) for name in ("run", *keys, "is")]
    print("\n".join(table.fitted(rows, 0, shown, [column.name for column in shown])[0]))
    for (name, _, _), told in zip(points, asked, strict=True):
        for line, *others in zip_longest(told, *asked):
            if line and not set(others) <= {line}:
                print(f"# {name}: {line}")


def lines(config: Config, site: Site, num_images: int | None, left: Left) -> Iterator[str]:
    """num_images: where it is known without data."""
    yield f"model: {_model(config)}"
    yield f"data: {_data(config, num_images)}"
    if not left.train:
        yield f"training: complete at step {left.step:,}" + ("" if left.stages else ", and nothing would be queued")
        return
    yield f"steps: {_steps(config, num_images)}" + (f"; it goes on from step {left.step:,}" if left.step else "")
    yield f"GPUs: {_gpus(config, site)}{_cost(config, site, left.step)}"
    yield f"time: {_time(site)}"
    own = {"cpus-per-task", "cpus-per-gpu", "exclusive"} & site.sbatch.keys()
    if site.num_gpus and site.world_size > 1 and site.cpus_per_task is None and not own:
        yield "CPUs: as many as SLURM gives unasked, often one a rank; --cpus-per-task 4 leaves NCCL some of its own"


def _network(config: Config) -> tuple[Model, int]:
    return config.model, config.data.image_size


def _model(config: Config) -> str:
    m = config.model
    classes = f"of {counted(m.num_classes, 'class')}" if m.num_classes else "without classes"
    if other := other_than_the_unet():
        return f"{other} {classes}, by ddpm/network/build.py; its parameters and memory are known once it is built"
    attention = f"attention at {', '.join(map(str, m.attention_resolutions))}" if m.attention_resolutions else ""
    widths = " ".join(str(m.base_channels * mult) for mult in m.channel_mults)
    told = [
        f"U-Net {classes}",
        f"{config.network.num_parameters / 1e6:.1f} M parameters",
        f"channels {widths}",
        f"{counted(m.blocks_per_level, m.block + ' block')} a level",
        attention,
    ]
    return ", ".join(filter(None, told))


def _data(config: Config, num_images: int | None) -> str:
    d = config.data
    where = f" in {d.path}" if d.path else {"digits": "", "images": ""}.get(d.name, ", downloaded where it is missing")
    many = f", {counted(num_images, 'image', ',')}" if num_images else ""
    return f"{d.name}{where}, {d.image_size}x{d.image_size}{many}{', mirrored at random' if d.flip else ''}"


def _steps(config: Config, num_images: int | None) -> str:
    t = config.train
    if t.total_steps is None:
        batch = counted(t.global_batch, "image")
        return f"{recipes.length(config)} of {batch} a step (steps known once the data is packed)"
    images = t.total_steps * t.global_batch
    epochs = f" ({counted(round(images / num_images), 'epoch', ',')})" if num_images else ""
    return f"{t.total_steps:,} of {counted(t.global_batch, 'image')}: {counted(images, 'image', ',')}{epochs}"


def _gpus(config: Config, site: Site) -> str:
    ranks = site.world_size
    share = f"{counted(config.train.global_batch // ranks, 'image')} a rank and step" if ranks > 1 else ""
    return ", ".join(filter(None, [_devices(site), share]))


def _devices(site: Site) -> str:
    if not site.num_gpus:
        where = "on this machine" if site.is_local else f"on {counted(site.nodes, 'node')}"
        return f"none asked for, {counted(site.world_size, 'rank')} {where}"
    kind = f" {site.gpu_type}" if site.gpu_type else ""
    nodes = f" on each of {site.nodes} nodes" if site.nodes > 1 else " on one node"
    return f"{site.num_gpus}{kind}{nodes}"


def _time(site: Site) -> str:
    if site.is_local:
        return "until it is done, in the background"
    return f"{_limit(site)}; {site.lead_s} s before its end the run saves, goes back into the queue and goes on"


def _limit(site: Site) -> str:
    return (
        "no --time, so the partition's" if site.time is None else f"{site.time // 60} h {site.time % 60:02} min a job"
    )


def _cost(config: Config, site: Site, done: int) -> str:
    if not site.num_gpus:
        return ""
    if (hours := gpu_hours(config, done)) is None:
        return "; GPU hours unknown here, status.py tells the end once it runs"
    speed, how = MEASURED[_network(config)]
    about = f"about {hours:.0f} GPU hours" if hours >= 1 else "less than a GPU hour"
    return f"; {about} at {speed:,} images/s, as measured on {how}"


def gpu_hours(config: Config, done: int = 0) -> float | None:
    """Of training after step `done`, on one GPU as in MEASURED; None where its speed or its length in steps is not
    known."""
    speed, _ = MEASURED.get(_network(config), (0, ""))
    if not speed or config.train.total_steps is None or other_than_the_unet():
        return None
    return (config.train.total_steps - done) * config.train.global_batch / speed / 3600
