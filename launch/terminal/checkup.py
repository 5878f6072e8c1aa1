"""Whether this account, on this cluster, can do what a submission will ask for: told before anything is queued.

Each finding is a fact and, where something is to be done, what. Loads no torch; a node's torch is asked by a job.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddpm.config.schema import Config
from ddpm.errors import DDPMError, RequestError
from ddpm.run.files import read_json, write_json
from ddpm.run.log import amount, plain
from ddpm.run.paths import RunDir
from launch.cluster import code, inquiry, scheduler
from launch.cluster.job import Job, at_home
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.cluster.values import slurm_minutes, written

BYTES_PER_PARAMETER = 16
"""Of a checkpoint: weights, their average and Adam's two moments, float32."""
PROBE_BYTES = 64 << 20
SKEW_S = 2.0
POLL_S = 2.0
FILES_OF_A_RUN = 2_000
"""Its sets, shards, logs and the data's cache, generously."""


FETCHED = {
    "cifar10": "cifar-10-python.tar.gz",
    "inception": "pt_inception-2015-12-05-6726825d.pth",
    "dinov2": "dinov2_vitl14_pretrain.pth",
}
"""Data and extractors -> the one file that is fetched for them, as it is published."""
BY_HAND = {name: f"bring {file} by hand: python tools/prefetch.py --from {file}" for name, file in FETCHED.items()} | {
    "celeba": "bring img_align_celeba.zip and its lists by hand: data.path=THEIR_FOLDER, here and at submission",
}
BY_HAND["cifar10"] += "; or type data.path=FOLDER_OR_ZIP, here and at submission, for images that lie elsewhere"
"""What to do where they cannot be fetched from here."""


@dataclass(frozen=True)
class Finding:
    verdict: Literal["pass", "warn", "fail"]
    what: str
    remedy: str = ""


Findings = Iterator[Finding]


def _judged(good: bool, what: str, remedy: str = "", or_else: Literal["warn", "fail"] = "warn") -> Finding:
    return Finding("pass", what) if good else Finding(or_else, what, remedy)


def cluster(site: Site, root: Path, num_parameters: int) -> Findings:
    """What SLURM says on this machine. num_parameters: of the network that will be trained."""
    lacking = [name for name in inquiry.NEEDED if not scheduler.available(name)]
    if lacking:
        yield Finding("fail", f"no {', '.join(lacking)} here", "log in to the login node, or load its slurm module")
        return
    yield Finding("pass", f"SLURM's commands are here: {', '.join(inquiry.NEEDED)}")
    if not scheduler.available("sacctmgr"):
        yield Finding("warn", f"no sacctmgr here, which {inquiry.COMMANDS['sacctmgr']}", "ask your site, or do without")
    try:
        named = scheduler.cluster_name() or "without a name"
        yield Finding("pass", f"SLURM answers: {inquiry.version()}, cluster {named}")
        yield from _site(settle(site, dry_run=False), root)
    except DDPMError as e:
        yield Finding("fail", str(e), scheduler.NOT_REACHED if isinstance(e, scheduler.NoAnswer) else "")
        return
    yield from _saving(site, root, num_parameters)


# ---------------------------------------------------------------- what SLURM allows


