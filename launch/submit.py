#!/usr/bin/env python
"""Submit a training run and, with --then, what follows it."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))  # the project, not launch/, whose names would shadow others

import launch.first  # noqa: F401

# isort: split
import argparse
import difflib
import re
from pathlib import Path

from ddpm.config import reading
from ddpm.config.sample import FILE
from ddpm.config.schema import Config
from ddpm.data.listing import listed_once
from ddpm.errors import RequestError
from ddpm.run.paths import RunDir, check_name, fit_name
from launch import beginning, origin, prepare, submission, sweep
from launch.beginning import Here
from launch.cluster import environment
from launch.cluster.environment import SHIPPED
from launch.cluster.options import add_options, resolve
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.queue import borrowing
from launch.queue.directory import base_of
from launch.queue.naming import name_of
from launch.queue.sets import LEAST_SCORED
from launch.submission import Asked
from launch.terminal import console, faults, follow, plan, recipes
from launch.terminal.results import print_results

EXAMPLES = """examples:
  python launch/submit.py --partition gpu                               Ho et al.'s CIFAR-10 model
  python launch/submit.py configs/cifar10.yaml train.lr=1e-4 --name low-lr --partition gpu --nodes 2 --gpus-per-node 4
  python launch/submit.py --partition gpu --time 4h --then sample,evaluate    … then 50,000 images, and their FID
  python launch/submit.py --list                                        the recipes in configs/
  python launch/submit.py --partition gpu --dry-run                     what it would ask for; touches nothing
  python launch/submit.py configs/mine.yaml --partition gpu --from cifar10@400000      … starting from another's weights
  python launch/submit.py --sweep train.lr=1e-4,2e-4 --sweep seed=0,1 --partition gpu      four runs, one for each pair
  python launch/submit.py configs/quickstart.yaml --cluster local --wait      on this machine

The same command again resumes the run, extends it (train.total_steps=… or total_epochs=…), or says that it is complete.
End a run with python launch/cancel.py NAME: it saves, and stays ended until it is submitted again.
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="a config file (default configs/cifar10.yaml), or a run to resume; any keys, e.g. train.lr=1e-4",
    )
    parser.add_argument("--list", action="store_true", help="list the recipes in configs/")
    parser.add_argument("--name", help="the run's name (default: the config's, or after data that is not the recipe's)")
    parser.add_root()
    parser.add_argument(
        "--from",
        dest="origin",
        metavar="RUN|FILE[@STEP]",
        help="start a new run from these weights instead of random ones; RUN@best: of its best milestone",
    )
    parser.add_argument(
        "--from-weights", choices=("ema", "model"), help="with --from: which weights of the run (default: ema)"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,…",
        help="a run for each value; given twice: for each pair",
    )
    parser.add_argument("--then", default="", metavar="sample,evaluate", help="stages to queue after training")
    parser.add_argument("--wait", action="store_true", help="wait until all is done, showing progress")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the request and the resolved config; change nothing"
    )
    parser.add_verbose()
    parser.add_argument(
        "--prepare", action="store_true", help="pack data, check, make the run directory; queue nothing"
    )
    add_options(parser)
    parser.set_defaults(base=None)  # what a run that goes on was submitted with
    args = parser.parse_intermixed_args()
    parser.check_verbose(args)
    if args.prepare and args.wait:
        parser.error("--prepare queues nothing, so that there is nothing to --wait for")
    return args


def read_command_line(args: argparse.Namespace) -> tuple[list[Asked], Site]:
    """The run that the command line asks for, or those of a sweep, and where they run.

    A run that is given in place of a config goes on, where it lies. Prints warnings. Raises RequestError.
    """
    path, overrides, run = console.config_and_changes(args.words, args.root)
    if run is not None and args.name is None:
        _check_folder(run)
        args.name, args.root, args.base = run.name, str(run.path.parent), base_of(run, args)
    new_of = None if args.origin or args.sweep else run
    if args.name is not None:
        overrides = [o for o in overrides if not o.startswith("name=")] + [f"name={check_name(args.name)!r}"]
    stages = [s for s in args.then.split(",") if s]
    if stages not in ([], ["sample"], ["sample", "evaluate"]):
        near = [word for s in stages for word in difflib.get_close_matches(s, ("sample", "evaluate"), 1)]
        meant = "; did you mean sample,evaluate?" if "evaluate" in near else "; did you mean sample?" if near else ""
        raise RequestError(f"--then {args.then}: allowed are sample, and sample,evaluate{meant}")
    root = environment.runs_root(args.root)

    def read(more: list[str]) -> Config:
        return read_config(path, [*overrides, *more], stages, root)

    found = sweep.configs(args.sweep, overrides, read) if args.sweep else [(read([]), {})]
    source = origin.asked(args.origin, args.from_weights, args.root)
    site = resolve(args, args.base)
    why = faults.small_files() if site.is_local else ""
    limit = [f"{why}, since jobs take it over and a checkpoint may be larger"] if why else []
    asked: list[Asked] = []
    warnings = [*([] if site.is_local else site.warnings()), *limit]
    for typed, of in found:
        run = RunDir(root / typed.name)
        with sweep.naming(of):
            told = submission.check_resources(typed, site, run)
            config = prepare.resolve_length(typed, run)
        here = _here(config, run) if site.is_local and not asked else []
        unwise = [] if run.path.exists() else config.warnings()  # a begun run's mathematics stays
        warnings = [*told, *unwise, *here, *warnings]
        if new_of is not None and not run.path.exists():
            warnings.append(
                f"run {run.name} is new and starts from random weights, with the config of {new_of.name}; --from "
                f"{new_of.quoted} starts it from the weights of that"
            )
        asked.append(Asked(run, typed, config, stages, source, of))
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return asked, site


