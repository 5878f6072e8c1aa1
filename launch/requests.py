"""Sample sets of a run: what a set asks for, what is missing of it, and the jobs that make it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.config import Config
from ddpm.errors import EXIT_FATAL, DoNotRetry, RequestError
from ddpm.run.state import finished_step
from ddpm.rundir import RunDir, read_events, read_json, sha256_file
from launch import scheduler
from launch.cluster import slurm
from launch.cluster.environment import JobEnvironment
from launch.cluster.site import Site, is_local

if TYPE_CHECKING:
    from ddpm.run.generations import Generation
    from ddpm.sampling.request import CheckpointRef, Request

MAX_ROUNDS = 3
COMPLETING_POLL_S = 2
COMPLETING_AT_MOST_S = 60


def _set_name(config: Config, at: str, variance: str | None = None) -> str:
    s = config.sample
    how = "" if s.guidance is None else f"-guided{s.guidance:g}"
    how += "" if s.class_plan is None else "-plan"
    how += "" if s.clip_x_0 else "-unclipped"
    how += "" if variance in (None, config.diffusion.variance) else f"-{variance}"
    return f"{s.sampler}{s.steps}{how}-{at}-seed{s.seed}"


def set_of(run: RunDir, config: Config, step: int, variance: str | None = None) -> str:
    """The name of the set that the config asks for at `step`: its own, or the chain's that was made there."""
    own, chain = _set_name(config, f"step{step}", variance), _planned_set(config)
    return chain if not variance and _sampled_at(run, own) is None and _sampled_at(run, chain) == step else own


def chain_set(run: RunDir, config: Config) -> str:
    """The name of the set that is made when training ends: one for each step at which it has ended."""
    planned, step = _planned_set(config), final_step(run, config)
    if step is None:
        return planned
    name = set_of(run, config, step)
    return name if _sampled_at(run, planned) or _sampled_at(run, name) else planned


def _planned_set(config: Config) -> str:
    """The chain's name for its set, before training has ended; it may end before the last step."""
    upto = "step" if config.train.early_stop_below is None else "upto"
    return _set_name(config, f"{upto}{config.train.total_steps}")


def _sampled_at(run: RunDir, set_name: str) -> int | None:
    """The step of the checkpoint that a set samples; None where the set is not begun."""
    return ((read_json(run.sample_set(set_name).request) or {}).get("checkpoint") or {}).get("step")


def final_step(run: RunDir, config: Config) -> int | None:
    """The step at which training has ended, by its end or early; None where it has not."""
    return finished_step(run, config)


def from_config(
    run: RunDir, config: Config, generation: Generation | CheckpointRef, variance: str | None = None
) -> Request:
    """The request that `config.sample` makes of one checkpoint of the run. variance: instead of the config's."""
    from ddpm.sampling import request

    reference = request.CheckpointRef(generation.step, generation.sha256)
    return request.from_config(config, reference, request.precision_of(config, run), variance)


def site_of(run: RunDir) -> Site:
    """Where the run was submitted to: later stages go there too unless told otherwise."""
    record = read_json(run.run_json)
    if record is None:
        raise RequestError(f"{run.path} is no run directory (no run.json); see python launch/status.py for the runs")
    return Site.model_validate(record.get("launch") or {}, strict=False)


def sample_job(run: RunDir, site: Site, set_name: str, shards: list[int], after: str | None) -> scheduler.Job:
    return scheduler.Job("sample", run, site, set_name, tuple(shards), after)


def evaluate_job(run: RunDir, site: Site, set_name: str, after: str | None, *extra_args: str) -> scheduler.Job:
    return scheduler.Job("evaluate", run, site, set_name, (), after, extra_args)


def describe_job(job: scheduler.Job) -> str:
    """What --dry-run shows of a job: its processes on this machine, or the exact script that SLURM would get."""
    if not is_local(job.site):
        return scheduler.make(job.site.via).describe(job)
    from launch.local import stage_commands

    commands = stage_commands(job)
    lines = [shlex.join(command) for command in commands[:2]]
    return "\n".join(lines + [f"… and {len(commands) - 2} more shards"] * (len(commands) > 2))


def missing_shards(run: RunDir, config: Config, set_name: str) -> list[int]:
    """Shards of the chain's set that are not done: all of them where the set is not begun.

    Raises RequestError where the set was begun with another request, or of another step than training ends at,
    which the config must not silently mean.
    """
    sample_set = run.sample_set(set_name)
    if not sample_set.request.exists():
        return list(range(config.sample.shards))
    from ddpm.sampling import shards
    from ddpm.sampling.request import differences, read_request

    there = read_request(sample_set)
    step = final_step(run, config) or config.train.total_steps
    asked = from_config(run, config, replace(there.checkpoint, step=step))
    if there != asked:
        raise RequestError(
            f"sample set {set_name} exists with another request: {differences(there, asked)}. Ask for the "
            f"same, or make another set once training has ended: python launch/sample.py {run.path} --set OTHERNAME"
        )
    return shards.missing_shards(sample_set, there)


def is_scored(run: RunDir, config: Config, set_name: str) -> bool:
    """Whether the set, as it is, has a score by the config's extractor against the config's reference."""
    score, request = (read_json(p) or {} for p in (run.eval / f"{set_name}.json", run.sample_set(set_name).request))
    return (
        score.get("checkpoint") == {**request.get("checkpoint", {}), "weights": request.get("weights")}
        and (score.get("extractor") or {}).get("name") == config.evaluate.extractor
        and _is_against(score.get("reference") or {}, config.evaluate.reference)
    )


