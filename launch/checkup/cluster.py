"""What SLURM says on this machine, and whether a save fits into what a job is given at its end."""

from __future__ import annotations

from pathlib import Path

from ddpm.errors import DDPMError
from ddpm.run.log import amount, counted
from ddpm.run.paths import RunDir
from launch.checkup.files import BYTES_PER_PARAMETER, written_per_s
from launch.checkup.finding import Finding, Findings, judged
from launch.cluster import inquiry, scheduler
from launch.cluster.job import Job
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.cluster.values import slurm_minutes


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
        version = inquiry.version()
        oldest = "{}.{}".format(*inquiry.OLDEST)
        yield judged(
            not inquiry.is_older(version),
            f"SLURM answers: {version}, cluster {named}",
            f"{oldest} is the oldest that was tried: see configs/quickstart.yaml through a scontrol requeue first",
        )
        yield from _site(settle(site, dry_run=False), root)
    except DDPMError as e:
        yield Finding("fail", str(e), scheduler.NOT_REACHED if isinstance(e, scheduler.NoAnswer) else "")
        return
    yield from _saving(site, root, num_parameters)


def _site(site: Site, root: Path) -> Findings:
    there = scheduler.partitions()
    default = next((name for name, p in there.items() if p.is_default), None)
    name = site.partition or default
    if not there:
        yield Finding("warn", "this site shows its partitions to no user", "what jobs ask for is known to fit by a try")
    elif name is None:
        have = ", ".join(there)
        yield Finding(
            "fail", "no partition is given, and this cluster has no default", f"give one of them: --partition {have}"
        )
        return
    name = name or "that SLURM chooses"
    most = max((there[one].gpus_per_node for one in name.split(",") if one in there), default=0)
    wanted = f"{site.gpus_per_node} GPU{'s' if site.num_gpus > 1 else ''} a node" if site.num_gpus else "no GPUs"
    has = f", of {most} that a node has (--gpus-per-node)" if most > site.num_gpus else ""
    yield Finding("pass", f"partition {name}{'' if site.partition else ', the default'}: jobs ask for {wanted}{has}")
    run = RunDir(root / "doctor")
    for stage, shards in (("train", ()), ("sample", tuple(range(16))), ("evaluate", ())):
        job = scheduler.fitting(Job(stage, run, site, "set" if stage != "train" else "", shards))
        refused = _tried(job)
        while refused and job.num_tasks > 1 and scheduler.too_many(refused):
            job = job.with_tasks(job.num_tasks // 2)  # as a submission does
            refused = _tried(job)
        told = f"a job to {stage}" + (f" of {counted(job.num_tasks, 'task')}" if shards else "")
        if refused:
            change = "change what that names (--partition, --account, --qos, --constraint, --time, --mem)"
            step = scheduler.wait_for_room(refused) or f"{change}, or ask your site"
            yield Finding("fail", f"SLURM would refuse {told}: {refused}", step)
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
    if site.time is None and partition:
        limit = next((t for t in map(partition.get, ("DefaultTime", "MaxTime")) if t and t[0].isdigit()), None)
        long = limit is None or slurm_minutes(limit) >= 60
        told = f"without --time a job here may run for {limit or 'as long as it takes'}"
        yield judged(long, told, "give --time: shorter jobs start sooner, and a run comes back")
    if (size := int(known.get("MaxArraySize", "1001"))) > 1:
        yield Finding("pass", f"arrays have at most {counted(size, 'task')}")
    else:
        yield Finding("warn", "arrays are off", "nothing: one job makes all shards of a set")
    if (most := inquiry.most_submitted(site.qos)) is not None:
        yield judged(
            most > 2,
            f"you may have {counted(most, 'job')} in the queue",
            "a chain needs three: submit without --then, and again with it once that has ended",
        )
    if (most := inquiry.most_at_work(site.qos)) is not None:
        yield Finding("pass", f"of your jobs, or tasks of arrays, at most {most} run at a time: others wait")


def _saving(site: Site, root: Path, num_parameters: int) -> Findings:
    """Whether a save fits into what a job is given when its nodes are taken."""
    size = num_parameters * BYTES_PER_PARAMETER
    try:
        rate = written_per_s(root)
    except OSError:
        return  # told already
    save_s = size / rate
    told = scheduler.preemption(site.partition)
    line = f"a checkpoint of {amount(size)} takes {_seconds(save_s)} to write here"
    in_time = save_s < site.lead_s / 2
    yield judged(in_time, f"{line}; {site.lead_s} s are left before a time limit", "raise signal_lead_s in the profile")
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