def _check_folder(run: RunDir) -> None:
    """Raise RequestError, with the command that helps, where a run's folder was given a name that no run may have."""
    try:
        check_name(run.name)
    except RequestError as e:
        to = run.path.with_name(fit_name(re.sub(r"[^A-Za-z0-9._-]+", "-", run.name).strip(".-") or "run"))
        while to.exists():
            to = run.path.with_name(fit_name(f"{to.name}-2"))
        rename = f"mv {run.quoted} {RunDir(to).quoted}"
        raise RequestError(f"{e}. While nothing of it is at work, rename it, then submit that: {rename}") from None


def read_config(path: Path, overrides: list[str], stages: list[str], root: Path) -> Config:
    """The config in `path` with `overrides`, checked against what is to follow, and named. Raises RequestError."""
    config = with_absolute_paths(reading.load(path, overrides, shelf=SHIPPED / "configs"))
    if not any(o.startswith("name=") for o in overrides):
        config = config.model_copy(update={"name": check_name(name_of(config, root))})
    if config.data.name == "digits" and config.data.path is not None:
        raise RequestError(
            f"data.path = {config.data.path}: data.name=digits has its own images; for those there: data.name=images"
        )
    if "evaluate" in stages and config.sample.num_samples < LEAST_SCORED:
        raise RequestError(
            f"sample.num_samples = {config.sample.num_samples}: a score needs at least {LEAST_SCORED} samples, as it "
            f"compares variances; ask for more, or leave evaluate out of --then"
        )
    return config


def _here(config: Config, run: RunDir) -> list[str]:
    """What of a config means nothing on this machine."""
    later = f"python launch/evaluate.py {run.quoted} --all-milestones does it afterwards"
    return [] if config.evaluate.milestones is None else [
        f"evaluate.milestones: on this machine milestones are not scored while training goes on; {later}"
    ]  # fmt: skip


def with_absolute_paths(config: Config) -> Config:
    """The config with its paths as they are meant here: jobs run in the project's directory."""

    data, evaluate = config.data, config.evaluate
    if data.path is not None:
        data = data.model_copy(update={"path": str(environment.user_path(data.path, "data.path"))})
    if evaluate.reference not in ("train", "test"):
        reference = environment.user_path(evaluate.reference, "evaluate.reference")
        evaluate = evaluate.model_copy(update={"reference": str(reference)})
    path = evaluate.extractor.removeprefix(FILE)
    if path != evaluate.extractor:
        whole = environment.user_path(path, "evaluate.extractor")
        evaluate = evaluate.model_copy(update={"extractor": f"{FILE}{whole}"})
    return config.model_copy(update={"data": data, "evaluate": evaluate})


def main() -> int:
    args = parse()
    if args.list:
        recipes.print_table(SHIPPED / "configs")
        return 0
    with listed_once():
        asked, site = read_command_line(args)
        return sweep.submit(asked, site, args) if args.sweep else submit(asked[0], site, args)


def submit(asked: Asked, site: Site, args: argparse.Namespace) -> int:
    run, config, stages = asked.run, asked.config, asked.stages
    if args.dry_run:
        num, start = submission.check_dry(asked)
        for line in submission.told_of_changes(asked):
            print(f"# {line}")
        if start is not None:
            print(f"# {submission.told_of(start)}")
        prepare.warn_of_batch(config, num)
        site = settle(site, dry_run=True)
        box = submission.in_container(site, run)
        left = plan.Left(True, stages)
        if run.path.exists():
            left = plan.Left(*beginning.what_is_left(run, config, stages, begins="# "), run.latest_step())
        plan.print_dry_run(config, site, run, left, num, scripts=args.verbose, in_container=box)
        return 0
    exists, start = submission.check(asked)
    site = settle(site, dry_run=False)  # from here on it is about what the environment lacks
    if exists:
        prepare.is_at_work(run, config, site)
        if submission.is_complete(asked):
            submission.keep_changes(asked, site)
            print_results(run, config, stages)
            if args.code not in (None, "kept"):
                console.warn(
                    f"--code {args.code}: nothing is left to be made, and the run keeps its code; give it with more "
                    f"train.total_steps, or to launch/sample.py"
                )
            return 0
        borrowing.check_trainable(run)

    inputs = prepare.prepare_inputs(config, site, run.path.parent, stages)
    begun = beginning.begin(asked, site, inputs, start, existed=exists, prepare_only=args.prepare,
                             code_asked=args.code)  # fmt: skip
    config = asked.typed.resolve_length(inputs["data"]["num_images"])
    if isinstance(begun, Here):
        return await_here(run, config, stages, begun, wait=args.wait)
    if args.prepare:
        return 0
    print(follow.watch_with(run))
    if not args.wait:
        return 0
    follow.follow_jobs(run, begun.jobs)
    return submission.outcome(run, config, stages)


def await_here(run: RunDir, config: Config, stages: list[str], started: Here, *, wait: bool) -> int:
    process, log = started
    if not wait:
        print(f"running in the background as pid {process.pid}; follow it with: tail -f {log}")
        return 0
    code = follow.follow_process(run, process, log)
    return code or submission.outcome(run, config, stages)


if __name__ == "__main__":
    console.run_script(main)