def _is_against(record: dict[str, Any], asked: str) -> bool:
    """Whether a score's reference is the one that is asked for; a folder or zip is known by its name."""
    if asked in ("train", "test"):
        return record.get("split") == asked
    path = check_reference(asked)
    if path.suffix == ".npz":
        return record.get("digest") == sha256_file(path)
    return (record.get("split"), record.get("name")) == ("all", path.name)


def lift_stop(run: RunDir) -> None:
    """Submitting again means going on."""
    if run.stop_file.exists():
        run.stop_file.unlink()
        print(f"removed {run.stop_file}: submitting again means going on")


def jobs_in_queue(run: RunDir, stage: str, set_name: str = "") -> list[str]:
    """Job ids of this stage that SLURM has. Raises SlurmError.

    A job that is COMPLETING may be gone in a moment, or in the queue again, as when it was pre-empted: waits for that.
    One that stays so, as on a node that is out of reach, counts as gone; should it come back, the run is locked.
    """
    jobs = slurm_jobs(read_events(run), stage, set_name)
    if not jobs or not slurm.available():
        return []
    asked_at, polls = time.monotonic(), 0
    while True:
        states = slurm.queued(jobs)
        ending = [job for job, state in states.items() if state == "COMPLETING"]
        if not ending or time.monotonic() - asked_at > COMPLETING_AT_MOST_S:
            return [job for job in states if job not in ending]
        if polls == 1:
            print(f"waiting for SLURM to end job {' '.join(ending)}, or to queue it again", file=sys.stderr, flush=True)
        polls += 1
        time.sleep(COMPLETING_POLL_S)


def slurm_jobs(events: list[dict[str, Any]], stage: str | None = None, set_name: str = "") -> list[str]:
    """Ids of the SLURM jobs that the events tell of, of one stage or of all.

    A training job that was submitted by hand is first told of when it has its nodes.
    """
    told = (e for e in events if e["event"] in ("submitted", "allocated") and str(e["job"])[:1].isdigit())
    wanted = (e for e in told if stage is None or (e.get("stage", "train"), e.get("set", "")) == (stage, set_name))
    return list(dict.fromkeys(str(e["job"]) for e in wanted))


def fill_gaps(
    run: RunDir, set_name: str, missing: list[int], reference: str | None, round_: str, env: JobEnvironment
) -> int:
    """An evaluation that came before its shards: have the missing ones made, and come again after them.

    Gives up after MAX_ROUNDS rounds that added no shard. `round_` is "ROUND:MISSING" of the round before.
    """
    repair = f"python launch/sample.py {run.path} --set {set_name}"
    if env.scheduler != "slurm":
        raise DoNotRetry(f"{len(missing)} shards of {set_name} are missing ({scheduler.ranges(missing)}): {repair}")
    if run.stop_file.exists():
        raise DoNotRetry(
            f"{run.stop_file} forbids making the {len(missing)} missing shards of {set_name}; go on: {repair}"
        )
    before, _, had = round_.partition(":")
    site = site_of(run)
    again = ["--reference", reference] if reference else []
    waiting = jobs_in_queue(run, "sample", set_name)
    if not waiting:
        rounds = int(before or 0) + 1 if not had or len(missing) >= int(had) else 1
        if rounds > MAX_ROUNDS:
            print(
                f"failed: {len(missing)} shards of {set_name} are still missing ({scheduler.ranges(missing)}) after "
                f"{MAX_ROUNDS} rounds without a new one; see {run.logs}, then: {repair}",
                flush=True,
            )
            return EXIT_FATAL
        waiting = scheduler.submit(sample_job(run, site, set_name, missing, None))
        round_ = f"{rounds}:{len(missing)}"
    after = ":".join(waiting)
    ids = scheduler.submit(evaluate_job(run, site, set_name, after, *again, "--round", round_))
    print(
        f"{len(missing)} shards of {set_name} are missing: job {after} makes them, job {ids[0]} scores after it",
        flush=True,
    )
    return 0


def reference(config: Config, name: str | None, cache: Path, stop_requested: Callable[[], str | None]) -> Any:
    """What a set is compared with: the training or test split as trained on, a pytorch-fid .npz, a folder or zip.

    Raises RequestError for a name that is none of these.
    """
    from ddpm.data import packed as data

    name = name or config.evaluate.reference
    if name in ("train", "test"):
        return data.pack(config.data, name, cache, stop_requested=stop_requested)[1]
    path = check_reference(name)
    return path if path.suffix == ".npz" else data.load_folder(path)


def check_split(config: Config, name: str) -> None:
    """Raises RequestError where `name` is a split that the run's data does not have, or no such file."""
    if name not in ("train", "test"):
        check_reference(name)
        return
    from ddpm.data.packed import open_source

    splits = sorted(open_source(config.data).members)
    if name not in splits:
        raise RequestError(f"reference = {name}: {config.data.name} has {splits} here; or give a file or folder")


def check_reference(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise RequestError(
            f"reference = {name}: not train, not test, and no such file; a pytorch-fid .npz, or a folder "
            f"or zip of images"
        )
    return path
