"""What an evaluation is asked for, and having it computed: here, or by SLURM."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from ddpm.config import reading
from ddpm.data.labels import class_names
from ddpm.run.paths import RunDir
from ddpm.run.records import usable
from ddpm.sampling.request import read_request
from ddpm.scoring.record import Score, is_signed
from launch import prepare
from launch.cluster.job import Job
from launch.queue import local
from launch.queue.directory import use_shell_of
from launch.queue.submitting import submit_alone
from launch.queue.turns import turn
from launch.queue.waiting import jobs_in_queue
from launch.terminal import follow
from launch.terminal.results import print_score, why_not


@dataclass(frozen=True)
class Outcome:
    """What a job is asked for."""

    what: str
    where: str
    told: Callable[[], int | None]
    """Shows it and gives the exit code; None where it is not there."""
    more: str = ""
    """Said where it was there before."""


def show(run: RunDir, score: Score, *, as_json: bool) -> int:
    """The score that was asked for, and on stderr what is to be said of it."""
    classes = class_names(reading.of_run(run), usable(run))
    print_score(score.record, score.path, as_json=as_json, classes=classes)
    if not is_signed(score.record):
        print(f"{score.path} is not signed: it is from before scores were", file=sys.stderr)
    return 0


def of_score(run: RunDir, name: str, score: Callable[[], Score | None], args: argparse.Namespace) -> Outcome:
    def told() -> int | None:
        made = run.sample_set(name)
        has_gap = made.request.exists() and made.num_published() < read_request(made).shards
        there = None if has_gap else score()
        return None if there is None else show(run, there, as_json=args.json)

    more = "" if args.bits_per_dim else "; --reference and --extractor make others"
    return Outcome(f"the score of {name}", str(run.eval), told, more)


def do(job: Job, in_queue: Callable[[], list[str]], asked: Outcome, args: argparse.Namespace) -> int:
    """Have it computed, here or by SLURM, after what makes its set; returns the exit code."""
    run, name = job.run, job.set_name

    def end() -> int:
        if (code := asked.told()) is None:
            print(f"error: no {asked.what.removeprefix('the ')}{why_not(run, 'evaluate')}", file=sys.stderr)
        return 1 if code is None else code

    if (code := asked.told()) is not None:
        print(f"{asked.what} is complete: nothing to do{asked.more}", file=sys.stderr)
        return code
    job = replace(job, despite=run.stop_mark())
    prepare.settle_code(run, args.code)
    if job.site.is_local:
        process, log = local.start(run, [job])
        with contextlib.redirect_stdout(sys.stderr):  # stdout gets the scores alone
            code = follow.follow_process(run, process, log)
        return code or end()
    with turn(run):
        if ids := in_queue():
            print(f"{asked.what} is in the queue already, as job {' '.join(ids)}: nothing to submit")
        else:
            waiting = jobs_in_queue(run, "sample", name)
            use_shell_of(run, job.site)
            new, waits = submit_alone(replace(job, after=":".join(waiting) or None))
            ids = [new]
            said = f"queued: evaluate as job {new}; {asked.what} will be in {asked.where}"
            print("\n".join([said, *filter(None, [waits]), follow.watch_with(run)]))
    if not args.wait:
        return 0
    with contextlib.redirect_stdout(sys.stderr):
        follow.follow_jobs(run, ids, [("sample", name), ("evaluate", name)])
    return end()
