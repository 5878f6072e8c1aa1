#!/usr/bin/env python
"""Submit a training run, and what follows it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not launch/, whose names would shadow others

from ddpm import __version__
from ddpm import config as configs
from ddpm.config import Config, check_world_size
from ddpm.errors import DDPMError, EnvironmentLacks, RequestError
from ddpm.rundir import SCHEMA, TMP_PREFIX, RunDir, check_name, fsync_dir, now, read_json, write_bytes, write_json
from launch import cluster, console, environment, requests, scheduler
from launch.cluster import Site
from launch.environment import PROJECT

EXAMPLES = """examples:
  python launch/submit.py --partition gpu                               the whole command: Ho et al.'s CIFAR-10 model
  python launch/submit.py configs/cifar10.yaml train.lr=1e-4 --name low-lr --partition gpu --nodes 2 --gpus-per-node 4
  python launch/submit.py --partition gpu --time 4h --then sample,evaluate    … then 50,000 images, and their FID
  python launch/submit.py --partition gpu --dry-run                     show config and job script; touch nothing
  python launch/submit.py configs/quickstart.yaml --cluster local --wait      on this machine

The same command again resumes the run, extends it (train.total_steps=…), or says that it is complete.
A run ends for good with scancel; `touch runs/NAME/STOP` ends it at the next step with a save.
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="a config file (default configs/cifar10.yaml) and any of its keys, e.g. train.lr=1e-4",
    )
    parser.add_argument("--name", help="the run's name (default: the config's)")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
    parser.add_argument("--then", default="", metavar="sample,evaluate", help="what to do when training is done")
    parser.add_argument("--wait", action="store_true", help="stay until all is done, showing progress")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the exact job script")
    parser.add_argument("--prepare", action="store_true", help="all but queueing: data, checks, run directory")
    cluster.add_options(parser)
    return parser.parse_intermixed_args()


