#!/usr/bin/env python
"""Submit a training run, and what follows it."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not launch/, whose names would shadow others

import launch.first  # noqa: F401
from ddpm.config import reading
from ddpm.config.sample import FILE
from ddpm.config.schema import Config, check_world_size
from ddpm.errors import RequestError
from ddpm.run.paths import RunDir, check_name
from launch import origin, prepare
from launch.cluster import code, container, environment, scheduler
from launch.cluster.environment import SHIPPED
from launch.cluster.job import Job, check_path
from launch.cluster.memory import check_batch
from launch.cluster.options import add_options, resolve
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.queue import borrowing, chain, directory, local
from launch.queue.naming import name_of
from launch.queue.sets import LEAST_SCORED
from launch.queue.submitting import by_hand
from launch.queue.turns import turn
from launch.terminal import console, faults, follow, plan, recipes
from launch.terminal.results import print_results

if TYPE_CHECKING:
    from ddpm.network.start import Start

EXAMPLES = """examples:
  python launch/submit.py --partition gpu                               the whole command: Ho et al.'s CIFAR-10 model
  python launch/submit.py configs/cifar10.yaml train.lr=1e-4 --name low-lr --partition gpu --nodes 2 --gpus-per-node 4
  python launch/submit.py --partition gpu --time 4h --then sample,evaluate    … then 50,000 images, and their FID
  python launch/submit.py --list                                        the recipes in configs/
  python launch/submit.py --partition gpu --dry-run                     what it would ask for; touches nothing
  python launch/submit.py configs/mine.yaml --partition gpu --from cifar10@400000      … starting from another's weights
  python launch/submit.py configs/quickstart.yaml --cluster local --wait      on this machine

The same command again resumes the run, extends it (train.total_steps=… or total_epochs=…), or says that it is complete.
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
    parser.add_argument("--list", action="store_true", help="show the recipes in configs/, and leave")
    parser.add_argument("--name", help="the run's name (default: the config's; after the data where that is another)")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
    parser.add_argument(
        "--from", dest="origin", metavar="RUN|FILE[@STEP]", help="start a new run from these weights, not from its seed"
    )
    parser.add_argument("--from-weights", choices=("ema", "model"), help="which of a run's (default: ema)")
    parser.add_argument("--then", default="", metavar="sample,evaluate", help="what to do when training is done")
    parser.add_argument("--wait", action="store_true", help="stay until all is done, showing progress")
    parser.add_argument("--dry-run", action="store_true", help="print what would be asked for, and the resolved config")
    parser.add_argument("--verbose", action="store_true", help="with --dry-run: the exact job scripts too")
    parser.add_argument("--prepare", action="store_true", help="all but queueing: data, checks, run directory")
    add_options(parser)
    return parser.parse_intermixed_args()


def read_command_line(args: argparse.Namespace) -> tuple[Config, list[str], recipes.Recipe | None]:
    """The config and the stages that the command line asks for, and the file of the config. Raises RequestError."""
    files = [w for w in args.words if "=" not in w]
    overrides = [w for w in args.words if "=" in w]
    if "" in files:
        raise RequestError("an empty word where a config file or key=value was expected: an unset shell variable?")
    if len(files) > 1:
        raise RequestError(f"more than one config file: {' '.join(files)}; give one, and changes as key=value")
    path = Path(files[0]) if files else SHIPPED / "configs" / "cifar10.yaml"
    if args.name is not None:
        overrides = [o for o in overrides if not o.startswith("name=")] + [f"name={check_name(args.name)!r}"]
    stages = [s for s in args.then.split(",") if s]
    if stages not in ([], ["sample"], ["sample", "evaluate"]):
        raise RequestError(f"--then {args.then}: allowed are sample, and sample,evaluate")
    config = with_absolute_paths(reading.load(path, overrides, shelf=SHIPPED / "configs"))
    if not any(o.startswith("name=") for o in overrides):
        name = name_of(config, environment.runs_root(args.root))
        config = config.model_copy(update={"name": check_name(name)})
    if config.data.name == "digits" and config.data.path is not None:
        raise RequestError(
            f"data.path = {config.data.path}: data.name=digits has its own images; for those there: data.name=images"
        )
    if "evaluate" in stages and config.sample.num_samples < LEAST_SCORED:
        raise RequestError(
            f"sample.num_samples = {config.sample.num_samples}: a score needs at least {LEAST_SCORED} samples, as it "
            f"compares variances; ask for more, or leave evaluate out of --then"
        )
    return config, stages, _recipe(path)


