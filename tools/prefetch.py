#!/usr/bin/env python
"""Bring what jobs read to where nodes see it: data packed, weights checked. Afterwards no job needs a network."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import EnvironmentLacks, RequestError, shown
from ddpm.run.files import open_file, publishing
from ddpm.run.log import counted
from launch import prepare
from launch.checkup.files import BY_HAND, FETCHED, is_packed
from launch.cluster import environment
from launch.cluster.options import of_profile
from launch.terminal import console
from tools.download import digest_of, download

EXAMPLES = """examples:
  python tools/prefetch.py                                    CIFAR-10 and the Inception weights
  python tools/prefetch.py configs/celeba-64.yaml --profile mysite
  python tools/prefetch.py --from cifar-10-python.tar.gz pt_inception-2015-12-05-6726825d.pth     brought by hand
  python tools/prefetch.py --mirror https://example.org/files                                    tried first
  python tools/prefetch.py --statistics                       … and the reference's statistics, computed here

It prints the folder that has all of it: copy that folder beside the runs of another cluster, and nothing is fetched
there. Files that are there already stay; a download that was cut short goes on.
"""


class Known(NamedTuple):
    """A published file."""

    where: Path
    """The file's folder, within that of packed data."""
    algorithm: str
    digest: str
    """Or the beginning of it."""
    url: str = ""


def known_files() -> dict[str, Known]:
    """The files by the names under which they are published. Loads torch."""
    from torchvision.datasets import CIFAR10

    from ddpm.scoring import dinov2, extractors

    weights = extractors.beside(Path("data"))
    return {
        CIFAR10.filename: Known(Path("data") / "cifar10", "md5", CIFAR10.tgz_md5, CIFAR10.url),
        extractors.WEIGHTS_FILE: Known(weights, "sha256", extractors.PUBLISHED_SHA256_PREFIX, extractors.WEIGHTS_URL),
        dinov2.WEIGHTS_FILE: Known(weights, "sha256", "", dinov2.WEIGHTS_URL),
    }


def check_names(paths: list[Path]) -> None:
    """Before torch is loaded, which takes seconds. Raises RequestError."""
    known = list(FETCHED.values())
    for path in paths:
        if path.name not in known:
            raise RequestError(
                f"--from {path}: no file of this name is fetched; known are {', '.join(known)}. Images of your own "
                f"stay where they are: data.name=images data.path=THERE at submission"
            )


def bring(path: Path, cache: Path) -> None:
    """Put a file of a known name that was brought by hand where a download would have put it.

    Raises RequestError, EnvironmentLacks.
    """
    place = known_files()[path.name]
    try:
        with open_file(path) as source:
            digest = digest_of(source, place.algorithm) if place.digest else ""
            if not digest.startswith(place.digest):
                raise RequestError(
                    f"--from {path}: its {place.algorithm} is {digest}, and not that of the published file "
                    f"({place.digest}…): a copy that was cut short?"
                )
            target = cache / place.where / path.name
            if target.exists():
                return
            source.seek(0)
            target.parent.mkdir(parents=True, exist_ok=True)
            with publishing(target) as f:
                shutil.copyfileobj(source, f, 1 << 20)
    except OSError as e:
        raise EnvironmentLacks(f"--from {path}: {e.filename or ''} {e.strerror}") from None
    print(f"{path.name}: in {target.parent}")


def fetch(name: str, cache: Path, mirrors: list[str]) -> None:
    """The file that is published for data or an extractor of that name, unless it, or what is made of it, is there.

    Raises EnvironmentLacks.
    """
    if name not in FETCHED or (name == "cifar10" and is_packed(name, cache)):
        return
    import torch

    file = FETCHED[name]
    place = known_files()[file]
    target = cache / place.where / file
    hub = Path(torch.hub.get_dir()) / "checkpoints" / file  # whence it is copied
    if not any(path.exists() for path in (target, hub, target.with_name("cifar-10-batches-py"))):
        download([*(f"{m.rstrip('/')}/{file}" for m in mirrors), place.url], target, place.algorithm, place.digest)


def compute_statistics(config: Config, cache: Path) -> None:
    """The reference's, by the config's extractor, as a scoring job would."""
    from ddpm.data import packed
    from ddpm.network.device import as_device
    from ddpm.scoring import extractors
    from ddpm.scoring.reference import reference_of

    _, images = packed.pack(config.data, config.evaluate.reference, cache / "data")
    shared = extractors.beside(cache / "data")
    name, size = config.evaluate.extractor, config.data.image_size
    extractor = extractors.build_extractor(name, as_device(), shared=shared, image_size=size, warn=console.warn)
    reference_of(images, extractor, cache / "data" / "reference", progress=console.show_progress("features of"))
    print(f"statistics of {counted(len(images), 'image')} by {extractor.name}: in {cache / 'data' / 'reference'}")


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help="what will be trained, as for submit.py")
    parser.add_argument("--from", dest="files", nargs="+", default=[], metavar="FILE", help="files brought by hand")
    parser.add_argument(
        "--mirror", dest="mirrors", action="append", default=[], metavar="URL",
        help="a folder that has the published files by their names: asked first; may be given again",
    )  # fmt: skip
    parser.add_argument("--statistics", action="store_true", help="compute the reference's statistics too")
    parser.add_root()
    parser.add_argument("--profile", metavar="SITE", help="the site profile whose data_cache is used")
    return parser.parse_intermixed_args()


def main() -> int:
    args = parse()
    path, changes, _ = console.config_and_changes(args.words, args.root)
    config = reading.load(path, changes, shelf=environment.SHIPPED / "configs")
    if args.statistics and config.evaluate.reference not in ("train", "test"):
        raise RequestError(f"--statistics: evaluate.reference = {config.evaluate.reference} has its own; leave it out")
    site = of_profile(args.profile)
    root = environment.runs_root(args.root)
    cache = prepare.cache_of(site, root)
    odd = [url for url in args.mirrors if not re.match(r"https?://[!-~]+$", url)]
    if odd:
        raise RequestError(f"--mirror {shown(odd[0])}: an address, as https://example.org/files")
    files = [environment.user_path(name, "--from") for name in args.files]
    check_names(files)
    for file in files:
        bring(file, cache)
    lacking = []
    for name, ready in (
        (config.data.name, lambda: prepare.prepare_inputs(config, site, root, [])),
        (config.evaluate.extractor, lambda: prepare.ensure_weights(config.evaluate.extractor, cache / "data")),
    ):
        try:
            if name != config.data.name or config.data.path is None:
                fetch(name, cache, args.mirrors)
            ready()
        except EnvironmentLacks as e:  # what can be had is fetched all the same
            lacking.append("\n      → ".join(filter(None, (str(e), BY_HAND.get(name)))))
    if lacking:
        raise EnvironmentLacks("\nerror: ".join(lacking))
    if args.statistics:
        compute_statistics(config, cache)
    print(f"all that jobs read is in {cache}")
    return 0


if __name__ == "__main__":
    console.run_script(main)
