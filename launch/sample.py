#!/usr/bin/env python
"""Sample a trained run by an array job; each shard is made once, whatever happens to its job."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import json
import shlex
from typing import Any

from ddpm.config import reading
from ddpm.config.diffusion import VARIANCES
from ddpm.config.sample import kind_of
from ddpm.config.schema import Config
from ddpm.config.yaml import dump_yaml
from ddpm.data.labels import class_index, class_names
from ddpm.errors import RequestError
from ddpm.run import generations
from ddpm.run.log import counted, plain
from ddpm.run.paths import RunDir, SampleSet, check_name, check_set_name
from ddpm.run.records import read_run
from ddpm.run.state import finished_step
from ddpm.sampling.request import Request, check_same, publish_request, read_request, usual_steps, withdraw_request
from launch import prepare
from launch.cluster import environment
from launch.cluster.job import Job, check_path, ranges
from launch.cluster.options import add_options, resolve
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.queue import borrowing, chain, local, milestones, sets
from launch.queue.directory import base_of, use_shell_of
from launch.queue.submitting import by_hand, submit_alone
from launch.queue.turns import turn
from launch.queue.waiting import jobs_in_queue
from launch.terminal import console, follow, plan
from launch.terminal.results import why_not

EXAMPLES = """examples:
  python launch/sample.py cifar10                                     what the run's config asks for (sample.*)
  python launch/sample.py cifar10 --sampler ancestral --shards 128    all 1000 steps, as in the paper
  python launch/sample.py cifar10 --sampler ancestral --variance fixed_small     the posterior's variance
  python launch/sample.py cifar10-conditional --sampler dpmpp_2m --class-plan balanced
      … --guidance 1.5                                                of a run trained with train.label_dropout=0.1
  python launch/sample.py cifar10-conditional --class 3 --num-samples 64       one class alone, by name or number
  python launch/sample.py cifar10 --set early --step 100000 --num-samples 5000
  python launch/sample.py cifar10 --set early --png                   unpack a finished set to PNG files

