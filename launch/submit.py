#!/usr/bin/env python
"""Submit a training run, and what follows it."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not launch/, whose names would shadow others

from ddpm import config as configs
from ddpm.config import Config, check_world_size
from ddpm.errors import RequestError
from ddpm.rundir import DamagedFile, RunDir, check_name, read_json, read_jsonl
from launch import console, preparing, recipes, requests, scheduler
from launch.cluster import environment, slurm
from launch.cluster import site as cluster
from launch.cluster.environment import PROJECT
from launch.cluster.site import Site

EXAMPLES = """examples:
  python launch/submit.py --partition gpu                               the whole command: Ho et al.'s CIFAR-10 model
  python launch/submit.py configs/cifar10.yaml train.lr=1e-4 --name low-lr --partition gpu --nodes 2 --gpus-per-node 4
  python launch/submit.py --partition gpu --time 4h --then sample,evaluate    … then 50,000 images, and their FID
  python launch/submit.py --list                                        the recipes in configs/
  python launch/submit.py --partition gpu --dry-run                     show config and job script; touch nothing
  python launch/submit.py configs/quickstart.yaml --cluster local --wait      on this machine

The same command again resumes the run, extends it (train.total_steps=… or total_epochs=…), or says that it is complete.
A run ends for good with scancel; `touch runs/NAME/STOP` ends it at the next step with a save.
"""
CELEBA_TRAIN_IMAGES = 162_770
"""In the data set's own partition."""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="a config file (default configs/cifar10.yaml) and any of its keys, e.g. train.lr=1e-4",
    )
    parser.add_argument("--list", action="store_true", help="show the recipes in configs/, and leave")
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
    return with_absolute_paths(configs.load(path, overrides, shelf=PROJECT / "configs")), stages


def with_absolute_paths(config: Config) -> Config:
    """The config with its paths as they are meant here: jobs run in the project's directory."""

    def absolute(key: str, path: str) -> str:
        try:
            return str(Path(path).expanduser().absolute())
        except RuntimeError:
            raise RequestError(f"{key} = {path}: there is no such user; give the whole path") from None

    data, evaluate = config.data, config.evaluate
    if data.path is not None:
        data = data.model_copy(update={"path": absolute("data.path", data.path)})
    if evaluate.reference not in ("train", "test"):
        evaluate = evaluate.model_copy(update={"reference": absolute("evaluate.reference", evaluate.reference)})
    return config.model_copy(update={"data": data, "evaluate": evaluate})


def check_resources(config: Config, site: Site) -> None:
    """Before the scheduler is asked for GPUs: however many it has, the number of ranks is known."""
    check_world_size(config, site.world_size)
    if cluster.is_local(site) and site.nodes > 1:
        raise RequestError(
            f"--nodes {site.nodes}: --cluster local is one machine; give --tasks-per-node for more ranks"
        )


def num_images(config: Config, run: RunDir) -> int | None:
    """Training images, without packing any: an existing run's record says, else the data. None: not known yet.

    Raises RequestError for a data.path that cannot serve.
    """
    if known := (read_json(run.run_json) or {}).get("data", {}).get("num_images"):
        return int(known)
    from ddpm.data.packed import open_source

    source = open_source(config.data)
    if source.kind == "celeba":  # not downloaded: its attributes are not known
        return None if config.data.attributes else CELEBA_TRAIN_IMAGES
    return source.num_images("train") if "train" in source.members else None


def resolve_length(config: Config, run: RunDir) -> Config:
    """The config with its length in steps, if that can be known before the data is packed; else as it is."""
    train = config.train
    if train.total_steps is not None:
        return config
    num = 0 if train.total_images else num_images(config, run)  # total_images mean the same with any data
    return config if num is None else config.resolve_length(num)


# ---------------------------------------------------------------- queueing


def jobs_of(run: RunDir, config: Config, site: Site, stages: list[str], *, train: bool = True) -> list[scheduler.Job]:
    """The chain: train, then an array over the shards that are not done, then the score."""
    name = requests.chain_set(run, config)
    jobs = [scheduler.Job("train", run, site)] if train else []
    if "sample" in stages and (shards := requests.missing_shards(run, config, name)):
        jobs.append(requests.sample_job(run, site, name, shards, None))
    if "evaluate" in stages:
        jobs.append(requests.evaluate_job(run, site, name, None))
    return jobs


def queue(jobs: list[scheduler.Job]) -> tuple[list[str], list[str]]:
    """Submit a chain, each after the one before, however that ended; what is in the queue already is not queued twice.

    Returns the job ids of the whole chain, and what to tell of them (once it is queued: a reader may be gone). Cancels
    what it submitted if a later part is refused; if SLURM does not answer, it stays, and a second submission finds it.
    """
    ids: list[str] = []
    new: list[str] = []
    told: list[str] = []
    after: str | None = None
    try:
        for job in jobs:
            there = requests.jobs_in_queue(job.run, job.stage, job.set_name)
            mine = there or scheduler.submit(replace(job, after=after))
            ids += mine
            new += [] if there else mine
            after = ":".join(mine)
            tasks = f" ({len(job.shards)} tasks)" if job.shards and not there else ""
            told.append(f"{'in the queue already' if there else 'queued'}: {job.stage} as job {' '.join(mine)}{tasks}")
    except slurm.NoAnswer:
        raise
    except Exception:
        if new:
            slurm.cancel(new)
        raise
    return ids, told


