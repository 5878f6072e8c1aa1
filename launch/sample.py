#!/usr/bin/env python
"""Sample a trained run: an array job whose shards are made once, whatever happens to their jobs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from ddpm import config as configs
from ddpm.config import Config
from ddpm.errors import RequestError
from ddpm.rundir import RunDir, check_name
from launch import cluster, console, environment, requests, scheduler

EXAMPLES = """examples:
  python launch/sample.py cifar10                                     what the run's config asks for (sample.*)
  python launch/sample.py cifar10 --sampler ancestral --shards 128    all 1000 steps, as in the paper
  python launch/sample.py cifar10 --set early --step 100000 --num-samples 5000
  python launch/sample.py cifar10 --set early --png                   unpack a finished set to PNG files

The same command again submits only the shards that are missing. Where it runs is where the run was submitted to.
"""
OPTIONS = {
    "num_samples": int,
    "shards": int,
    "batch": int,
    "sampler": str,
    "steps": int,
    "eta": float,
    "seed": int,
    "weights": str,
}


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's name, or its directory")
    parser.add_argument("--set", dest="set_name", help="the sample set's name (default: from sampler, step and seed)")
    for name, kind in OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"default: the config's sample.{name}")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--png", action="store_true", help="unpack the finished set to samples/SET/png/")
    parser.add_argument("--prepare", action="store_true", help="publish the request, queue nothing")
    parser.add_argument("--wait", action="store_true", help="stay until the shards are done")
    parser.add_argument("--dry-run", action="store_true", help="print the request and the job script; touch nothing")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
    cluster.add_options(parser)
    return parser.parse_args()


def find_run(word: str, root: str | None) -> RunDir:
    """A run by its directory or its name. Raises RequestError naming the runs there are."""
    base = environment.runs_root(root)
    for path in (Path(word).expanduser().absolute(), base / word):
        if (path / "run.json").is_file():
            return RunDir(path)
    known = sorted(p.parent.name for p in base.glob("*/run.json") if not p.parent.name.startswith("."))
    raise RequestError(f"no run {word!r}; in {base} there are: {', '.join(known) or 'none'} (--root looks elsewhere)")


def sampling_config(args: argparse.Namespace, run: RunDir) -> Config:
    """The run's config with the command line's sample.* in it, validated as a whole."""
    asked = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    there = configs.load(run.config)
    if asked.get("sampler", there.sample.sampler) != there.sample.sampler and "steps" not in asked:
        # the config's steps are for its own sampler; ancestral sampling means all of them
        asked["steps"] = (
            there.diffusion.timesteps if asked["sampler"] == "ancestral" else min(100, there.diffusion.timesteps)
        )
    return configs.load(run.config, [f"sample.{name}={value}" for name, value in asked.items()])


def main() -> int:
    args = parse()
    run = find_run(args.run, args.root)
    config = sampling_config(args, run)
    site = cluster.resolve(args, requests.site_of(run).model_dump(exclude_defaults=True))
    steps = run.steps_saved()
    step = args.step if args.step is not None else next(iter(steps), None)
    if step is None or step not in steps:
        raise RequestError(
            f"run {run.name} has "
            + (
                f"no checkpoint of step {step}; it has {sorted(steps)}"
                if steps
                else "no checkpoint yet: train it first (python launch/submit.py)"
            )
        )
    set_name = check_name(args.set_name or requests.default_set(config, step), "sample set name")

    from ddpm import checkpoint, generate
    from ddpm.rundir import DamagedFile

    try:
        generation = checkpoint.verify(run, step)
    except DamagedFile as e:
        raise RequestError(
            f"the checkpoint of step {step} cannot be used: {e}; others: --step with one of "
            f"{[s for s in steps if s != step]}"
        ) from None
    request = requests.from_config(run, config, generation)
    sample_set = run.sample_set(set_name)
    site = cluster.settle(site, dry_run=args.dry_run)
    if args.dry_run:
        shards = list(range(request.shards))
        print(f"# sample set: {sample_set.path}\n# request: {request.to_record()}")
        print(requests.describe_job(requests.sample_job(run, site, set_name, shards, None)))
        print("# dry run: nothing was written or queued")
        return 0
    generate.publish_request(sample_set, request)
    missing = generate.missing_shards(sample_set, request)
    if args.prepare:
        print(
            f"prepared {sample_set.path}: {len(missing)} of {request.shards} shards to make, with\n"
            f"sbatch --partition PARTITION --array {scheduler.ranges(missing)}%{site.max_parallel} "
            f"slurm/sample.sbatch {run.path} {set_name}"
        )
        return 0
    if missing and (code := make(run, site, set_name, missing, wait=args.wait)) is not None:
        return code
    print(
        f"sample set {set_name} is complete: {request.num_samples} images in {request.shards} shards, {sample_set.path}"
    )
    if args.png:
        count = generate.unpack_png(sample_set, request, sample_set.path / "png")
        print(f"unpacked {count} PNG files to {sample_set.path / 'png'}")
    return 0


def make(run: RunDir, site: cluster.Site, set_name: str, missing: list[int], *, wait: bool) -> int | None:
    """Have the missing shards made. None when they are; else the exit code to leave with."""
    from ddpm import generate

    job = requests.sample_job(run, site, set_name, missing, None)
    if cluster.is_local(site):
        from launch import local

        process, log = local.start(run, [job])
        if code := console.follow_process(run, process, log):
            return code if code == 130 else 1
        return None
    if there := requests.jobs_in_queue(run, "sample", set_name):
        print(f"shards of {set_name} are in the queue already, as job {' '.join(there)}: nothing to submit")
    else:
        there = scheduler.submit(job)
        print(f"queued: {len(missing)} shards of {set_name} as job {' '.join(there)}")
    if not wait:
        return 0
    console.follow_jobs(run, there)
    sample_set = run.sample_set(set_name)
    if left := generate.missing_shards(sample_set, generate.read_request(sample_set)):
        print(f"error: shards {scheduler.ranges(left)} of {set_name} are missing; logs: {run.logs}", file=sys.stderr)
        return 1
    return None


if __name__ == "__main__":
    console.run_script(main)