The same command again submits only the missing shards. It runs where the run was submitted to, unless options differ.
"""
OPTIONS = {
    "num_samples": int,
    "shards": int,
    "batch": int,
    "sampler": str,
    "steps": int,
    "eta": float,
    "guidance": float,
    "seed": int,
    "weights": str,
    "precision": str,
}


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a run's name, or its directory")
    parser.add_argument("--set", dest="set_name", help="the sample set's name (default: from sampler, step and seed)")
    for name, kind in OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"default: the config's sample.{name}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--class-plan", metavar="PLAN", help="samples per class: balanced, or counts: 100,100,50")
    which.add_argument(
        "--class", dest="classes", action="append", metavar="CLASS", help="sample this class alone, by name or number"
    )
    parser.add_argument(
        "--variance",
        choices=VARIANCES,
        help="variance of ancestral sampling (default: the config's diffusion.variance)",
    )
    parser.add_argument("--no-clip", action="store_true", help="do not clip predictions of x_0 to [-1, 1]")
    parser.add_step()
    parser.add_argument(
        "--png", action="store_true", help="unpack the finished set to samples/SET/png/, each class to its own folder"
    )
    parser.add_argument("--prepare", action="store_true", help="write the request; queue nothing")
    parser.add_argument("--wait", action="store_true", help="wait until the shards are done")
    parser.add_argument("--dry-run", action="store_true", help="print the request; touch nothing")
    parser.add_verbose()
    parser.add_root()
    add_options(parser)
    args = parser.parse_args()
    parser.check_verbose(args)
    if args.prepare and args.wait:
        parser.error("--prepare queues nothing, so that there is nothing to --wait for")
    return args


def sampling_config(args: argparse.Namespace, run: RunDir, there: Request | None) -> Config:
    """The run's config with the command line's sample.* in it, validated as a whole.

    there: the request of the set that is named, if it exists: what is not asked for is as it was.
    """
    asked: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if "sampler" in asked and not kind_of(asked["sampler"]).has_eta:
        asked.setdefault("eta", 0.0)  # the config's is for its own
    if args.no_clip:
        asked["clip_x_0"] = False
    if there is not None:
        kept = (*OPTIONS, "class_plan", "clip_x_0")
        asked = {**{name: getattr(there, name) for name in kept}, **asked}
    config = reading.of_run(run)
    if args.class_plan is not None:
        num_samples = asked.get("num_samples", config.sample.num_samples)
        asked["class_plan"] = class_plan(args.class_plan, num_samples, config.model.num_classes)
    if args.classes is not None:
        names = class_names(config, read_run(run) if run.run_json.exists() else {})
        num_samples = asked.get("num_samples", config.sample.num_samples)
        asked["class_plan"] = one_class(args.classes, num_samples, names, config.model.num_classes)
    shards, most = asked.get("shards", config.sample.shards), asked.get("num_samples", config.sample.num_samples)
    if args.shards is None and shards > most >= 1:
        asked["shards"] = most
    if "sampler" in asked and "steps" not in asked:
        asked["steps"] = usual_steps(config, asked["sampler"])
    return reading.of_run(run, [f"sample.{name}={json.dumps(value)}" for name, value in asked.items()])


def class_plan(text: str, num_samples: int, num_classes: int) -> list[int]:
    """The counts that --class-plan means; their number and sum are the config's to check. Raises RequestError."""
    if text == "balanced":
        if not num_classes:
            raise RequestError("--class-plan balanced: the model has no classes (model.num_classes = 0); leave it out")
        if num_samples % num_classes:
            less, more = (n * num_classes for n in (num_samples // num_classes, num_samples // num_classes + 1))
            raise RequestError(
                f"--class-plan balanced: num_samples = {num_samples} must be a multiple of the model's "
                f"{num_classes} classes (model.num_classes): --num-samples {f'{less} or ' if less else ''}{more}"
            )
        return [num_samples // num_classes] * num_classes
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise RequestError(f"--class-plan {text!r}: must be `balanced`, or counts such as 100,100,50") from None


def one_class(words: list[str], num_samples: int, names: list[str], num_classes: int) -> list[int]:
    """The class plan of --class; warns where the word is the name of one class and the number of another.

    names: of the classes, where they are known. Raises RequestError.
    """
    word, *more = words
    if more:
        raise RequestError(f"--class {' --class '.join(words)}: one class at a time; for several give --class-plan")
    if not num_classes:
        raise RequestError(f"--class {word}: the model has no classes (model.num_classes = 0); leave it out")
    numbers = [str(i) for i in range(num_classes)]
    label = class_index(word, names or numbers, "--class")
    if word in numbers and word != str(label):
        other = shlex.quote(plain(names[int(word)]))
        print(
            f"--class {word}: the class of that name, number {label}; for number {word}: --class={other}",
            file=sys.stderr,
        )
    return [num_samples if i == label else 0 for i in range(num_classes)]


def existing_request(run: RunDir, set_name: str | None) -> Request | None:
    """The request of the set that is named on the command line, if it has one."""
    if set_name is None:
        return None
    sample_set = run.sample_set(check_name(set_name, "sample set name"))
    return read_request(sample_set) if sample_set.request.exists() else None


def choose_generation(run: RunDir, asked: int | None) -> generations.Generation:
    """The checkpoint of step `asked`, or the newest, verified. Raises RequestError naming the steps there are."""
    try:
        return generations.choose(run, run.latest_step() if asked is None else asked)
    except generations.NothingSaved as e:
        raise RequestError(f"{e} (python launch/submit.py {run.quoted})") from None
    except generations.AnotherStep as e:
        raise RequestError(f"{e}; choose one with --step") from None


def main() -> int:
    args = parse()
    run = borrowing.own(console.find_run(args.run, args.root), environment.runs_root(args.root), dry_run=args.dry_run)
    args.step = milestones.asked_step(run, args.step)
    there = existing_request(run, args.set_name)
    config = sampling_config(args, run, there)
    site = resolve(args, base_of(run, args), "sample")
    check_path(run, site)
    generation = choose_generation(run, there.checkpoint.step if there and args.step is None else args.step)
    generations.check_mathematics(run.checkpoint(generation.step), generation.manifest, config.digest())
    variance = args.variance or (there.variance if there and args.sampler in (None, there.sampler) else None)
    request = sets.request_for(run, config, generation, variance)
    set_name = args.set_name or sets.set_of(run, config, generation.step, request.variance)
    if there is None:
        check_set_name(set_name)
    if set_name.startswith("-"):
        raise RequestError(f"sample set name {set_name!r}: jobs would read it as an option; do not begin with a dash")
    sample_set = run.sample_set(set_name)
    if args.dry_run:
        job = Job("sample", run, settle(site, dry_run=True), set_name, tuple(range(request.shards)))
        print(f"# sample set: {sample_set.path}\n# request:\n{dump_yaml(request.to_record())}")
        plan.print_jobs([job], scripts=args.verbose)
        return 0

    if sample_set.request.exists():
        check_same(sample_set, request)
    if there is None and args.step is None and finished_step(run, config) is None:
        total = config.train.total_steps
        print(f"of step {generation.step}, the newest that is saved: training has not come to {total}", flush=True)
    from ddpm.sampling.shards import shards_to_make, unpack_png

    missing = shards_to_make(sample_set, request)
    sets.tell_of_other_code(run, sample_set, request, args.code)
    if missing:
        site = settle(site, dry_run=args.prepare)
        prepare.settle_code(run, args.code, config)
    if args.prepare:
        publish(run, sample_set, request)
        use_shell_of(run, site)
        line = f"python launch/sample.py {run.quoted} --set {set_name}"
        if missing and not site.is_local:
            line = by_hand(Job("sample", run, site, set_name, tuple(missing)))
        print(
            f"prepared {sample_set.path}: {len(missing)} of {counted(request.shards, 'shard')} to make"
            + (f", with\n{line}" if missing else "")
        )
    code = 0 if args.prepare else make(run, site, sample_set, request, missing, wait=args.wait)
    if code is not None:
        if args.png and code == 0:
            again = f"python launch/sample.py {run.quoted} --set {shlex.quote(set_name)} --png"
            print(f"no PNG files yet: {again} makes them, once the shards are done")
        return code
    print(
        f"sample set {set_name} is complete: {counted(request.num_samples, 'image')} in "
        f"{counted(request.shards, 'shard')}, {sample_set.path}"
    )
    if args.png:
        where = unpack_png(sample_set, request, sample_set.path / "png", class_names(config, read_run(run)))
        print(f"unpacked to {where}")
    return 0


def publish(run: RunDir, sample_set: SampleSet, request: Request) -> bool:
    """Publish the request; returns whether it is new. Raises RequestError where its checkpoint is gone."""
    step = request.checkpoint.step
    return sets.publish_while_kept(run, sample_set, step, lambda: publish_request(sample_set, request))


def make(
    run: RunDir, site: Site, sample_set: SampleSet, request: Request, missing: list[int], *, wait: bool
) -> int | None:
    """Publish the request, and have the missing shards made. None when they are; else the exit code to leave with."""
    from ddpm.sampling.shards import missing_shards

    if not missing:
        publish(run, sample_set, request)
        return None
    set_name = sample_set.name
    job = Job("sample", run, site, set_name, tuple(missing), despite=run.stop_mark())
    if site.is_local:
        publish(run, sample_set, request)
        process, log = local.start(run, [job])
        code = follow.follow_process(run, process, log)
        if code:
            return code
    else:
        with turn(run):
            use_shell_of(run, site)
            is_new = publish(run, sample_set, request)
            try:
                there = queue_once(job)
            except RequestError:
                if is_new:  # what was refused must not forbid the next try, which may ask otherwise
                    withdraw_request(sample_set)
                raise
        if not wait:
            return 0
        follow.follow_jobs(run, there, [("sample", set_name)])
    left = missing_shards(sample_set, request)
    if left:
        print(f"error: shards {ranges(left)} of {set_name} are missing{why_not(run, 'sample')}", file=sys.stderr)
        return 1
    return None


def queue_once(job: Job) -> list[str]:
    """The jobs that make a set: those in the queue, or a new one."""
    there = jobs_in_queue(job.run, "sample", job.set_name)
    if there:
        print(f"shards of {job.set_name} are in the queue already, as job {' '.join(there)}: nothing to submit")
        return there
    new, waits = submit_alone(job)
    said = f"queued: {job.set_name} as job {new}{chain.tasks_told(job, new)}"
    print("\n".join([said, *filter(None, [waits]), follow.watch_with(job.run)]))
    return [new]


if __name__ == "__main__":
    console.run_script(main)
