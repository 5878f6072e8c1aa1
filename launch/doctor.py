#!/usr/bin/env python
"""Check, before anything is queued, whether this account and cluster can do what a submission will ask for."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib
import math
from pathlib import Path

from ddpm.config import reading
from ddpm.data.listing import listed_once
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.network.made import other_than_the_unet
from ddpm.run.paths import RunDir, check_name
from launch import prepare
from launch.checkup import cluster, files, node, profile
from launch.checkup.finding import Finding
from launch.cluster import environment
from launch.cluster.options import PROFILES, add_options, resolve
from launch.terminal import console

EXAMPLES = """examples:
  python launch/doctor.py --partition gpu                      partition, limits, pre-emption, disk, time of a save
  python launch/doctor.py --partition gpu --probe              … and a node, by a job of about a minute
  python launch/doctor.py --profile mysite                     what a site profile asks for
  python launch/doctor.py --partition gpu --write-profile mysite       draft a site profile

Exit code: 0 if no check fails, 3 if one does.
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG key=value", help="what to train, as for submit.py (default: cifar10.yaml)"
    )
    parser.add_argument("--probe", action="store_true", help="check a compute node too, by a short job on it")
    parser.add_argument("--wait-s", type=float, help="with --probe: how long to wait for that job (default 300)")
    parser.add_argument(
        "--write-profile",
        metavar="NAME",
        help="draft a profile of what was found: configs/cluster/NAME.yaml, or a path",
    )
    parser.add_root()
    add_options(parser)
    return parser.parse_intermixed_args()


@listed_once()
def main() -> int:
    args = parse()
    if args.wait_s is not None and not args.probe:
        raise RequestError(f"--wait-s {args.wait_s:g}: goes with --probe, whose job is waited for")
    args.wait_s = 300.0 if args.wait_s is None else args.wait_s
    if not 0 < args.wait_s < math.inf:
        raise RequestError(f"--wait-s {args.wait_s:g}: seconds to wait for the probe's job, more than 0, as 300")
    path, changes, _ = console.config_and_changes(args.words, args.root)
    config = reading.load(path, changes, shelf=environment.SHIPPED / "configs")
    site = resolve(args)
    if site.is_local:
        raise RequestError("--cluster local: nothing to ask; this machine runs the jobs itself (tools/quickstart.sh)")
    draft = _place(args.write_profile) if args.write_profile else None
    if draft and draft.exists():
        raise RequestError(f"--write-profile {args.write_profile}: {draft} exists; choose another name")
    root = environment.runs_root(args.root)
    num_images = None
    with contextlib.suppress(RequestError):  # the data cannot serve, which is told below
        num_images = prepare.num_images(config, RunDir(root / "doctor"))
    cache = prepare.cache_of(site, root)
    other = other_than_the_unet()
    if other:
        _say(Finding("warn", f"{other} is built, and what follows of disk and saves is of a U-Net with these keys"))
    failed = [_say(finding) for finding in files.storage(config, root, cache, num_images)]
    refused = [_say(finding) for finding in cluster.cluster(site, root, config.network.num_parameters)]
    if any(refused) and (args.probe or draft):
        print("not done: a node was not asked, and no profile drafted, until that is mended")
    elif args.probe:
        failed += [_say(finding) for finding in node.probe(site, root, args.wait_s)]
    if draft and not any(refused):
        try:
            draft.write_text(profile.draft(site), encoding="utf-8")
        except OSError as e:
            raise EnvironmentLacks(
                f"{draft} cannot be written ({e.strerror}): give a path that can, ending in .yaml"
            ) from None
        print(f"wrote {draft}: look it over, then --profile {args.write_profile}")
    return EnvironmentLacks.exit_code if any(failed + refused) else 0


def _place(name: str) -> Path:
    """The file that --profile NAME will read."""
    return Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{check_name(name, '--write-profile')}.yaml"


def _say(finding: Finding) -> bool:
    print(f"{finding.verdict}  {finding.what}" + (f"\n      → {finding.remedy}" if finding.remedy else ""), flush=True)
    return finding.verdict == "fail"


if __name__ == "__main__":
    console.run_script(main)
