"""The one entry of every job, by submitit, by template, or on this machine:

    python -m launch.jobs train RUN
    python -m launch.jobs sample RUN SET [--shards 0-63 [--tasks N] | --offset O]
    python -m launch.jobs evaluate RUN SET [--reference R] [--extractor E] [--round N]
    python -m launch.jobs evaluate RUN NAME --bits-per-dim
    python -m launch.jobs evaluate RUN NAME --reference train --extractor inception --save-stats FILE

Each stage checks in the run directory that its predecessor is done, whatever the scheduler's dependency said, and a
job that starts on finished work changes nothing. Exit codes: ddpm/errors.py.
"""

from __future__ import annotations

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib
import os
import sys
import traceback
from pathlib import Path

from ddpm.errors import EXIT_REQUEUE, DoNotRetry, EnvironmentLacks, NodeUnfit, RanksLost, RunBusy, RunGone, Stopped
from ddpm.run.evidence import Incomplete
from ddpm.run.generations import NoneHolds
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from launch.cluster.container import lent_by_a_process
from launch.cluster.job import numbers, share
from launch.life import starting
from launch.life.decision import GONE
from launch.life.life import Life, begin
from launch.queue.chain import ways_on
from launch.queue.waiting import is_told_to_stop
from launch.terminal import console, faults, streams


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.jobs", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["train", "sample", "evaluate"])
    parser.add_argument("run", type=Path)
    parser.add_argument("set_name", nargs="?", default="")
    parser.add_argument(
        "--shards", "--shard", type=numbers, default=None, help="which shards, e.g. 0-2,5; finished ones are left alone"
    )
    parser.add_argument("--tasks", type=int, default=1, help="number of array tasks that divide them")
    parser.add_argument("--offset", type=int, default=0, help="without --shards: task I makes shard I + OFFSET")
    parser.add_argument("--reference", default=None, help="instead of the config's")
    parser.add_argument("--extractor", default=None, help="instead of the config's")
    parser.add_argument(
        "--round", default="", help="how often missing shards were queued again, and how many were missing"
    )
    parser.add_argument(
        "--bits-per-dim", action="store_true", help="compute what bits-per-dim/NAME/request.json asks for"
    )
    parser.add_argument("--save-stats", type=Path, default=None, help="only write the reference's statistics to a file")
    return parser.parse_args(argv)


def work(life: Life, args: argparse.Namespace) -> int:
    """Do what the job is for; returns its exit code. torch is loaded here, where there is something to do."""
    faults.check_threads(life.env.cpus + 2)  # one saves, one shows
    if life.env.rank == 0 and (warning := lent_by_a_process()):
        say(warning)
    if args.stage == "train":
        config, why = starting.start_training(life)
        if why and life.env.world_size == 1:
            say(why)
            return life.leave(0)
        from launch.life import compiled, training

        try:
            return training.train(life, config, why)
        finally:
            compiled.leave()
    if is_told_to_stop(life.run, life.env.job):  # a training that it ended has nothing to be sampled: no failure
        say(f"{life.run.stop_file} ends this too; submitting the run again goes on, and removes it")
        return life.leave(0)
    if args.stage == "sample":
        from launch.life import sampling

        task = life.env.array_task or 0
        shards = [task + args.offset] if args.shards is None else share(args.shards, task % args.tasks, args.tasks)
        life.works_on(shards)
        if (env := life.env).world_size > 1:
            shards, life = share(shards, env.rank, env.world_size), life.alone()
        return sampling.sample(life, args.set_name, shards)
    if args.bits_per_dim:
        from launch.life import likelihood

        return likelihood.evaluate(life, args.set_name)
    if args.save_stats:
        from launch.life import reference

        return reference.save_statistics(life, args.reference, args.extractor, args.save_stats)
    starting.request_of(life, args.set_name)
    from launch.life import scoring

    return scoring.evaluate(life, args.set_name, args.reference, args.extractor, args.round)


def told(life: Life, stage: str, error: Exception) -> int:
    """Say what a person can act on; returns the exit code that it becomes."""
    if isinstance(error, RunBusy):
        say(str(error))
        return life.leave(error.exit_code, GONE if isinstance(error, RunGone) else "")
    text = f"{error}. {ways_on(life.run)}" if isinstance(error, (Incomplete, NoneHolds)) else str(error)
    if isinstance(error, RanksLost):
        say(f"failed: {error}")
        return 1  # without a word to the batch shell: srun's exit code tells how the other ended, too
    here = not life.env.is_scheduled
    # another start may find what this one lacked: SLURM's answer, a node whose driver or file system is well
    again = isinstance(error, (EnvironmentLacks, NodeUnfit))
    say(text if again and not here else f"failed: {text}")
    code = life.leave(1, " ".join(text.split())) if again else life.leave(DoNotRetry.exit_code)
    if here and life.env.rank == 0:  # elsewhere the batch shell says so
        why = {"stage": stage, "exit_code": code, "reason": text}
        with contextlib.suppress(OSError):
            life.env.events(life.run).append(
                "failed", world_size=life.env.world_size, step=life.run.latest_step(), **why
            )
    return code


def is_gone(run: Path) -> bool:
    """Whether a run is gone, and not what the folder of runs is on: another start may find that there."""
    try:
        return not run.is_dir() and any(run.parent.iterdir())
    except OSError:
        return False


def main(argv: list[str]) -> int:
    """Run one stage and end the process with its exit code (submitit must not unwind past us either)."""
    streams.make_safe()
    args = parse(argv)
    life = begin(RunDir(args.run.absolute()))
    try:
        code = work(life, args)
    except Stopped as e:  # before anything was computed: nothing to save
        answer = life.until_killed_or_on(e.reason)  # 0 for STOP
        code = life.leave(EXIT_REQUEUE if answer is None else answer, e.reason)
    except BaseException as e:
        gone = isinstance(e, OSError) and is_gone(life.run.path)
        known = (
            RunGone(f"{life.run.path} was moved, renamed or deleted under this job")
            if gone
            else faults.of_a_job(e, life.run.path)
        )
        if known is not None:
            code = told(life, args.stage, known)
        else:
            code = 1
            with contextlib.suppress(OSError):
                traceback.print_exc()
    with contextlib.suppress(OSError):  # a log on a full disk must not change the exit code
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    console.run_script(lambda: main(sys.argv[1:]))
