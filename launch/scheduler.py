"""submitit and sbatch behind one small interface: a Job becomes a script, and a script becomes a job id.

Both paths run the same entry (`python -m launch.jobs`), begin with slurm/supervise.sh and carry the same sbatch
options, so that stopping and coming back are the same. The options are given as flags: exported SBATCH_* variables,
which go before #SBATCH lines, are to decide only what nobody asked for. No pickle holds more than that entry's
arguments: a requeued job runs today's code on the run directory, not yesterday's objects.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from ddpm.errors import RequestError
from ddpm.rundir import EventLog, RunDir, read_events
from launch.cluster import environment, slurm
from launch.cluster.environment import PROJECT
from launch.cluster.site import Site

HOME = {"DDPM_HOME": str(PROJECT), "DDPM_PYTHON": sys.executable}
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

    def arguments(self, shard: int | None = None) -> list[str]:
        """Of `python -m launch.jobs`."""
        where = [self.set_name] if self.set_name else []
        chosen = [] if shard is None else ["--shard", str(shard)]
        return [self.stage, str(self.run.path), *where, *chosen, *self.extra_args]

    def options(self) -> dict[str, str | bool]:
        """sbatch's long options; True is a flag."""
        site = self.site
        ranks = site.world_size if self.stage == "train" else 1
        nodes = site.nodes if self.stage == "train" else 1
        gpus = site.gpus_per_node or 0
        per_node = max(1, ranks // nodes)
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
            "ntasks-per-node": per_node,
            "gpus-per-node": (gpus if self.stage == "train" else 1) if gpus else None,
            "cpus-per-task": site.cpus_per_task,
            "mem": site.mem,
            "requeue": True,
            "export": "ALL",
            "open-mode": "append",
            "signal": f"USR2@{lead}",
            "output": str(self.run.logs / f"{self.stage}-{'%A_%a' if self.shards else '%j'}.out"),
            "dependency": f"afterany:{self.after}" if self.after else None,
        }
        if "no-requeue" in site.sbatch:
            del values["requeue"]
        values.update(site.sbatch)
        return {k: v if v is True else str(v) for k, v in values.items() if v is not None and v is not False}


class SbatchScheduler:
    """The templates in slurm/, exactly as they are submitted by hand."""

    via = "sbatch"

    def command(self, job: Job, *, offset: int = 0, array: str = "") -> list[str]:
        flags = _flags(job.options())
        if array:
            flags.append(f"--array={array}")
        args = [str(job.run.path), *([job.set_name] if job.set_name else [])]
        args += [str(offset)] if array else list(job.extra_args)
        return ["sbatch", "--parsable", *flags, str(PROJECT / "slurm" / f"{job.stage}.sbatch"), *args]

    def describe(self, job: Job) -> str:
        """What --dry-run shows: each command, and the template it submits."""
        commands = [shlex.join(c) for c in self.commands(job)]
        return "\n".join(commands) + "\n\n" + (PROJECT / "slurm" / f"{job.stage}.sbatch").read_text()

    def submit(self, job: Job) -> Iterator[str]:
        return map(sbatch, self.commands(job))

    def commands(self, job: Job) -> list[list[str]]:
        if not job.shards:
            return [self.command(job)]
        size = slurm.max_array_size() if slurm.available() else 1001
        blocks: dict[int, list[int]] = {}
        for shard in job.shards:
            blocks.setdefault(shard // size * size, []).append(shard)
        return [
            self.command(job, offset=offset, array=f"{ranges([s - offset for s in block])}%{job.site.max_parallel}")
            for offset, block in blocks.items()
        ]


class SubmititScheduler:
    """submitit's executor: its script, its pickle of the entry's arguments, our options and our supervisor."""

    via = "submitit"

    @staticmethod
    def _options(job: Job) -> dict[str, str | bool]:
        options = job.options()
        if len(job.shards) == 1:  # submitit makes no array of one
            options["output"] = str(options["output"]).replace("%A_%a", "%j")
        return options

    def command(self, job: Job, script: str, tasks: int | None) -> list[str]:
        """The sbatch of `script`, for an array of so many tasks."""
        array = [f"--array=0-{tasks - 1}%{min(tasks, job.site.max_parallel)}"] if tasks else []
        return ["sbatch", *_flags(self._options(job)), *array, script]

    def _parameters(self, job: Job) -> dict[str, Any]:
        options = self._options(job)
        log = str(options.pop("output"))
        exports = {
            **HOME,
            "DDPM_RUN": str(job.run.path),
            "DDPM_STAGE": job.stage,
            **({"DDPM_SET": job.set_name} if job.set_name else {}),
        }
        setup = [f"export {k}={shlex.quote(v)}" for k, v in exports.items()]
        return {
            "job_name": options.pop("job-name"),
            "time": int(options.pop("time", 0)) or 5,
            "stderr_to_stdout": True,
            "array_parallelism": job.site.max_parallel,
            "setup": [*setup, '. "$DDPM_HOME/slurm/supervise.sh" || exit 2'],
            "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", f"--output={log}"],
            "additional_parameters": {**options, "output": log},
        }

    def describe(self, job: Job) -> str:
        """What --dry-run shows: the command, and the script that submitit writes."""
        tasks = len(job.shards) if len(job.shards) > 1 else None
        return f"{shlex.join(self.command(job, 'SCRIPT', tasks))}\n\n{self._text(job, tasks)}"

    def _text(self, job: Job, tasks: int | None) -> str:
        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(self._folder(job)))}"
        text = _make_sbatch_string(
            command=command,
            folder=self._folder(job),
            **self._parameters(job),
            map_count=tasks,
        )
        return _without_time(text) if job.site.time is None else text

    @staticmethod
    def _folder(job: Job) -> Any:
        return job.run.logs / "submitit"

    def submit(self, job: Job) -> Iterator[str]:
        import submitit

        from launch import jobs

        sbatch_of = self.command

        class Executor(submitit.SlurmExecutor):
            """submitit always asks for a time limit; without --time the partition's own default must hold."""

            def _make_submission_file_text(self, command: str, uid: str) -> str:
                text = str(super()._make_submission_file_text(command, uid))
                return _without_time(text) if job.site.time is None else text

            def _make_submission_command(self, submission_file_path: Any) -> list[str]:
                return sbatch_of(job, str(submission_file_path), self.parameters.get("map_count"))

            def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
                # for an array submitit makes an executor of its own class anew, and our text would be lost
                with mock.patch("submitit.slurm.slurm.SlurmExecutor", Executor):
                    return list(super()._internal_process_submissions(delayed_submissions))

        def run(command: list[str], verbose: bool) -> Any:
            return lambda: slurm.run(command, timeout_s=SBATCH_TIMEOUT_S)

        executor = Executor(self._folder(job), python=_python())
        executor.update_parameters(**self._parameters(job))
        size = slurm.max_array_size()
        shards = job.shards or (None,)
        for i in range(0, len(shards), size):
            # submitit's own way to run sbatch waits without end, and takes silence for a refusal
            run_by_us = mock.patch("submitit.core.utils.CommandFunction", run)
            with environment.outside_allocation(), run_by_us, executor.batch():
                tasks = [executor.submit(jobs.main, job.arguments(s)) for s in shards[i : i + size]]
            yield str(tasks[0].job_id).split("_")[0]


