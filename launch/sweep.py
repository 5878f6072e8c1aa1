"""`--sweep KEY=A,B,… [--sweep …]`: a run for each combination of values, checked all before any is queued.

Each is a run like any other, with jobs of its own, and no task of an array: an array has one pattern for logs and one
list of nodes to avoid, is sent whole or not at all, has no place for the successor of a task that must not be requeued,
and what cancels the waiting tasks of one run's job cancels all runs. So a point is requeued, cancelled, followed and
gone on with by its own job ids, and as many are queued as the user may have.

On this machine they run one after another, those of all sweeps of a root.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.config.section import field_keys, unknown_key
from ddpm.config.yaml import written_items
from ddpm.errors import DDPMError, RequestError, shown
from ddpm.run.files import DamagedFile
from ddpm.run.log import plain
from ddpm.run.paths import check_name
from ddpm.run.records import usable
from launch import beginning, origin, prepare, submission
from launch.beginning import Here, Queued
from launch.cluster import environment, scheduler
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.queue import borrowing, chain, local, work
from launch.queue.naming import of_point, of_sweep
from launch.queue.submitting import why_it_waits
from launch.queue.waiting import asked_together
from launch.submission import Asked
from launch.terminal import console, follow, plan, side_by_side

MOST = 1000
"""Runs of one sweep."""
WORD = 200
"""Characters of what was typed that a message repeats."""

# ---------------------------------------------------------------- its points


def configs(
    words: list[str], overrides: list[str], read: Callable[[list[str]], Config]
) -> list[tuple[Config, dict[str, Any]]]:
    """The config of each point, named by what differs, and what its run.json says of the sweep.

    read: a config with such overrides besides. Raises RequestError: also for two points that are one run.
    """
    values = _values(words, overrides)
    if (num := math.prod(map(len, values.values()))) > MOST:
        raise RequestError(f"--sweep: {num:,} runs; at most {MOST:,} at a time")
    found: list[tuple[Config, dict[str, Any]]] = []
    seen: dict[str, dict[str, str]] = {}
    for texts in itertools.product(*values.values()):
        typed = dict(zip(values, texts, strict=True))
        with naming({"values": typed}):
            config = read([f"{key}={text}" for key, text in typed.items()])
            name = check_name(of_point(config.name, typed))
        same = json.dumps(config.model_dump(mode="json", exclude={"name"}))
        if (other := seen.setdefault(same, typed)) is not typed:
            raise RequestError(f"--sweep: {_told(other)} and {_told(typed)} are the same run; leave one out")
        if (other := seen.setdefault(f"name {name}", typed)) is not typed:
            raise RequestError(
                f"--sweep: {_told(other)} and {_told(typed)} would both be called {name}: sweep them apart, each with "
                f"its own --name"
            )
        of = found[0][1]["name"] if found else of_sweep(config.name, values)
        tree = config.model_dump(mode="json")
        record = {"name": of, "values": {key: reading.value_at(tree, key) for key in values}}
        found.append((config.model_copy(update={"name": name}), record))
    return found


def _values(words: list[str], overrides: list[str]) -> dict[str, list[str]]:
    """Key -> its values, as they were typed."""
    found: dict[str, list[str]] = {}
    given = {override.partition("=")[0] for override in overrides}
    for word in words:
        key, eq, text = word.partition("=")
        told = plain(word if len(word) <= WORD else f"{word[:WORD]}…")
        if not eq or not key:
            raise RequestError(f"--sweep {shown(word)}: expected KEY=A,B, for example train.lr=1e-4,2e-4")
        if key == "name":
            raise RequestError(f"--sweep {told}: its runs are named by what differs, after --name")
        if key not in field_keys(Config):
            raise RequestError(f"--sweep {told}: {unknown_key(key, field_keys(Config))}")
        if key in found or key in given:
            where = "swept twice" if key in found else "given besides"
            raise RequestError(f"--sweep {told}: {key} is {where}; give all its values in one list")
        try:
            found[key] = written_items(text, f"--sweep {told}")
        except RequestError as e:
            raise RequestError(f"{e}; give A,B, and quotes around a bracket that is meant as one") from None
        if not found[key]:
            raise RequestError(f"--sweep {told}: no values; for example {key}=A,B")
    return found


def _told(values: Mapping[str, Any]) -> str:
    text = " ".join(f"{key}={value}" for key, value in values.items())
    return plain(text if len(text) <= WORD else f"{text[:WORD]}…")


@contextmanager
def naming(of: Mapping[str, Any]) -> Iterator[None]:
    """Within: a RequestError names this point. of: what run.json says of the sweep; {}: there is none."""
    try:
        yield
    except RequestError as e:
        raise RequestError(f"--sweep, at {_told(of['values'])}: {e}" if of else str(e)) from None


# ---------------------------------------------------------------- their submission


@dataclass
class Point:
    """A run that is to be queued, or started here, and how far that has come."""

    asked: Asked
    existed: bool
    inputs: dict[str, Any]
    begun: Queued | Here | None = None

    @property
    def name(self) -> str:
        return self.asked.run.name

    @property
    def config(self) -> Config:
        return self.asked.typed.resolve_length(self.inputs["data"]["num_images"])


def submit(asked: list[Asked], site: Site, args: argparse.Namespace) -> int:
    """Queue all that is not done, or start it here; the exit code. A DDPMError says what is queued and what not."""
    if args.dry_run:
        return _show(asked, site, scripts=args.verbose)
    exist = []
    for one in asked:
        with naming(one.sweep):
            exist.append(submission.check(one)[0])  # weights to start from are read again: many would not fit
    with asked_together([one.run for one, existed in zip(asked, exist, strict=True) if existed]) as known:
        points = _queued(asked, exist, settle(site, dry_run=False), args, known)
    if args.wait and not args.prepare:
        return _wait(asked, points, args.root)
    name = asked[0].sweep["name"]
    print(f"compare them with: python launch/status.py --compare {shlex.quote(name)}{console.same_root(args.root)}")
    return 0


def _queued(
    asked: list[Asked], exist: list[bool], site: Site, args: argparse.Namespace, known: set[str]
) -> list[Point]:
    """Queue or start the runs that are not done, and return them. known: the jobs that all had before."""
    points = [Point(one, existed, {}) for one, existed in _what_to_do(asked, exist, site)]
    packed: dict[str, dict[str, Any]] = {}
    for point in points:  # nothing is queued before all can be
        with naming(point.asked.sweep):
            reads = point.asked.config.model_dump_json(include={"data": True, "evaluate": True,
                                                                "train": {"global_batch"}, "log": True})  # fmt: skip
            if reads not in packed:
                root = point.asked.run.path.parent
                packed[reads] = prepare.prepare_inputs(point.asked.config, site, root, point.asked.stages)
            point.inputs = packed[reads]
            prepare.check_existing(point.asked.run, point.config)
    with _telling(points):
        _begin(points, site, args)
        _tell_what_they_wait_for(points, known)
    return points


def _what_to_do(asked: list[Asked], exist: list[bool], site: Site) -> list[tuple[Asked, bool]]:
    """The runs that are neither done nor at work here, and whether each exists. Prints how the others are."""
    todo = []
    for one, existed in zip(asked, exist, strict=True):
        with naming(one.sweep):
            here = local.at_work(one.run) if existed else {}
            if here and site.is_local and reading.of_run(one.run) == one.config:
                pid, _ = next(iter(here.values()))
                print(f"{one.run.name}: at work on this machine already, or waits to be, as pid {pid}")
                continue
            if existed:
                prepare.is_at_work(one.run, one.config, site)
                if submission.is_complete(one):
                    print(f"{one.run.name}: complete at step {one.run.latest_step()}")
                    submission.keep_changes(one, site)
                    continue
                borrowing.check_trainable(one.run)
            todo.append((one, existed))
    return todo


def at_work_here(root: Path) -> list[local.Place]:
    """The background jobs of this machine that are at work, or wait to be, for the sweeps of a root."""
    found = []
    for run in console.all_runs(root):
        with suppress(OSError, DamagedFile):  # another's
            if usable(run).get("sweep"):
                found += [(pid, job) for job, (pid, _) in local.at_work(run).items()]
    return found


def _begin(points: list[Point], site: Site, args: argparse.Namespace) -> None:
    """Queue or start every training, and only then what follows: if the user may not have so many jobs, samples must
    not keep a training out of the queue."""
    before = at_work_here(points[0].asked.run.path.parent) if site.is_local and points else []
    for point in points:
        one = point.asked
        start = origin.read(one.source, one.config) if one.source is not None and not point.existed else None
        begun = beginning.begin(one, site, point.inputs, start, existed=point.existed, prepare_only=args.prepare,
                                 code_asked=args.code, train_alone=True, why=point is points[0],
                                 behind=before)  # fmt: skip
        point.begun = begun
        if isinstance(begun, Here):
            before.append((begun.process.pid, begun.log.stem))
            *others, (pid, _) = before
            turn = f", once pid {', '.join(str(p) for p, _ in others)} {'has' if len(others) == 1 else 'have'} ended,"
            print(f"runs in the background{turn if others else ''} as pid {pid}; its log: {begun.log}")
    for point in points:
        if isinstance(point.begun, Queued) and point.begun.left:
            print(f"{point.name}:")
            why = point is points[0] and not point.begun.jobs
            point.begun = beginning.queue_rest(point.asked, point.config, site, point.begun, why=why)


def _tell_what_they_wait_for(points: list[Point], known: set[str]) -> None:
    """Of all but the first, which has told it: SLURM is asked once, and those that wait alike have one line. known: the
    jobs of before, of which nothing is told.

    Raises RequestError where one would never start, and takes its jobs back.
    """
    queued = [(point, point.begun.jobs) for point in points[1:] if isinstance(point.begun, Queued)]
    new = [(point, jobs) for point, jobs in queued if jobs and jobs[0] not in known]
    alike: dict[str, list[tuple[str, str]]] = {}
    with scheduler.looked_up_together(jobs[0] for _, jobs in new):
        for point, jobs in new:
            try:
                with naming(point.asked.sweep):
                    told = why_it_waits(jobs[0], "first", work.to_end(point.asked.run))
                if told:
                    alike.setdefault(told.partition(": ")[2], []).append((point.name, jobs[0]))
            except RequestError:
                scheduler.cancel([job for job in jobs if job not in known])
                point.begun = None
                raise
    for wait, those in alike.items():
        of = f"{those[0][0]}: " if len(those) == 1 else ""
        print(f"{of}{scheduler.waiting([job for _, job in those], wait)}")


@contextmanager
def _telling(points: list[Point]) -> Iterator[None]:
    """Within: an error is followed by which runs are queued and which are not, and by the command that goes on."""

    def told() -> str:
        lacks = [p.name for p in points if p.begun is None]
        later = [p.name for p in points if isinstance(p.begun, Queued) and p.begun.left]
        there = [p.name for p in points if p.name not in lacks]
        lines = [f"queued: {', '.join(there) or 'none'}"]
        lines += [f"not queued: {', '.join(lacks)}"] if lacks else []
        lines += [f"without what follows training: {', '.join(later)}"] if later else []
        lines += ["What is queued stays. The same command goes on with the rest, once it can:"]
        return "\n".join([*lines, f"  {environment.command_line()}"])

    try:
        yield
    except DDPMError as e:
        raise type(e)(f"{e}\n{told()}") from None
    except BaseException:
        print(told(), file=sys.stderr)
        raise


def _wait(asked: list[Asked], points: list[Point], root: str | None) -> int:
    """Until all are done; then side by side. 1 where one has failed."""
    worst = 0
    begun = [point.asked for point in points]
    for one in (one for one in asked if one not in begun):
        while local.at_work(one.run):
            time.sleep(follow.POLL_S)
        worst = max(worst, submission.outcome(one.run, one.config, one.stages))
    for point in points:
        run, ended = point.asked.run, 0
        print(f"{point.name}:", flush=True)
        if isinstance(point.begun, Here):
            ended = follow.follow_process(run, *point.begun)
            if ended == 130:
                if point is not points[-1]:
                    whole = f"python launch/cancel.py {shlex.quote(point.asked.sweep['name'])}{console.same_root(root)}"
                    print(f"the others begin when it ends; stop all of the sweep with: {whole}", file=sys.stderr)
                return 130
        elif point.begun is not None:
            follow.follow_jobs(run, point.begun.jobs)
        worst = max(worst, ended or submission.outcome(run, point.config, point.asked.stages))
    side_by_side.show(side_by_side.rows([one.run for one in asked]))
    return worst


def _show(asked: list[Asked], site: Site, *, scripts: bool) -> int:
    """A dry run."""
    nums: list[int | None] = []
    lefts: list[plan.Left | None] = []
    for one in asked:
        with naming(one.sweep):
            nums.append(submission.check_dry(one)[0])
            left = chain.remaining(one.run, one.config, one.stages) if one.run.path.exists() else None
            lefts.append(plan.Left(*left, one.run.latest_step()) if left else None)
    batches: set[int] = set()
    for one, num in zip(asked, nums, strict=True):
        if (batch := one.config.train.global_batch) not in batches:
            prepare.warn_of_batch(one.config, num)
        batches.add(batch)
    site = settle(site, dry_run=True)
    plan.print_sweep([(one.run.name, one.config, one.sweep["values"]) for one in asked], lefts, nums, site)
    one, left_of_it = asked[0], lefts[0] or plan.Left(True, asked[0].stages)
    if scripts:
        print(f"# the first of them, {one.run.name}:")
        box = submission.in_container(site, one.run)
        plan.print_dry_run(one.config, site, one.run, left_of_it, nums[0], scripts=True, in_container=box)
        return 0
    print("# dry run: nothing was written or queued; --verbose shows all of the first")
    return 0