def _site(site: Site, root: Path) -> Findings:
    there = scheduler.partitions()
    default = next((name for name, p in there.items() if p.is_default), None)
    name = site.partition or default
    if name is None:
        have = ", ".join(there)
        yield Finding(
            "fail", "no partition is given, and this cluster has no default", f"give one of them: --partition {have}"
        )
        return
    gpus = f"{site.gpus_per_node} GPU{'s' if site.num_gpus > 1 else ''} a node" if site.num_gpus else "no GPUs"
    yield Finding("pass", f"partition {name}: {gpus}" + ("" if site.partition else ", the default"))
    run = RunDir(root / "doctor")
    for stage, shards in (("train", ()), ("sample", tuple(range(16))), ("evaluate", ())):
        job = scheduler.fitting(Job(stage, run, site, "set" if stage != "train" else "", shards))
        refused = _tried(job)
        while refused and job.num_tasks > 1 and scheduler.too_many(refused):
            job = job.with_tasks(job.num_tasks // 2)  # as a submission does
            refused = _tried(job)
        told = f"a job to {stage}" + (f" of {job.num_tasks} tasks" if shards else "")
        if refused:
            yield Finding(
                "fail",
                f"SLURM would refuse {told}: {refused}",
                "change what that names (--partition, --account, --qos, --time, --mem), or ask your site",
            )
        else:
            yield Finding("pass", f"SLURM would take {told}")
    asked = ("JobRequeue", "PreemptType", "PreemptMode", "MaxArraySize", "KillWait")
    known = inquiry.settings(*asked)
    if known.get("JobRequeue") == "0":
        yield Finding("pass", "JobRequeue=0: jobs ask for --requeue themselves, as ours do")
    yield from _limits(site, known, inquiry.of_partition(name.split(",")[0]))


def _tried(job: Job) -> str:
    """Why SLURM would refuse it, or ""."""
    try:
        inquiry.try_out(job)
        return ""
    except scheduler.SchedulerError as e:
        return str(e)


def _limits(site: Site, known: dict[str, str], partition: dict[str, str]) -> Findings:
    state = partition.get("State", "UP")
    if state != "UP":
        yield Finding("warn", f"the partition is {state}", "jobs wait until it is UP again")
    if site.time is None:
        limit = next((t for t in map(partition.get, ("DefaultTime", "MaxTime")) if t and t[0].isdigit()), None)
        long = limit is None or slurm_minutes(limit) >= 60
        told = f"without --time a job here may run for {limit or 'as long as it takes'}"
        yield _judged(long, told, "give --time: shorter jobs start sooner, and a run comes back")
    if (size := int(known.get("MaxArraySize", "1001"))) > 1:
        yield Finding("pass", f"arrays have at most {size - 1} tasks")
    else:
        yield Finding("warn", "arrays are off", "nothing: one job makes all shards of a set")
    if (most := inquiry.most_submitted(site.qos)) is not None:
        yield _judged(
            most > 2,
            f"you may have {most} jobs in the queue",
            "a chain needs three: submit without --then, and again with it once that has ended",
        )


def _saving(site: Site, root: Path, num_parameters: int) -> Findings:
    """Whether a save fits into what a job is given when its nodes are taken."""
    size = num_parameters * BYTES_PER_PARAMETER
    try:
        rate = _written_per_s(root)
    except OSError:
        return  # told already
    save_s = size / rate
    told = scheduler.preemption(site.partition)
    line = f"a checkpoint of {amount(size)} takes {_seconds(save_s)} to write here"
    in_time = save_s < site.lead_s / 2
    yield _judged(
        in_time, f"{line}; {site.lead_s} s are left before a time limit", "raise signal_lead_s in the profile"
    )
    kinds = {k: v for k, v in told.items() if k.startswith(("partition ", "qos "))}
    wanted = f"qos {site.qos}" if "qos" in told.get("PreemptType", "") and site.qos else None
    mercies = {wanted: kinds[wanted]} if wanted in kinds else kinds
    if "none" in told.get("PreemptType", "none"):
        yield Finding("pass", "this cluster pre-empts nothing")
        return
    for name, said in mercies.items():
        mode, grace_s = scheduler.mode_and_grace(said)
        mode = told.get("PreemptMode", "") if mode.lower() in ("", "cluster") else mode
        left = grace_s + int("".join(c for c in told.get("KillWait", "30") if c.isdigit()) or 30)
        if mode.upper() in ("OFF", "DISABLED"):
            yield Finding("pass", f"{name} is not pre-empted")
        elif left < save_s:
            told_short = f"{name}: pre-emption leaves {left} s, less than a save takes"
            yield Finding("warn", told_short, "set checkpoint.every_min lower: what is lost is at most that")
        else:
            how = "a successor job goes on" if "CANCEL" in mode.upper() else "SLURM requeues the job"
            yield Finding("pass", f"{name}: pre-emption ({mode.lower()}) leaves {left} s, and {how}")


def _seconds(took: float) -> str:
    return f"about {took:.1f} s" if took >= 0.1 else "less than 0.1 s"


# ---------------------------------------------------------------- files


def space_of_a_run(config: Config, num_images: int | None) -> tuple[int, int]:
    """Bytes that a run has in the end, and how many milestones of it are kept for good: its checkpoints, averaged
    weights and samples. num_images: of the data, by which epochs are counted; None: not known, and those count as none.
    """
    if num_images is not None or config.train.total_images:
        config = config.resolve_length(num_images or 0)
    steps, kept, num_parameters = config.train.total_steps or 0, config.checkpoint, config.network.num_parameters
    milestones = steps // kept.milestone_every_steps if kept.milestone_every_steps else 0
    if kept.milestone_every_epochs and num_images:
        milestones += steps * config.train.global_batch // (kept.milestone_every_epochs * num_images)
    checkpoints = (milestones + kept.keep_last) * num_parameters * BYTES_PER_PARAMETER
    averages = (milestones + 1) * num_parameters * 4
    return checkpoints + averages + config.sample.num_samples * config.data.image_size**2 * 3, milestones


def storage(config: Config, root: Path, num_images: int | None) -> Findings:
    """Whether there is room for a run, and its data. num_images: of the data."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if not os.access(root, os.W_OK):
            yield Finding("fail", f"{root} cannot be written ({e.strerror})", "choose another place: --root, DDPM_RUNS")
            return
        told = f"{root} has no file locks ({e.strerror}): a run's fence is then its only guard"
        yield Finding("warn", told, "keep runs where there are, if you can")
    need, milestones = space_of_a_run(config, num_images)
    there = os.statvfs(root)
    free = there.f_bavail * there.f_frsize
    told = (
        f"{root}: {amount(free)} free, and a run has about {amount(need)} in the end, {milestones} milestones included"
    )
    yield _judged(free > need, told, "remove old runs (launch/remove.py), or choose another --root")
    if there.f_files:
        told = f"{root}: room for {there.f_favail:,} files, and a run has up to {FILES_OF_A_RUN:,}"
        yield _judged(there.f_favail > FILES_OF_A_RUN, told, "remove what you do not need, or choose another --root")
    yield from _data(config, root)


def _data(config: Config, root: Path) -> Findings:
    if config.data.path is not None:  # as a submission looks, which decodes nothing yet
        from ddpm.data.packed import open_source

        try:
            source = open_source(config.data)
        except RequestError as e:
            yield Finding("fail", str(e))
            return
        own = source.kind in ("folder", "zip", "array") and "train" in source.members
        told = f"{source.num_images('train'):,} images to train on" if own else "is there"
        yield Finding("pass", f"data.path = {config.data.path}: {told}")
    if config.data.path is not None or config.data.name in ("digits", "images"):
        return
    there = (root / ".cache" / "data").glob("*/meta.json")
    if packed := [p for p in there if (read_json(p) or {}).get("name") == config.data.name]:
        yield Finding("pass", f"{config.data.name} is packed in {packed[0].parent.parent}")
        return
    host = "www.cs.toronto.edu" if config.data.name == "cifar10" else "drive.google.com"
    try:
        socket.create_connection((host, 443), timeout=5).close()
        yield Finding("pass", f"{config.data.name} is not here yet: the first submission fetches it from {host}")
    except OSError as e:
        told = f"{config.data.name} is not here, and {host} does not answer ({e})"
        yield Finding("fail", told, BY_HAND[config.data.name])


def _written_per_s(root: Path) -> float:
    """Bytes a second that reach the disk. Raises OSError."""
    piece = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=root) as f:
        began = time.monotonic()
        for _ in range(PROBE_BYTES >> 20):
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())
        return PROBE_BYTES / (time.monotonic() - began)


# ---------------------------------------------------------------- a node


def probe(site: Site, root: Path, patience_s: float) -> Findings:
    """What a node of the partition has, by a job of a minute on one."""
    site = settle(site, dry_run=False)
    where = root / ".cache" / "doctor"
    where.mkdir(parents=True, exist_ok=True)
    asked = where / f"{os.getpid()}.json"
    said, asked_at = {"token": os.urandom(8).hex()}, time.time()
    write_json(asked, said, replace=True)
    answer, log, script = (asked.with_suffix(suffix) for suffix in (".node.json", ".out", ".sh"))
    kept = RunDir(where / "run")
    kept.path.mkdir(exist_ok=True)
    home = at_home(code.unpack(kept))
    try:
        ask = 'exec "$DDPM_PYTHON" -m launch.terminal.node_report "$1"'
        script.write_text("\n".join(["#!/bin/bash", *site.setup, ask, ""]))
        brief = site.model_copy(update={"nodes": 1, "time": 5})
        job = inquiry.submit_probe(Job("train", kept, brief), home, script, asked, log)
        state = _wait(job, answer, patience_s)
        if (told := read_json(answer)) is None:
            lines = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
            heard = "".join(f"\n      {plain(line)}" for line in lines)
            remedy = "mend what it says: `setup` lines, the environment that nodes see; or a longer --wait-s"
            yield Finding("fail", f"job {job} told nothing of its node ({state}){heard}", remedy)
            return
        yield from _node(told, said, asked_at, site)
    finally:
        for path in (asked, answer, log, script):
            path.unlink(missing_ok=True)
        shutil.rmtree(kept.path, ignore_errors=True)


def _wait(job: str, answer: Path, patience_s: float) -> str:
    """Until it has answered or is gone; what it was last. Takes it back where it does neither."""
    until = time.monotonic() + patience_s
    gone = 0
    while time.monotonic() < until and not answer.exists():
        with contextlib.suppress(scheduler.SchedulerError):
            found = scheduler.look_up([job]).get(job)
            gone = 0 if found else gone + 1
            if gone > 3:  # a shared file may come later than the end of its job
                return "it ended"
        time.sleep(POLL_S)
    if answer.exists():
        return "it ended"
    found = scheduler.look_up([job]).get(job)
    scheduler.cancel([job])
    wait = scheduler.explain(job, found) if found else None
    return f"still {found.state.lower() if found else 'waiting'} after {patience_s:.0f} s" + (f": {wait}" * bool(wait))


def _node(told: dict[str, Any], said: dict[str, Any], asked_at: float, site: Site) -> Findings:
    host = told["host"]
    told_seen = f"node {host} and this machine see the same files in the runs' place"
    yield _judged(told["sees"] == said, told_seen, f"they do not: choose a --root that {host} shares", "fail")
    if (off := max(asked_at - told["time"], told["time"] - time.time())) > SKEW_S:  # it was asked in between
        yield Finding(
            "warn",
            f"the clock of {host} is {off:.0f} s off, at least",
            "tell your site: times of events are wrong by as much",
        )
    for name in set(told["lacks"]) & set(inquiry.NEEDED):
        yield Finding("warn", f"no {name} on {host}, which {inquiry.COMMANDS[name]}", "have a `setup` line bring it")
    if error := told.get("torch_error"):
        remedy = f"is its driver too old (nvidia-smi on {host}; README, CUDA)? Else rm -r .venv, then tools/env.sh anew"
        yield Finding("fail", f"torch on {host}: {error}", remedy)
        return
    gpus = f"{told['gpus']} x {told.get('gpu')}, NCCL {told.get('nccl')}" if told["gpus"] else "no GPU"
    parts = [f"Python {told['python']}", f"torch {told['torch']} (CUDA {told['cuda']})", gpus]
    parts += [f"{told['cpus']} CPUs for us", f"{amount(told['tmp_bytes'])} free in its tmp"]
    good = not site.num_gpus or told["gpus"] > 0
    yield _judged(good, f"node {host}: {', '.join(parts)}", _no_gpu_there(told, site), "fail")


def _no_gpu_there(told: dict[str, Any], site: Site) -> str:
    """What to do where torch sees none on a node."""
    asked = f"the probe asked for --gpus-per-node {site.gpus_per_node}, and torch sees none"
    if told["cuda"] is None:
        return f"{asked}: it is one without CUDA; rm -r .venv, then TORCH=default tools/env.sh makes another"
    return (
        f"{asked}, though it is one for CUDA: is there a driver for it (nvidia-smi on {told['host']}; README, CUDA), "
        f"and was the job given a GPU? Else ask for it in your site's words: gpu_request in the profile"
    )


# ---------------------------------------------------------------- a profile


def profile(site: Site) -> str:
    """A first site profile, of what was seen."""
    site = settle(site, dry_run=False)
    there = scheduler.partitions()
    name = site.partition or next((n for n, p in there.items() if p.is_default), None)
    lines = ["# Drafted by launch/doctor.py from what this cluster says; configs/cluster/example.yaml has the rest."]
    lines += [f"partition: {name}"] if name else ["# partition:"]
    accounts = inquiry.accounts()
    if accounts:
        lines.append(f"account: {accounts[0]}" if len(accounts) == 1 else f"# account: one of {', '.join(accounts)}")
    limit = there[name].time_limit if name in there else None
    most = slurm_minutes(limit) if limit else 24 * 60
    lines.append(
        f"time: {written(min(most, 4 * 60))}                  # of one job; the run comes back until it is done"
    )
    lines.append(f"gpus_per_node: {site.gpus_per_node}")
    lines.append("# setup: ['module load cuda']")
    return "\n".join(lines) + "\n"