def _python() -> str:
    return shlex.join(["bash", str(PROJECT / "slurm" / "rank.sh"), sys.executable])


def _without_time(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#SBATCH --time=")) + "\n"


def make(via: str) -> SbatchScheduler | SubmititScheduler:
    return SbatchScheduler() if via == "sbatch" else SubmititScheduler()


def by_hand(job: Job) -> str:
    """What a person types, in any directory, to queue `job`."""
    home = " ".join(f"{k}={shlex.quote(v)}" for k, v in HOME.items())
    return "\n".join(f"{home} {shlex.join(command)}" for command in SbatchScheduler().commands(job))


def submit(job: Job) -> list[str]:
    """Queue `job`; returns its job ids (several arrays where MaxArraySize is small), or takes back what it queued.

    Raises RequestError with SLURM's words; NoAnswer, after which some of it may be in the queue.
    """
    options = job.options()
    kept = {k: v for k, v in options.items() if k != "dependency"}
    ids: list[str] = []
    try:
        for job_id in make(job.site.via).submit(job):
            ids.append(job_id)
            _submitted(job.run, job_id, job.stage, job.site.via, job.site.world_size if job.stage == "train" else 1,
                       set=job.set_name, options=kept, args=list(job.extra_args))  # fmt: skip
    except slurm.NoAnswer as e:
        raise slurm.NoAnswer(
            f"SLURM did not answer ({e}), and may have queued the {job.stage} job all the same. Once it answers, look "
            f"with squeue --me --name {options['job-name']}, scancel what that shows, and submit again to go on"
        ) from None
    except Exception as e:
        if ids:
            slurm.cancel(ids)
        if isinstance(e, slurm.SlurmError):
            raise RequestError(f"SLURM refused the {job.stage} job: {e}") from None
        raise
    return ids


def _submitted(run: RunDir, job: str, stage: str, via: str, world_size: int, **fields: Any) -> None:
    EventLog(run, job, 0, environment.host(), prefix="submit-").append(
        "submitted", world_size=world_size, step=run.latest_step(), stage=stage, via=via, **fields
    )


def submit_successor(run: RunDir, stage: str, job: str) -> str:
    """Where requeue is forbidden: submit what `job` was submitted with once more, by template. Raises SlurmError.

    The event that it was is written where there is room for it.
    """
    record = next((e for e in reversed(read_events(run)) if e["event"] == "submitted" and e["job"] == job), None)
    if record is None:  # submitted by hand: what SLURM says of this job
        record = {"options": _as_it_is(job), "set": environment.sample_set(), "args": []}
    flags = _flags({"export": "ALL", **record["options"]})
    args = [str(run.path), *([record["set"]] if record["set"] else []), *record["args"]]
    new = sbatch(["sbatch", "--parsable", *flags, str(PROJECT / "slurm" / f"{stage}.sbatch"), *args])
    with contextlib.suppress(OSError):
        _submitted(run, new, stage, "sbatch", environment.num_tasks(), successor_of=job,
                   **{k: record[k] for k in ("set", "options", "args")})  # fmt: skip
    return new


def _as_it_is(job: str) -> dict[str, str | bool]:
    """sbatch options that ask for what the job has in which this runs. Raises SlurmError."""
    options: dict[str, str | bool] = {**environment.allocation()}
    if shown := slurm.show(job):
        told: dict[str, str | bool] = {"time": shown.time_limit, "no-requeue": not shown.may_requeue}
        options |= {key: value for key, value in told.items() if value}
    return options


def sbatch(command: list[str]) -> str:
    """Run one sbatch from the project's root; returns the job id."""
    with environment.outside_allocation():
        said = slurm.run(command, timeout_s=SBATCH_TIMEOUT_S, cwd=str(PROJECT), env={**os.environ, **HOME})
        return said.strip().split(";")[0]


def _flags(options: dict[str, str | bool]) -> list[str]:
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
