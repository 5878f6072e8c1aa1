#!/usr/bin/env python
"""Score a sample set of a run, or two folders of images."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from ddpm.config import reading
from ddpm.errors import RequestError
from ddpm.run.files import read_json
from ddpm.run.paths import RunDir
from ddpm.scoring.against import SPLITS, check_file, check_reference
from launch.cluster import site as sites
from launch.queue import chain, local
from launch.queue.job import Job
from launch.queue.submitting import describe, submit_alone
from launch.queue.turns import turn
from launch.queue.waiting import evaluations_in_queue, jobs_in_queue
from launch.terminal import console, follow

EXAMPLES = """examples:
  python launch/evaluate.py cifar10                                   the run's sample set, against its training images
  python launch/evaluate.py cifar10 --set early --reference test
  python launch/evaluate.py --images my-pngs --reference stats.npz    any images; pytorch-fid's statistics, or a folder
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name, or its directory")
    parser.add_argument("--set", dest="set_name", help="which sample set (default: the only one)")
    parser.add_argument("--reference", help="train, test, a pytorch-fid .npz, or a folder or zip of images")
    parser.add_argument("--images", help="score this folder or zip instead of a run, here and now")
    parser.add_argument(
        "--extractor",
        choices=["inception", "random-inception", "pixels"],
        help="with --images (default inception; a run's is in its config)",
    )
    parser.add_argument("--wait", action="store_true", help="stay until the score is there")
    parser.add_argument("--dry-run", action="store_true", help="print the job script; touch nothing")
    parser.add_argument("--root", help="where runs lie (default: DDPM_RUNS, or runs/ in the project)")
    sites.add_options(parser)
    args = parser.parse_args()
    if (args.run is None) == (args.images is None):
        parser.error("give a RUN, or --images with --reference")
    if args.run and args.extractor:
        parser.error("--extractor goes with --images; a run is scored by its config's evaluate.extractor")
    if args.images and not args.reference:
        parser.error("--images needs --reference: a pytorch-fid .npz, or a folder or zip of images")
    return args


def score_images(args: argparse.Namespace) -> int:
    """Two sets of images, on this machine."""
    paths = Path(args.images).expanduser(), Path(args.reference).expanduser()
    for option, path in zip(("--images", "--reference"), paths, strict=True):
        if not path.exists():
            raise RequestError(
                f"{option} {path}: does not exist; give a folder or zip of images"
                + (", or a pytorch-fid .npz" if option == "--reference" else "")
            )
    if args.dry_run:
        print(f"would score {paths[0]} against {paths[1]} with {args.extractor or 'inception'} on this machine")
        return 0
    import torch

    from ddpm.scoring.evaluate import evaluate_images
    from ddpm.scoring.extractors import build_extractor, ensure_inception_weights

    name = args.extractor or "inception"
    if name == "inception":
        ensure_inception_weights()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = build_extractor(name, device, warn=lambda message: print(message, file=sys.stderr))
    result = evaluate_images(*paths, extractor)
    print(json.dumps(result, indent=1))
    return 0


def choose_set(run: RunDir, asked: str | None) -> str:
    """The set that was asked for, or the only one there is. Raises RequestError listing them."""
    names = [s.name for s in run.sample_sets() if s.request.exists()]
    if asked in names or (asked is None and len(names) == 1):
        return asked or names[0]
    if not names:
        raise RequestError(f"run {run.name} has no samples yet: python launch/sample.py {run.name}")
    raise RequestError(
        (f"no sample set {asked!r}; " if asked else "") + f"run {run.name} has {', '.join(names)}: "
        f"choose one with --set"
    )


def show(run: RunDir, set_name: str) -> int:
    record = read_json(run.score(set_name))
    if record is None:
        print(f"error: no score of {set_name}; logs: {run.logs}", file=sys.stderr)
        return 1
    print(json.dumps(record, indent=1))
    return 0


def main() -> int:
    args = parse()
    if args.images:
        return score_images(args)
    run = console.find_run(args.run, args.root)
    config = reading.load(run.config)
    set_name = choose_set(run, args.set_name)
    reference = args.reference or config.evaluate.reference
    check_reference(config, reference)
    if reference not in SPLITS:
        reference = str(check_file(reference).absolute())
    site = sites.resolve(args, sites.site_of(run).model_dump(exclude_defaults=True), "evaluate")
    site = sites.settle(site, dry_run=args.dry_run)
    job = Job("evaluate", run, site, set_name, (), None, ("--reference", reference))
    if args.dry_run:
        job = replace(job, after=":".join(jobs_in_queue(run, "sample", set_name)) or None)
        print(describe(job) + "\n# dry run: nothing was written or queued")
        return 0
    if config.evaluate.extractor == "inception":
        from ddpm.scoring.extractors import ensure_inception_weights

        ensure_inception_weights()
    chain.go_on(run)
    if site.is_local:
        process, log = local.start(run, [job])
        if code := follow.follow_process(run, process, log):
            return code if code == 130 else 1
        return show(run, set_name)
    with turn(run):
        if ids := evaluations_in_queue(run, set_name, reference, config.evaluate.reference):
            print(f"the score of {set_name} is in the queue already, as job {' '.join(ids)}: nothing to submit")
        else:
            waiting = jobs_in_queue(run, "sample", set_name)
            new, waits = submit_alone(replace(job, after=":".join(waiting) or None))
            ids = [new]
            told = f"queued: evaluate as job {new}; the score will be {run.score(set_name)}"
            print("\n".join([told, *filter(None, [waits])]))
    if not args.wait:
        return 0
    follow.follow_jobs(run, ids)
    return show(run, set_name)


if __name__ == "__main__":
    console.run_script(main)