def _recipe(path: Path) -> recipes.Recipe | None:
    """A config file as it stands; None where it is no config by itself."""
    try:
        return recipes.read(path)
    except RequestError:
        return None


def with_absolute_paths(config: Config) -> Config:
    """The config with its paths as they are meant here: jobs run in the project's directory."""

    data, evaluate = config.data, config.evaluate
    if data.path is not None:
        data = data.model_copy(update={"path": str(environment.user_path(data.path, "data.path"))})
    if evaluate.reference not in ("train", "test"):
        reference = environment.user_path(evaluate.reference, "evaluate.reference")
        evaluate = evaluate.model_copy(update={"reference": str(reference)})
    if (path := evaluate.extractor.removeprefix(FILE)) != evaluate.extractor:
        whole = environment.user_path(path, "evaluate.extractor")
        evaluate = evaluate.model_copy(update={"extractor": f"{FILE}{whole}"})
    return config.model_copy(update={"data": data, "evaluate": evaluate})


def check_resources(config: Config, site: Site) -> None:
    """Before the scheduler is asked for GPUs: however many it has, the number of ranks is known."""
    check_world_size(config, site.world_size)
    if site.is_local and site.nodes > 1:
        raise RequestError(
            f"--nodes {site.nodes}: --cluster local is one machine; give --tasks-per-node for more ranks"
        )
    if warning := check_batch(config, site):
        print(f"warning: {warning}", file=sys.stderr)


def main() -> int:
    args = parse()
    if args.list:
        recipes.print_table(SHIPPED / "configs")
        return 0
    asked, stages, recipe = read_command_line(args)
    source = origin.asked(args.origin, args.from_weights, args.root)
    site = resolve(args)
    root = environment.runs_root(args.root)
    run = RunDir(root / asked.name)
    check_resources(asked, site)
    check_path(run, site)
    config = prepare.resolve_length(asked, run)
    limit = [f"{why}, since jobs take it over and a checkpoint may be larger"] if (why := faults.small_files()) else []
    for warning in [*config.warnings(), *([] if site.is_local else site.warnings()), *limit]:
        print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        if prepare.check_existing(run, config):
            origin.check_same(run, source)
        elif source is not None:
            origin.read(source, config)
        if not run.path.exists() and config.data.path:
            prepare.check_data(config, stages)
        num = prepare.num_images(config, run)
        prepare.warn_of_batch(config, num)
        site = settle(site, dry_run=True)
        box = container.lines(site.container, [root, prepare.cache_of(site, root)]) if site.container.image else []
        plan.print_dry_run(config, site, run, stages, num, recipe, scripts=args.verbose, in_container=box)
        return 0
    prepare.check_data(config, stages)
    exists = prepare.check_existing(run, config)
    if exists:
        origin.check_same(run, source)
    start = origin.read(source, config) if source is not None and not exists else None
    site = settle(site, dry_run=False)  # from here on it is about what the environment lacks
    if exists:
        prepare.is_at_work(run, config, site)
    if exists and chain.remaining(run, config, stages) == (False, []) and chain.damage(run) is None:
        print_results(run, config, stages)
        return 0
    if exists:
        borrowing.check_trainable(run)

    inputs = prepare.prepare_inputs(config, site, root, stages)
    config = asked.resolve_length(inputs["data"]["num_images"])
    with turn(run):  # two submissions at once: the second finds what the first has made and queued
        if run.path.exists():
            origin.check_same(run, source)
        elif exists and source is not None:
            raise RequestError(f"run {run.name} was removed meanwhile: submit it again")
        new_code = args.code == "new"
        started = begin(run, config, site, stages, inputs, start, prepare_only=args.prepare, new_code=new_code)
    if isinstance(started, Here):
        return await_here(run, config, stages, started, wait=args.wait)
    if not args.wait or args.prepare:
        return 0
    follow.follow_jobs(run, started)
    return _outcome(run, config, stages)


