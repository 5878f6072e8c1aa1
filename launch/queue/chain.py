"""What a run still needs, and the chain of jobs for it: train, an array over the shards, the score.

The run directory says what is done, and SLURM what is queued. Submissions and jobs both ask here.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddpm.config.schema import Config
from ddpm.errors import EXIT_FATAL, DoNotRetry, RequestError
from ddpm.run import generations
from ddpm.run.events import read_events
from ddpm.run.files import DamagedFile
from ddpm.run.log import counted, say
from ddpm.run.paths import RunDir
from ddpm.run.state import finished_step
from launch.cluster import environment, scheduler
from launch.cluster.environment import JobEnvironment
from launch.cluster.job import Job, ranges
from launch.cluster.site import Site
from launch.queue import local, sets
from launch.queue.directory import site_of
from launch.queue.nodes import bad_nodes, to_avoid
from launch.queue.submitting import sent_tasks, sent_where, submit, why_it_waits
from launch.queue.turns import turn
from launch.queue.waiting import (
    evaluations_in_queue,
    is_told_to_stop,
    jobs_in_queue,
    known_stop,
    on_other_clusters,
    slurm_jobs,
)
from launch.queue.work import to_end

MAX_ROUNDS = 3


# ---------------------------------------------------------------- what is left


def remaining(run: RunDir, config: Config, stages: list[str]) -> tuple[bool, list[str]]:
    """What an existing run still needs: whether to train, and the later stages that are not done.

    Raises RequestError if its sample set was begun with another request.
    """
    name = sets.chain_set(run, config)
    sampled = "sample" not in stages or not sets.shards_to_make(run, config, name)
    if finished_step(run, config) is None:
        return True, stages
    scored = "evaluate" not in stages or sets.score_by(run, name, config.evaluate) is not None
    return False, [] if sampled and scored else stages


def damage(run: RunDir) -> str | None:
    """Why the last checkpoint cannot be used, after reading all of it and its EMA weights; None if it can."""
    try:
        return generations.ema_damage(run, generations.verify(run, run.latest_step()))
    except (DamagedFile, OSError) as e:
        return str(e)


def nothing_to_train(run: RunDir, config: Config) -> str | None:
    """Why training must not start, or None."""
    if finished_step(run, config) is not None:
        step = run.latest_step()
        if (why := damage(run)) is None:
            return f"the run is complete at step {step}: nothing to do"
        say("the last checkpoint is damaged: going on from the newest good one", step=step, reason=why)
    if run.is_stopped():
        return f"{run.stop_file} forbids training: submit again, which removes it"
    return None


def is_training(run: RunDir) -> bool:
    """Whether a training job is queued or running, in SLURM or on this machine. Raises SchedulerError."""
    return local.running(run) is not None or bool(jobs_in_queue(run, "train") or on_other_clusters(run, "train"))


def lift_stop(run: RunDir) -> None:
    """Remove STOP, since submitting again means going on. Raises RequestError if it cannot be removed."""
    if run.is_stopped():
        try:
            is_folder = run.stop_file.is_dir() and not run.stop_file.is_symlink()
            (Path.rmdir if is_folder else Path.unlink)(run.stop_file)
        except OSError as e:
            raise RequestError(
                f"{run.stop_file} forbids training and cannot be removed ({e.strerror}): remove it, then submit again"
            ) from None
        print(f"removed {run.stop_file}: submitting again means going on")


def ways_on(run: RunDir) -> str:
    """The end of a message: what a person can do about a run whose files are missing or damaged."""
    return (
        f"Bring back what is missing (rsync -a --checksum WHERE-IT-IS/ {run.quoted}/), or see what holds: python "
        f"launch/recover.py {run.quoted} (with --rebuild it makes manifests for checkpoints that prove themselves). To "
        f"start over on purpose: python launch/recover.py {run.quoted} --start-over, or submit under another --name"
    )


# ---------------------------------------------------------------- its jobs


def jobs_of(run: RunDir, config: Config, site: Site, stages: list[str], *, train: bool = True) -> list[Job]:
    """The jobs of the chain: training, then an array over the missing shards, then the score."""
    name = sets.chain_set(run, config)
    jobs = [Job("train", run, site)] if train else []
    if "sample" in stages and (shards := sets.shards_to_make(run, config, name)):
        jobs.append(Job("sample", run, site, name, tuple(shards)))
    if "evaluate" in stages:
        jobs.append(Job("evaluate", run, site, name))
    return jobs


@scheduler.asked_once()
def queue(
    jobs: list[Job], config: Config, after: Sequence[str] = (), *, why: bool = True
) -> tuple[list[str], list[str]]:
    """Submit a chain of jobs, each to start after the one before has ended in any way; queued ones are not repeated.
    after: ids of jobs that the first one waits for. why: ask what the first one waits for.

    Returns the job ids of the whole chain, and lines to print once all is queued (printing may fail). If a later job is
    refused the chain ends before it. After another error all new jobs are cancelled, except if SLURM does not answer:
    a second submission then finds what was queued.
    """
    there = [_in_queue(job, config) for job in jobs]
    known = bad_nodes(jobs[0].run) if jobs else []
    new: list[str] = []
    ids: list[list[str]] = []
    told: list[str] = []
    refused: RequestError | None = None
    try:
        while refused is None and len(ids) < len(jobs):
            job, mine = jobs[len(ids)], there[len(ids)]
            try:
                if mine and ids and ids[-1][0] in new:  # what it waited for was cancelled
                    _wait_for(mine, ids[-1][0])
                ids.append(mine or [submit(replace(job, after=":".join(ids[-1] if ids else after) or None))])
                new += [] if mine else ids[-1]
            except RequestError as e:
                refused = e
                if smaller := _with_room(jobs, ids, new, str(e)):
                    jobs, refused = smaller, None
                elif not ids:
                    raise
        if new[1:] and bad_nodes(jobs[0].run) != known:  # the first has begun, and has found a bad node
            _catch_up(jobs, ids, new[1:])
        # the later ones wait for the first, whatever they ask for
        asks = why and ids and ids[0] == new[:1]
        waits = why_it_waits(new[0], jobs[0].stage, to_end(jobs[0].run)) if asks else ""
    except scheduler.NoAnswer:
        raise
    except Exception:
        if new:
            scheduler.cancel(new)
        raise
    for job, mine in zip(jobs, ids, strict=False):
        how = "queued" if mine[0] in new else "in the queue already"
        told.append(f"{how}: {job.stage} as job {' '.join(mine)}{tasks_told(job, mine[0]) if mine[0] in new else ''}")
    told += [waits] if waits else []
    if refused is not None:
        rest = " and ".join(job.stage for job in jobs[len(ids) :])
        told.append(
            f"not queued: {rest}. {refused}\nWhat is queued stays. Add the rest, once it can be, by the same command:\n"
            f"  {environment.command_line()}"
        )
    if jobs and jobs[0].run.is_stopped() and not jobs[0].despite:
        stop = jobs[0].run.stop_file
        told.append(f"but {stop} is there, which ends each of them at its start or next step: remove it to go on")
    return [job for mine in ids for job in mine], told


def _wait_for(later: list[str], new: str) -> None:
    """Make jobs that are queued already wait for a new one."""
    for job in later:
        with contextlib.suppress(scheduler.SchedulerError):  # it has just begun, and ends by itself
            scheduler.make_wait(job, new)


def _catch_up(jobs: list[Job], ids: list[list[str]], late: list[str]) -> None:
    """Exclude from the jobs `late` the nodes on which a life has died since these jobs were made."""
    for job, mine in zip(jobs, ids, strict=False):
        if mine[0] in late and (without := to_avoid(job)):
            of_the_site = str(job.options().get("exclude") or "")
            with contextlib.suppress(scheduler.SchedulerError):
                scheduler.exclude(mine[0], ",".join([*filter(None, [of_the_site]), *without]))


def _with_room(jobs: list[Job], ids: list[list[str]], new: list[str], refusal: str) -> list[Job] | None:
    """After a refusal because the array before took the user's last places in the queue: cancel the array, and return
    the chain with half of its tasks.

    None if that is not the reason.
    """
    before = jobs[len(ids) - 1] if ids else None
    if before is None or ids[-1][0] not in new or before.site.tasks != "auto" or not scheduler.too_many(refusal):
        return None
    tasks = sent_tasks(before.run, ids[-1][0])
    if tasks < 2:
        return None
    scheduler.cancel(ids.pop())
    new.pop()
    at = len(ids)
    return [*jobs[:at], before.with_tasks(tasks // 2), *jobs[at + 1 :]]


def tasks_told(job: Job, job_id: str) -> str:
    """For a message: shards and tasks of a sample job that was just queued; "" for other jobs."""
    if not job.shards:
        return ""
    tasks = sent_tasks(job.run, job_id)
    return f" ({counted(len(job.shards), 'shard')} in {counted(tasks, 'task')})"


def _in_queue(job: Job, config: Config) -> list[str]:
    """Ids of queued jobs that do the same as `job`. Raises SchedulerError."""
    if job.stage == "evaluate":
        return evaluations_in_queue(job.run, job.set_name, config.evaluate, default=config.evaluate)
    return jobs_in_queue(job.run, job.stage, job.set_name)


def fill_gaps(
    run: RunDir, set_name: str, missing: list[int], again: tuple[str, ...], round_: str, env: JobEnvironment
) -> int:
    """For an evaluation whose set has missing shards: queue a job that makes them, and this evaluation again after it.

    Returns the exit code. again: the arguments of this evaluation. round_: "ROUND:MISSING" of the round before, or "";
    gives up after MAX_ROUNDS rounds that added no shard.
    """
    repair = f"python launch/sample.py {run.quoted} --set {set_name}"
    lacks = f"{set_name} lacks {counted(len(missing), 'shard')} ({ranges(missing)})"
    if not env.is_scheduled:
        raise DoNotRetry(f"{lacks}: {repair}")
    if is_told_to_stop(run, env.job):
        raise DoNotRetry(f"{run.stop_file} forbids making what is missing: {lacks}; go on: {repair}")
    if not scheduler.available():  # as in a container
        raise DoNotRetry(
            f"{lacks}, and there is no sbatch here to have them made: on a login node {repair}, then python "
            f"launch/evaluate.py {run.quoted} --set {set_name}"
        )
    before, _, had = round_.partition(":")
    site, known = sent_where(run, env.job) or site_of(run), known_stop(run, env.job)

    def queued(job: Job) -> str:
        try:
            return submit(job)
        except RequestError as e:
            score = f"python launch/evaluate.py {run.quoted} --set {shlex.join([set_name, *again])}"
            why = " ".join(str(e).split())
            raise DoNotRetry(f"{lacks}: once SLURM takes jobs again, {repair}, then {score}. {why}") from None

    with turn(run):
        waiting = jobs_in_queue(run, "sample", set_name)
        if not waiting:
            if job := cancelled_samples(run, set_name):
                raise DoNotRetry(f"{lacks}, because job {job} was cancelled, and goes without: {repair} makes them")
            rounds = int(before or 0) + 1 if not had or len(missing) >= int(had) else 1
            if rounds > MAX_ROUNDS:
                print(
                    f"failed: {lacks} after {MAX_ROUNDS} rounds without a new one; see {run.logs}, then: {repair}",
                    flush=True,
                )
                return EXIT_FATAL
            waiting = [queued(Job("sample", run, site, set_name, tuple(missing), despite=known))]
            round_ = f"{rounds}:{len(missing)}"
        after = ":".join(waiting)
        said = (*again, "--round", round_)
        new = queued(Job("evaluate", run, site, set_name, (), after, said, despite=known))
    print(f"{lacks}: job {after} makes what is missing, job {new} scores after it", flush=True)
    return 0


# ---------------------------------------------------------------- cancelled


def cancelled_samples(run: RunDir, set_name: str) -> str | None:
    """The last job for shards of a set, if it or one of its tasks was cancelled; else None."""
    jobs = slurm_jobs(run, read_events(run), "sample", set_name)
    return jobs[-1] if jobs and scheduler.any_cancelled(jobs[-1]) else None


def call_off(job: str) -> list[str]:
    """Cancel the jobs that wait for `job`, and the tasks of its array that have not started: they would have nothing to
    work on. Returns the jobs that waited. Raises SchedulerError.
    """
    found = scheduler.followers(job)
    if found:
        scheduler.cancel(found)
    base, _, task = job.partition("_")
    if task:
        scheduler.cancel_waiting(base)
    return found
