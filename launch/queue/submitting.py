"""A job gets going: by submitit or sbatch, behind one small interface, or as a process on this machine.

Both ways to SLURM run the same entry (`python -m launch.jobs`), begin with slurm/supervise.sh and carry the same
sbatch options, so that stopping and coming back are the same. The options are given as flags: exported SBATCH_*
variables, which go before #SBATCH lines, are to decide only what nobody asked for.
"""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import replace
from typing import Any

from ddpm.errors import RequestError
from ddpm.run.events import EventLog
from ddpm.run.paths import RunDir
from launch.cluster import code, environment, scheduler
from launch.cluster.job import Job
from launch.cluster.site import Site
from launch.queue import local, nodes
from launch.queue.directory import of_record
from launch.queue.waiting import submission

ALSO = ("preemption", "launch", "code", "despite")
"""What the event of a submission says that its successor's says too."""


def describe(job: Job) -> str:
    """What --dry-run shows of a job: its processes on this machine, or the exact script that SLURM would get."""
    if not job.site.is_local:
        return scheduler.describe(fitting(job))
    return shlex.join(local.stage_command(job))


def by_hand(job: Job) -> str:
    """What a person types, in any directory, to queue `job`."""
    return scheduler.by_hand(fitting(job))


def fitting(job: Job) -> Job:
    """The job as this cluster, and what the run has seen of it, want it: no more tasks than an array may have, and
    without nodes on which lives of the run died by themselves."""
    return replace(scheduler.fitting(job), without=nodes.to_avoid(job)) if scheduler.available() else job


def submit(job: Job) -> str:
    """Queue `job`; returns its id. Where its tasks are more than the user may have in the queue, with fewer of them.

    Raises RequestError with SLURM's words; NoAnswer, after which it may be in the queue.
    """
    job = fitting(job)
    while True:
        try:
            return _submit(job)
        except RequestError as e:
            if job.num_tasks == 1 or not scheduler.too_many(str(e)):
                raise
            job = job.with_tasks(job.num_tasks // 2)


def _submit(job: Job) -> str:
    options = job.options()
    kept = {k: v for k, v in options.items() if k != "dependency"}
    home = code.unpack(job.run)
    told = scheduler.preemption(str(options.get("partition") or "") or None)  # now: an interrupt may come meanwhile
    try:
        job_id = scheduler.submit(job)
    except (scheduler.NoAnswer, scheduler.NoJobId) as e:
        raise scheduler.NoAnswer(
            f"no clear answer from SLURM, which may have queued the {job.stage} job all the same: {e}\n"
            f"Once it answers, look with {scheduler.typed('squeue')} --me --name {options['job-name']}, "
            f"{scheduler.typed('scancel')} what that shows, and submit again to go on"
        ) from None
    except scheduler.SchedulerError as e:
        step = scheduler.wait_for_room(str(e)) or "python launch/doctor.py asks what this site takes of a job"
        raise RequestError(f"SLURM refused the {job.stage} job: {e}\n({step})") from None
    try:
        more: dict[str, Any] = {"tasks": job.num_tasks} if job.shards else {}
        if job.despite:
            more["despite"] = job.despite
        if job.stage == "evaluate":  # an evaluation may have missing shards made
            more["launch"] = job.site.model_dump(mode="json", exclude_defaults=True)
        if told:  # for nodes that cannot ask SLURM
            more["preemption"] = told
        _submitted(job.run, job_id, job.stage, job.site.via, job.world_size, set=job.set_name, options=kept,
                   code=home.name, args=list(job.extra_args), **more)  # fmt: skip
    except BaseException:  # without its event nobody could find the job again
        scheduler.cancel([job_id])
        raise
    return job_id


def submit_alone(job: Job) -> tuple[str, str]:
    """Queue a job that no chain of ours begins with; its id, and what it waits for. Raises as `submit` does."""
    job_id = submit(job)
    try:
        return job_id, "" if job.after else why_it_waits(job_id, job.stage, f"{scheduler.typed('scancel')} {job_id}")
    except RequestError:
        scheduler.cancel([job_id])
        raise


def why_it_waits(job_id: str, stage: str, end: str) -> str:
    """What a job that was just queued waits for and somebody can do about it, in a line; "" where there is nothing.
    end: the command that takes it, and what follows it, out of the queue.

    Raises RequestError where SLURM has taken a request that it will never start.
    """
    try:
        found = scheduler.look_up([job_id]).get(job_id)
    except scheduler.SchedulerError:
        return ""
    wait = scheduler.explain(job_id, found) if found else None
    if found is None or wait is None or not (wait.next_step or wait.start):
        return ""
    if wait.never:
        raise RequestError(f"SLURM took the {stage} job, and would never start it, so it was taken back: {wait}")
    return scheduler.waiting([job_id], str(scheduler.explain(job_id, found, end)))


def sent_tasks(run: RunDir, job_id: str) -> int:
    """The number of tasks with which a sample job was submitted."""
    return int(submission(run, job_id).get("tasks") or 1)


def sent_where(run: RunDir, job_id: str) -> Site | None:
    """What an evaluation was submitted with; None where its event does not say."""
    try:
        return of_record(submission(run, job_id)["launch"], f"the submission of job {job_id}")
    except (KeyError, TypeError, RequestError):
        return None


def _submitted(run: RunDir, job: str, stage: str, via: str, world_size: int, **fields: Any) -> None:
    EventLog(run, job, 0, environment.host(), prefix="submit-", cluster=scheduler.cluster_name()).append(
        "submitted", world_size=world_size, step=run.latest_step(), stage=stage, via=via, run=str(run.path), **fields
    )


def submit_successor(run: RunDir, stage: str, job: str, avoided: str = "") -> str:
    """Where requeue is forbidden: submit what `job` was submitted with once more, by template. Raises SchedulerError.

    avoided: nodes that it is not to have.

    The event that it was is written where there is room for it.
    """
    told = submission(run, job)  # a job queued by hand has no such event, and any of it may be lost
    options = {**(told.get("options") or _as_it_is(job)), **({"exclude": avoided} if avoided else {})}
    options.pop("clusters", None)  # the successor stays on this cluster
    if "output" in options:  # the pattern of an array's task, which the successor is not
        options["output"] = str(options["output"]).replace("%A_%a", "%j")
    record = {"set": told.get("set", environment.sample_set()), "options": options, "args": told.get("args") or []}
    args = [str(run.path), *([record["set"]] if record["set"] else []), *record["args"]]
    new = scheduler.submit_again(stage, {"export": "ALL", **options}, args)
    with contextlib.suppress(OSError):
        _submitted(run, new, stage, "sbatch", environment.num_tasks(), successor_of=job,
                   **record, **{k: told[k] for k in ALSO if k in told})  # fmt: skip
    return new


def _as_it_is(job: str) -> dict[str, str | bool]:
    """sbatch options that ask for what the job has in which this runs. Raises SchedulerError."""
    options: dict[str, str | bool] = {**environment.allocation()}
    if shown := scheduler.show(job):
        told: dict[str, str | bool] = {"time": shown.time_limit, "no-requeue": not shown.may_requeue}
        options |= {key: value for key, value in told.items() if value}
    return options