class Here(NamedTuple):
    """What was started on this machine."""

    process: subprocess.Popen[bytes]
    log: Path


def begin(
    run: RunDir,
    config: Config,
    site: Site,
    stages: list[str],
    inputs: dict[str, Any],
    start: Start | None = None,
    *,
    prepare_only: bool,
    new_code: bool,
) -> list[str] | Here:
    """Write the run down, and have what is left of it queued or started; job ids."""
    exists = prepare.check_existing(run, config)
    queued = exists and prepare.is_at_work(run, config, site)
    if exists:
        prepare.settle_code(run, new=new_code)
    else:
        code.check(code.of_checkout())
    train, left = what_is_left(run, config, stages) if exists else (True, stages)
    record = directory.describe(config, site, run, inputs)
    if not exists and start is not None:
        directory.create_run(run, config, {**record, "from": start.record}, start=start.data)
        came = start.record
        print(f"it starts from the weights ({came['weights']}) of {came['source']}, which it keeps as {run.start.name}")
    elif not exists:
        directory.create_run(run, config, record)
    elif not queued:
        directory.update_run(run, config, record)
        chain.lift_stop(run)
    if not exists:
        prepare.settle_code(run, new=False)
    print(f"run: {run.path}")
    if prepare_only:
        print(f"prepared; queue it with:\n{by_hand(Job('train', run, site))}")
        return []
    jobs = chain.jobs_of(run, config, site, left, train=train)
    if site.is_local:
        return Here(*local.start(run, jobs))
    try:
        ids, told = chain.queue(jobs, config)
    except scheduler.NoAnswer:
        raise  # with a job in the queue, perhaps, which needs the directory
    except Exception:
        if not exists:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    print("\n".join(told))
    print(f"watch it with: python launch/status.py {shlex.quote(str(run.path))} --watch")
    return ids


def what_is_left(run: RunDir, config: Config, stages: list[str]) -> tuple[bool, list[str]]:
    """Whether to train, and the stages after it, of a run that exists; says where its last checkpoint is damaged."""
    train, left = chain.remaining(run, config, stages)
    if train or (why := chain.damage(run)) is None:
        return train, left
    print(f"the last checkpoint is damaged ({why}): training goes on from the newest one that is not", flush=True)
    return True, stages


def await_here(run: RunDir, config: Config, stages: list[str], started: Here, *, wait: bool) -> int:
    process, log = started
    if not wait:
        print(f"running in the background as pid {process.pid}; follow it with: tail -f {log}")
        return 0
    code = follow.follow_process(run, process, log)
    return _outcome(run, config, stages) if code == 0 else (code if code == 130 else 1)


def _outcome(run: RunDir, config: Config, stages: list[str]) -> int:
    """After waiting: what the run directory says was done; the scheduler's word is not enough."""
    train, left = chain.remaining(run, config, stages)
    if train or left:
        print(
            f"error: run {run.name} ended at step {run.latest_step()} of {config.train.total_steps}"
            + ("" if train else f", without what was to follow ({', '.join(left)})")
            + f"; python launch/logs.py {run.path} says why, and the same command goes on",
            file=sys.stderr,
        )
        return 1
    print_results(run, config, stages)
    return 0


if __name__ == "__main__":
    console.run_script(main)