def read_request(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """The config and the stages that the command line asks for. Raises RequestError."""
    files = [w for w in args.words if "=" not in w]
    overrides = [w for w in args.words if "=" in w]
    if "" in files:
        raise RequestError("an empty word where a config file or key=value was expected: an unset shell variable?")
    if len(files) > 1:
        raise RequestError(f"more than one config file: {' '.join(files)}; give one, and changes as key=value")
    path = Path(files[0]) if files else PROJECT / "configs" / "cifar10.yaml"
    if args.name is not None:
        overrides = [o for o in overrides if not o.startswith("name=")] + [f"name={check_name(args.name)!r}"]
    stages = [s for s in args.then.split(",") if s]
    if stages not in ([], ["sample"], ["sample", "evaluate"]):
        raise RequestError(f"--then {args.then}: allowed are sample, and sample,evaluate")
    return configs.load(path, overrides, shelf=PROJECT / "configs"), stages


def check_resources(config: Config, site: Site) -> None:
    """Before the scheduler is asked for GPUs: however many it has, the number of ranks is known."""
    check_world_size(config, site.world_size)
    if cluster.is_local(site) and site.nodes > 1:
        raise RequestError(
            f"--nodes {site.nodes}: --cluster local is one machine; give --tasks-per-node for more ranks"
        )


def check_data(config: Config, stages: list[str]) -> None:
    """Paths and splits that the chain will read, before anything is written. Raises RequestError."""
    from ddpm.data import open_source

    open_source(config.data)
    if "evaluate" in stages:
        requests.check_split(config, config.evaluate.reference)


def check_existing(run: RunDir, config: Config) -> bool:
    """Whether the run exists and may go on with this config. Raises RequestError where its mathematics is another."""
    if not run.path.exists():
        return False
    record = read_json(run.run_json)
    if record is None or not run.config.exists():
        raise RequestError(f"{run.path} exists and is no run: choose another --name, or move it away")
    there = configs.load(run.config)
    if there.digest() != config.digest():
        raise RequestError(
            f"run {run.name} exists with other mathematics: {differences(there, config)}. Choose another "
            f"--name, or submit it with what it has"
        )
    if config.train.total_steps < run.latest_step():
        raise RequestError(
            f"train.total_steps = {config.train.total_steps}: run {run.name} is already at step "
            f"{run.latest_step()}; ask for more, or choose another --name"
        )
    return True


def differences(there: Config, asked: Config) -> str:
    old, new = there.model_dump(mode="json"), asked.model_dump(mode="json")
    lines = []
    for key in configs.field_keys(Config):
        a, b = _at(old, key), _at(new, key)
        if a != b and key.split(".")[0] in ("seed", "data", "model", "diffusion", "train") and key != "data.path":
            lines.append(f"{key} is {a!r} there and {b!r} here")
    return "; ".join(lines)


def _at(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


# ---------------------------------------------------------------- preparing


def prepare_inputs(config: Config, site: Site, root: Path, stages: list[str]) -> dict[str, Any]:
    """What needs a network or a decoder, done here: data packed, weights fetched. Returns run.json's `data`."""
    cache = Path(environment.expand(site.data_cache)) if site.data_cache else root / ".cache"
    made = [p for p in (cache / "data", *(cache / "data").parents) if not p.exists()]
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EnvironmentLacks(
            f"cannot write {cache} ({e.strerror}): choose another place with --root or DDPM_RUNS"
        ) from None
    try:
        return _pack(config, site, cache, stages)
    except DDPMError:
        for path in made:  # a refused request leaves nothing behind
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _pack(config: Config, site: Site, cache: Path, stages: list[str]) -> dict[str, Any]:
    from ddpm import data

    if "evaluate" in stages and config.evaluate.extractor == "inception":
        from ddpm.features import ensure_inception_weights

        ensure_inception_weights()
    bar = _packing_progress()
    key, packed = data.pack(config.data, "train", cache / "data", progress=bar)
    if "evaluate" in stages and config.evaluate.reference == "test":
        data.pack(config.data, "test", cache / "data", progress=bar)
    print(
        f"data: {config.data.name} {config.data.image_size}x{config.data.image_size}, {len(packed)} images, "
        f"digest {packed.digest[:12]}",
        flush=True,
    )
    return {
        "cache": str(cache / "data"),
        "key": key,
        "digest": packed.digest,
        "num_images": len(packed),
        "scratch": site.scratch,
    }


def _packing_progress() -> Any:
    tty = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if tty:
            print(f"\rpacking {done}/{total} images", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done % 10_000 == 0:
            print(f"packing {done}/{total} images", flush=True)

    return show


def create_run(run: RunDir, config: Config, record: dict[str, Any]) -> None:
    """Make the run directory whole: built beside its place, then renamed there."""
    tmp = run.path.with_name(f"{TMP_PREFIX}{run.name}.{os.getpid()}")
    try:
        tmp.mkdir(parents=True)
        for sub in ("events", "checkpoints", "tb", "grids", "logs", "samples", "eval"):
            (tmp / sub).mkdir()
        write_bytes(tmp / "config.yaml", config.to_yaml().encode())
        _write_setup(RunDir(tmp), record)
        write_json(tmp / "run.json", record)
        tmp.rename(run.path)
        fsync_dir(run.path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def update_run(run: RunDir, config: Config, record: dict[str, Any]) -> None:
    """A later submission: what it may change (length, intervals, resources), never the mathematics."""
    old = read_json(run.run_json) or {}
    if old.get("data", {}).get("digest") != record["data"]["digest"]:
        raise RequestError(
            f"run {run.name} was trained on other pixels (digest "
            f"{str(old.get('data', {}).get('digest'))[:12]}, now {record['data']['digest'][:12]}); "
            f"restore the data, or choose another --name"
        )
    write_bytes(run.config, config.to_yaml().encode(), replace=True)
    _write_setup(run, record)
    write_json(run.run_json, {**record, "created": old["created"], "resolved": old.get("resolved", {})}, replace=True)


def _write_setup(run: RunDir, record: dict[str, Any]) -> None:
    """The profile's shell lines, as a file that every batch shell sources."""
    path = run.path / "setup.sh"
    if lines := record["launch"].get("setup"):
        write_bytes(path, ("\n".join(lines) + "\n").encode(), replace=True)
    else:
        path.unlink(missing_ok=True)


def describe(config: Config, site: Site, run: RunDir, data: dict[str, Any]) -> dict[str, Any]:
    """run.json (DESIGN section 3); `resolved` is filled in by the first life."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "schema": SCHEMA,
        "name": run.name,
        "created": now(),
        "config_digest": config.digest(),
        "git": _git(),
        "versions": {
            "ddpm-hpc": __version__,
            "python": sys.version.split()[0],
            **{p: of(p) for p in ("torch", "torchvision", "numpy", "submitit")},
        },
        "command": ["python", *sys.argv],
        "resolved": {},
        "data": data,
        "launch": site.model_dump(mode="json", exclude_defaults=True),
    }


def _git() -> str | None:
    """Commit of the project, with `+dirty` where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# ---------------------------------------------------------------- queueing


def jobs_of(run: RunDir, config: Config, site: Site, stages: list[str], *, train: bool = True) -> list[scheduler.Job]:
    """The chain: train, then an array over the shards that are not done, then the score."""
    name = requests.default_set(config, config.train.total_steps)
    jobs = [scheduler.Job("train", run, site)] if train else []
    if "sample" in stages and (shards := requests.missing_shards(run, config, name)):
        jobs.append(requests.sample_job(run, site, name, shards, None))
    if "evaluate" in stages:
        jobs.append(requests.evaluate_job(run, site, name, None))
    return jobs


def queue(jobs: list[scheduler.Job]) -> list[str]:
    """Submit a chain, each after the one before, however that ended; cancels it whole if a later part is refused."""
    from dataclasses import replace

    ids: list[str] = []
    after: str | None = None
    for job in jobs:
        try:
            new = scheduler.submit(replace(job, after=after))
        except RequestError:
            if ids:
                from launch import slurm

                slurm.cancel(ids)
            raise
        ids += new
        after = ":".join(new)
        print(
            f"queued: {job.stage} as job {' '.join(new)}" + (f" ({len(job.shards)} tasks)" if job.shards else ""),
            flush=True,
        )
    return ids


def remaining(run: RunDir, config: Config, stages: list[str]) -> tuple[bool, list[str]]:
    """What an existing run still needs: whether to train, and the later stages that are not done."""
    from launch.jobs import finished

    name = requests.default_set(config, config.train.total_steps)
    if not finished(run, config):
        return True, stages
    sampled = "sample" not in stages or not requests.missing_shards(run, config, name)
    scored = "evaluate" not in stages or requests.is_scored(run, config, name)
    return False, [] if sampled and scored else stages


def print_dry_run(config: Config, site: Site, run: RunDir, jobs: list[scheduler.Job]) -> None:
    print(f"# run directory: {run.path}\n# config, resolved (digest {config.digest()[:12]}):\n{config.to_yaml()}")
    if cluster.is_local(site):
        print("# processes on this machine, one after another:")
    for job in jobs:
        if not cluster.is_local(site):
            after = " (after the job before has ended)" if job.stage != "train" else ""
            print(f"# {job.stage} job{after}, via {site.via}:")
        print(requests.describe_job(job))
    print("# dry run: nothing was written or queued")


def main() -> int:
    args = parse()
    config, stages = read_request(args)
    site = cluster.resolve(args)
    root = environment.runs_root(args.root)
    run = RunDir(root / config.name)
    check_resources(config, site)
    if args.dry_run:
        check_existing(run, config)
        site = cluster.settle(site, dry_run=True)
        print_dry_run(config, site, run, jobs_of(run, config, site, stages))
        return 0
    check_data(config, stages)
    exists = check_existing(run, config)
    site = cluster.settle(site, dry_run=False)  # from here on it is about what the environment lacks
    if exists and not cluster.is_local(site) and (there := requests.jobs_in_queue(run, "train")):
        print(
            f"run {run.name} is in the queue already, as job {' '.join(there)}: nothing to submit. See "
            f"python launch/status.py {run.name}"
        )
        return _wait(run, config, stages, there) if args.wait else 0
    train, stages_left = remaining(run, config, stages) if exists else (True, stages)
    if exists and not train and not stages_left:
        print(f"run {run.name} is complete: {run.latest_step()} steps" + _results(run, config, stages))
        return 0

    data = prepare_inputs(config, site, root, stages)
    record = describe(config, site, run, data)
    if exists:
        update_run(run, config, record)
        if run.stop_file.exists():
            run.stop_file.unlink()
            print(f"removed {run.stop_file}: submitting again means going on")
    else:
        create_run(run, config, record)
    print(f"run: {run.path}")
    if args.prepare:
        print(f"prepared; queue it with: sbatch --partition PARTITION slurm/train.sbatch {run.path}")
        return 0
    jobs = jobs_of(run, config, site, stages_left, train=train)
    if cluster.is_local(site):
        from launch import local

        process, log = local.start(run, jobs)
        if not args.wait:
            print(f"running in the background as pid {process.pid}; follow it with: tail -f {log}")
            return 0
        code = console.follow_process(run, process, log)
        return _outcome(run, config, stages) if code == 0 else (code if code == 130 else 1)
    try:
        ids = queue(jobs)
    except RequestError:
        if not exists:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    print(f"watch it with: python launch/status.py {run.name} --watch")
    return _wait(run, config, stages, ids) if args.wait else 0


def _wait(run: RunDir, config: Config, stages: list[str], ids: list[str]) -> int:
    console.follow_jobs(run, ids)
    return _outcome(run, config, stages)


def _outcome(run: RunDir, config: Config, stages: list[str]) -> int:
    """After waiting: what the run directory says was done; the scheduler's word is not enough."""
    train, left = remaining(run, config, stages)
    if train or ("evaluate" in left):
        print(
            f"error: run {run.name} ended at step {run.latest_step()} of {config.train.total_steps}"
            + ("" if train else ", without a score")
            + f"; its logs are in {run.logs}",
            file=sys.stderr,
        )
        return 1
    print(f"run {run.name} is complete: {run.latest_step()} steps" + _results(run, config, stages))
    return 0


def _results(run: RunDir, config: Config, stages: list[str]) -> str:
    """The score's line, where one was asked for and is there."""
    name = requests.default_set(config, config.train.total_steps)
    record = read_json(run.eval / f"{name}.json") if "evaluate" in stages else None
    grid = f"\ngrid: {run.grid(run.latest_step())}"
    if not record:
        return grid
    score = "fid" if "fid" in record else "frechet_distance"
    return (
        f"\n{score}: {record[score]:.4f} over {record['num_samples']} samples ({record['extractor']['name']} "
        f"features, {record['reference']['name']} {record['reference'].get('split', '')})\n"
        f"score: {run.eval / (name + '.json')}{grid}"
    )


if __name__ == "__main__":
    console.run_script(main)
