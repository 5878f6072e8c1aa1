#!/usr/bin/env python
"""Score a sample set of a run, or a folder of images."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib
import os
from dataclasses import replace
from pathlib import Path

from ddpm.config import reading
from ddpm.config import section as sections
from ddpm.config.sample import FILE, Evaluate
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from ddpm.run.records import data_of
from ddpm.scoring.against import SPLITS, check_file, check_for_run, num_parts
from ddpm.scoring.record import Score, scores_of
from launch import prepare
from launch.cluster import environment
from launch.cluster.job import Job, check_path
from launch.cluster.options import add_options, of_jobs, resolve
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.evaluation import Outcome, do, of_score
from launch.queue import borrowing, bounds, chain, local, milestones
from launch.queue.directory import base_of, use_shell_of
from launch.queue.sets import LEAST_SCORED, own_request, score_by, wrong_with
from launch.queue.turns import turn
from launch.queue.waiting import asked_together, evaluations_in_queue, jobs_in_queue
from launch.terminal import console, follow, plan
from launch.terminal.comparison import chosen_scores, print_comparison
from launch.terminal.images import check_new, score_images
from launch.terminal.results import print_milestones

EXAMPLES = """examples:
  python launch/evaluate.py cifar10                                   the run's sample set, against its training images
  python launch/evaluate.py cifar10 --set early --reference test
  python launch/evaluate.py cifar10 --bits-per-dim                    of the test images; --num-images 500 for a part
  python launch/evaluate.py cifar10 --all-milestones                  samples and a score of each milestone
  python launch/evaluate.py cifar10 --save-stats train.npz --tasks 4     of its training images, by a job of their own
  python launch/evaluate.py cifar10 --compare paper fast              two sets side by side; RUN/SET names another run's
  python launch/evaluate.py --images my-pngs --reference stats.npz    any images; pytorch-fid's statistics, or a folder
  python launch/evaluate.py --images photos --size 64 --save-stats photos.npz     the statistics alone, for pytorch-fid
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name, or its directory")
    parser.add_argument("--set", dest="set_name", help="which sample set (default: the only one)")
    parser.add_argument("--reference", help="train, test, a pytorch-fid .npz, or images: a folder, zip, .npz or .npy")
    parser.add_argument("--images", help="score this folder, zip, .npz or .npy instead of a run, here and now")
    parser.add_argument(
        "--compare", nargs="+", metavar="SET", help="show the scores of these sets and their differences"
    )
    parser.add_argument("--size", type=int, help="with --images: crop and resize all images to this many pixels")
    parser.add_argument(
        "--keep", metavar="DIR", help="with --images: keep features in DIR; processes with the same DIR share the work"
    )
    parser.add_argument(
        "--save-stats", metavar="FILE.npz", help="write statistics instead: of --images, or of a run's --reference"
    )
    parser.add_argument(
        "--extractor",
        help="inception, dinov2, file:PATH, random-inception or pixels (default: the run's config's; else inception)",
    )
    parser.add_argument(
        "--bits-per-dim",
        action="store_true",
        help="the variational bound of the test images (or of --reference train), as Ho et al. report it",
    )
    parser.add_step("with --bits-per-dim: ")
    parser.add_argument(
        "--num-images", type=int, help="with --bits-per-dim: how many images, chosen by sample.seed (default: all)"
    )
    parser.add_argument(
        "--all-milestones", action="store_true", help="sample and score each milestone that has no score yet"
    )
    parser.add_argument("--unless-stopped", action="store_true", help=argparse.SUPPRESS)  # asked for by training
    parser.add_argument("--wait", action="store_true", help="wait until the score is there")
    parser.add_argument(
        "--json", action="store_true", help="print all of a score as JSON on a terminal too, as in a pipe"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be computed; touch nothing")
    parser.add_verbose()
    parser.add_root()
    add_options(parser)
    args = parser.parse_args()
    parser.check_verbose(args)
    _check(args, parser)
    if args.extractor:
        args.extractor = extractor_of(args.extractor)
    return args


def _check(args: argparse.Namespace, parser: console.Parser) -> None:
    """Leave with a message where words do not go together."""
    if (args.run is None) == (args.images is None) and not (args.compare and args.images is None):
        parser.error("give a RUN, or --images with --reference")
    if args.compare and (args.set_name or args.size or args.save_stats or args.images):
        parser.error("--compare names its sets, and shows scores that there are")
    if args.images and args.set_name:
        parser.error("--set is of a RUN; --images are scored as they lie there")
    where = of_jobs(args) if args.images or args.compare else []
    if where:
        parser.error(f"{', '.join(where)}: --{'images' if args.images else 'compare'} is here and now, and no job's")
    if args.save_stats and args.json:
        parser.error("--json is of a score, and --save-stats computes none")
    if args.bits_per_dim and (args.run is None or args.compare or args.set_name or args.extractor):
        parser.error("--bits-per-dim is of a RUN; --reference, --step and --num-images say more")
    if not args.bits_per_dim and not (args.step is None and args.num_images is None):
        parser.error("--step and --num-images go with --bits-per-dim")
    of_a_set = {"--images": args.images, "--compare": args.compare, "--set": args.set_name,
                "--extractor": args.extractor, "--reference": args.reference,
                "--bits-per-dim": args.bits_per_dim}  # fmt: skip
    given = [option for option, value in of_a_set.items() if value]
    if args.all_milestones and given:
        parser.error(
            f"--all-milestones does not go with {' and '.join(given)}: milestones are sampled and scored as the run's "
            f"config says (sample, evaluate)"
        )
    if not args.images and (args.size or args.keep):
        parser.error("--size and --keep go with --images; a run's samples have its size")
    if args.run and args.save_stats and (args.set_name or args.bits_per_dim or args.all_milestones):
        parser.error("--save-stats is of a run's --reference, train or test, and not of samples")
    if args.images and bool(args.reference) == bool(args.save_stats):
        parser.error("--images needs --reference: a pytorch-fid .npz, or images to compare with; or --save-stats")
    if args.size is not None and args.size < 1:
        parser.error(f"--size {args.size}: must be at least 1")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save-stats {args.save_stats}: name an .npz, which is what pytorch-fid reads")


def extractor_of(word: str) -> str:
    """As jobs understand it, which run in another directory. Raises RequestError for another name."""
    word = sections.build(Evaluate, {"extractor": word}, "--extractor").extractor
    path = word.removeprefix(FILE)
    return word if path == word else f"{FILE}{Path(path).expanduser().absolute()}"


def choose_set(run: RunDir, asked: str | None) -> str:
    """The set that was asked for, or the only one there is, those of milestones aside. Raises RequestError listing
    them."""
    names = [s.name for s in run.sample_sets() if s.request.exists()]
    if asked in names:
        return str(asked)
    own = [name for name in names if not milestones.is_set_of_one(name)] or names
    if asked is None and len(own) == 1:
        return own[0]
    if not names:
        sent = [e for e in read_events(run) if e["event"] == "submitted" and e.get("stage") == "sample"]
        queued = {name: jobs_in_queue(run, "sample", name) for name in dict.fromkeys(e.get("set", "") for e in sent)}
        told = ", ".join(f"{name} as job {' '.join(jobs)}" for name, jobs in queued.items() if jobs)
        if told:
            raise RequestError(f"run {run.name} has no samples yet; they are in the queue: {told}")
        raise RequestError(f"run {run.name} has no samples yet: python launch/sample.py {run.quoted}")
    raise RequestError(
        (f"no sample set {asked!r}; " if asked else "") + f"run {run.name} has {', '.join(names)}: "
        f"choose one with --set"
    )


def _whole(reference: str) -> str:
    if reference in SPLITS:
        return reference
    return str(environment.user_path(str(check_file(reference)), "--reference"))


def main() -> int:
    args = parse()
    if args.images:
        return score_images(args)
    if args.compare:
        run = console.find_run(args.run, args.root) if args.run else None
        reference = _whole(args.reference) if args.reference else None
        print_comparison(chosen_scores(run, args.compare, args.root, reference, args.extractor), as_json=args.json)
        return 0
    run = borrowing.own(console.find_run(args.run, args.root), environment.runs_root(args.root), dry_run=args.dry_run)
    config = reading.of_run(run)
    site = resolve(args, base_of(run, args), "evaluate", also="sample" if args.all_milestones else None)
    check_path(run, site)
    try:
        return score(run, config, site, args)
    except RequestError as e:
        if config.data.path is None or f"data.path = {config.data.path}: does not exist" not in str(e):
            raise
        moved = f"python launch/submit.py {run.quoted} data.path=THERE"
        raise RequestError(f"{e}. If it has moved, tell the run where to: {moved}") from None


def score(run: RunDir, config: Config, site: Site, args: argparse.Namespace) -> int:
    if args.bits_per_dim:
        return score_bound(run, config, site, args)
    if args.all_milestones:
        return score_milestones(run, config, site, args)
    if args.save_stats:
        return save_statistics(run, config, site, args)
    set_name = choose_set(run, args.set_name)
    num = own_request(run, set_name).num_samples
    if num < LEAST_SCORED:
        more = f"python launch/sample.py {run.quoted} --set OTHER --num-samples 50000"
        raise RequestError(f"sample set {set_name} has {num} sample: a score needs at least {LEAST_SCORED}: {more}")
    reference = args.reference or config.evaluate.reference
    change = {"reference": reference, "extractor": args.extractor or config.evaluate.extractor}
    check_for_run(run, config.model_copy(update={"evaluate": config.evaluate.model_copy(update=change)}), reference)
    reference = _whole(reference)
    asked = config.evaluate.model_copy(update=change | {"reference": reference})
    site = settle(site, dry_run=args.dry_run)
    chosen = ("--extractor", asked.extractor) if args.extractor else ()
    job = Job("evaluate", run, site, set_name, (), None, ("--reference", reference, *chosen))
    if args.tasks and site.tasks != "auto":
        job = replace(job, parts=max(own_request(run, set_name).shards, num_parts(run, config, reference)))
    if args.dry_run:
        job = replace(job, after=":".join(jobs_in_queue(run, "sample", set_name)) or None)
        print(f"# score: of sample set {set_name}, against {reference}, by {asked.extractor}")
        plan.print_jobs([job], scripts=args.verbose)
        return 0
    prepare.ensure_weights(asked.extractor, Path(data_of(run)["cache"]))

    def in_queue() -> list[str]:
        return evaluations_in_queue(run, set_name, asked, config.evaluate)

    return do(job, in_queue, of_score(run, set_name, lambda: score_by(run, set_name, asked), args), args)


def score_bound(run: RunDir, config: Config, site: Site, args: argparse.Namespace) -> int:
    """Bits per dimension: published as a request here, computed by a job, whose tasks share its parts."""
    at = milestones.asked_step(run, args.step)
    request, parts = bounds.request_for(run, config, args.reference or "test", at, args.num_images)
    name = request.name
    job = Job("evaluate", run, settle(site, dry_run=args.dry_run), name, extra_args=("--bits-per-dim",), parts=parts)
    if args.dry_run:
        print(f"# {bounds.cost(request, config)}")
        plan.print_jobs([job], scripts=args.verbose)
        return 0
    bounds.publish(run, request)
    print(bounds.cost(request, config), file=sys.stderr)

    def found() -> Score | None:
        holding = (score for score in scores_of(run, name) if not wrong_with(run, score))
        return next(holding, None)

    return do(job, lambda: jobs_in_queue(run, "evaluate", name), of_score(run, name, found, args), args)


def save_statistics(run: RunDir, config: Config, site: Site, args: argparse.Namespace) -> int:
    """Of the run's own images, by a job whose tasks share the work; evaluations find what it has computed."""
    split, extractor = args.reference or "train", args.extractor or config.evaluate.extractor
    if split not in SPLITS:
        raise RequestError(f"--reference {split}: of a run's own images, train or test; of others: --images {split}")
    path = environment.user_path(args.save_stats, "--save-stats")
    check_new(path)
    check_for_run(run, config, split)
    said = ("--reference", split, "--extractor", extractor, "--save-stats", str(path))
    name = f"statistics-{split}-{files.sha256_json(said)[:8]}"
    parts = 1 if site.tasks == "auto" else num_parts(run, config, split)
    job = Job("evaluate", run, settle(site, dry_run=args.dry_run), name, extra_args=said, parts=parts)
    if args.dry_run:
        print(f"# statistics: of {split}, by {extractor}, to {path}")
        plan.print_jobs([job], scripts=args.verbose)
        return 0
    prepare.ensure_weights(extractor, Path(data_of(run)["cache"]))

    def told() -> int | None:
        if path.exists():
            print(f"{path}: statistics of {split}, {extractor} features")
        return 0 if path.exists() else None

    made = Outcome(f"the file of statistics of {split}", str(path), told)
    return do(job, lambda: jobs_in_queue(run, "evaluate", name), made, args)


def score_milestones(run: RunDir, config: Config, site: Site, args: argparse.Namespace) -> int:
    """Samples and scores of each milestone that has none, in jobs that do not wait for one another."""
    site = settle(site, dry_run=args.dry_run)
    check_for_run(run, config, config.evaluate.reference)
    if not args.dry_run:
        prepare.ensure_weights(config.evaluate.extractor, Path(data_of(run)["cache"]))
        prepare.settle_code(run, args.code)
    ids: list[str] = []
    with contextlib.nullcontext() if site.is_local or args.dry_run else turn(run), asked_together([run]):
        if args.unless_stopped and run.is_stopped():  # by a cancel, which has looked for what is queued
            console.warn(f"{run.stop_file} forbids milestones too")
            return 0
        chains = milestones.jobs_of(run, config, site, dry_run=args.dry_run)
        there, lacking = milestones.steps(run), [step for step, _ in chains]
        if not there:
            raise RequestError(f"run {run.name} has no milestones yet: {milestones.when(config)}")
        console.warn(f"milestones: {_steps(there)}; without a score: {_steps(lacking) or 'none'}")
        if lacking:
            console.warn(milestones.how_many(config))
        if args.dry_run:
            plan.print_jobs([job for _, jobs in chains for job in jobs], scripts=args.verbose)
            return 0
        for _, jobs in [] if site.is_local else chains:
            use_shell_of(run, site)
            queued, told = chain.queue(jobs, config, why=not ids)  # all ask for the same
            ids += queued
            print("\n".join(f"{jobs[0].set_name}: {line}" for line in told))
    if chains and site.is_local:
        process, log = local.start(run, [job for _, jobs in chains for job in jobs])
        with contextlib.redirect_stdout(sys.stderr):  # where the scores alone go
            code = follow.follow_process(run, process, log)
        if code:
            return code
    if ids and args.wait:
        with contextlib.redirect_stdout(sys.stderr):
            follow.follow_jobs(run, ids, [(job.stage, job.set_name) for _, jobs in chains for job in jobs])
    if ids and not args.wait:
        return 0
    milestones.publish(run, config, f"evaluate-{os.getpid()}")  # it may be a sibling's, or from before a score
    if run.milestones.exists():
        print_milestones(run, as_json=args.json)
    return 0


def _steps(steps: list[int]) -> str:
    some = ", ".join(map(str, steps if len(steps) < 12 else [*steps[:4], "…", *steps[-4:]]))
    return f"{len(steps)} (step {some})" if steps else ""


if __name__ == "__main__":
    console.run_script(main)