def remaining(run: RunDir, config: Config, stages: list[str]) -> tuple[bool, list[str]]:
    """What an existing run still needs: whether to train, and the later stages that are not done.

    Raises RequestError where its sample set was begun with another request.
    """
    name = requests.chain_set(run, config)
    sampled = "sample" not in stages or not requests.missing_shards(run, config, name)
    if requests.final_step(run, config) is None:
        return True, stages
    scored = "evaluate" not in stages or requests.is_scored(run, config, name)
    return False, [] if sampled and scored else stages


def check_last(run: RunDir) -> bool:
    """Whether the last checkpoint of a finished run still holds; says so where it does not."""
    from ddpm.run import generations as checkpoint

    try:
        checkpoint.verify(run, run.latest_step())
        return True
    except (DamagedFile, OSError) as e:
        print(f"the last checkpoint is damaged ({e}): training goes on from the newest one that is not", flush=True)
        return False


def check_queued(run: RunDir, config: Config) -> bool:
    """Whether SLURM has the run's training already. Raises RequestError where that goes by another config."""
    jobs = requests.jobs_in_queue(run, "train")
    if jobs and configs.load(run.config) != config:
        raise RequestError(
            f"run {run.name} is in the queue as job {' '.join(jobs)} with {preparing.differences(run, config)}. "
            f"Wait for it, or end it (scancel {' '.join(jobs)}; nothing is lost), then submit again"
        )
    return bool(jobs)


def print_dry_run(config: Config, site: Site, run: RunDir, stages: list[str]) -> None:
    known = config.train.total_steps is not None
    print(f"# run directory: {run.path}")
    print(f"# config, resolved (digest {config.digest()[:12]}):" if known else "# config:")
    print(config.to_yaml())
    if not known:
        print(f"# length: {config.train.total_epochs} epochs (steps known once the data is packed)")
        if stages:
            print(f"# after training: {', '.join(stages)}, of a set that is named after the last step")
    jobs = jobs_of(run, config, site, stages if known else [])
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
    if args.list:
        recipes.print_table(PROJECT / "configs")
        return 0
    asked, stages = read_request(args)
    site = cluster.resolve(args)
    root = environment.runs_root(args.root)
    run = RunDir(root / asked.name)
    check_resources(asked, site)
    config = resolve_length(asked, run)
    for warning in config.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        preparing.check_existing(run, config)
        site = cluster.settle(site, dry_run=True)
        print_dry_run(config, site, run, stages)
        return 0
    preparing.check_data(config, stages)
    exists = preparing.check_existing(run, config)
    site = cluster.settle(site, dry_run=False)  # from here on it is about what the environment lacks
    queued = exists and not cluster.is_local(site) and check_queued(run, config)
    train, stages_left = remaining(run, config, stages) if exists else (True, stages)
    if not train and not check_last(run):
        train, stages_left = True, stages
    if exists and not train and not stages_left:
        print_results(run, config, stages)
        return 0

    data = preparing.prepare_inputs(config, site, root, stages)
    config = asked.resolve_length(data["num_images"])
    record = preparing.describe(config, site, run, data)
    if not exists:
        preparing.create_run(run, config, record)
    elif not queued:
        preparing.update_run(run, config, record)
        requests.lift_stop(run)
    print(f"run: {run.path}")
    if args.prepare:
        print(f"prepared; queue it with:\n{scheduler.by_hand(scheduler.Job('train', run, site))}")
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
        ids, told = queue(jobs)
    except slurm.NoAnswer:
        raise  # with a job in the queue, perhaps, which needs the directory
    except Exception:
        if not exists:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    print("\n".join(told))
    print(f"watch it with: python launch/status.py {run.name} --watch")
    return _wait(run, config, stages, ids) if args.wait else 0


def _wait(run: RunDir, config: Config, stages: list[str], ids: list[str]) -> int:
    console.follow_jobs(run, ids)
    return _outcome(run, config, stages)


def _outcome(run: RunDir, config: Config, stages: list[str]) -> int:
    """After waiting: what the run directory says was done; the scheduler's word is not enough."""
    train, left = remaining(run, config, stages)
    if train or left:
        print(
            f"error: run {run.name} ended at step {run.latest_step()} of {config.train.total_steps}"
            + ("" if train else f", without what was to follow ({', '.join(left)})")
            + f"; its logs are in {run.logs}",
            file=sys.stderr,
        )
        return 1
    print_results(run, config, stages)
    return 0


def print_results(run: RunDir, config: Config, stages: list[str]) -> None:
    """What came out of it, as a table."""
    step = run.latest_step()
    name = requests.chain_set(run, config)
    record = read_json(run.eval / f"{name}.json") if "evaluate" in stages else None
    metrics = [m for m in read_jsonl(run.metrics) if m["step"] <= step]
    rows = {"steps": f"{step}"}
    if metrics:
        rows["images/s"] = f"{statistics.median(m['images_per_s'] for m in metrics):.0f}"
        rows["loss"] = f"{metrics[-1]['loss']:.4f}"
    if record:
        what = "FID" if "fid" in record else "Fréchet distance"
        against = " ".join(filter(None, [record["reference"]["name"], record["reference"].get("split")]))
        rows[what] = (
            f"{record.get('fid', record.get('frechet_distance')):.4f} ({record['num_samples']} samples against "
            f"{against}, {record['extractor']['name']} features{'' if 'fid' in record else ': no FID'})"
        )
        rows["score"] = f"{run.eval / name}.json"
    if run.grid(step).exists():
        rows["grid"] = f"{run.grid(step)}"
    print(f"run {run.name} is complete: {step} steps")
    for what, told in rows.items():
        print(f"  {what:18}{told}")


if __name__ == "__main__":
    console.run_script(main)
