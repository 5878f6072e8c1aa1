#!/usr/bin/env python
"""Unpack a data set as PNGs, as training sees it: cropped and resized. For tools that want folders of images."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from ddpm.config import reading
from ddpm.data import packed as data
from ddpm.errors import RequestError
from ddpm.run.files import publishing_folder, read_signed
from ddpm.run.log import counted
from launch import prepare
from launch.cluster import environment
from launch.cluster.options import of_profile
from launch.terminal import console

EXAMPLES = """examples:
  python tools/unpack_data.py configs/cifar10.yaml real                           real/000000.png … real/049999.png
  python tools/unpack_data.py configs/cifar10.yaml data.image_size=64 real-64 --split test --num 5000
  python tools/unpack_data.py configs/cifar10.yaml real --by-class                real/airplane/000029.png …
  python tools/unpack_data.py configs/cifar10-conditional.yaml model.num_classes=0 real       no folders of its classes
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="a config file: its data section is read")
    parser.add_argument("words", nargs="+", metavar="[key=value …] DIR", help="changes to it, and the folder to make")
    parser.add_argument("--split", default="train", help="train (default), test, or another that the data has")
    parser.add_argument("--num", type=int, metavar="N", help="this many images, evenly spaced over the split")
    parser.add_argument(
        "--by-class", action="store_true", help="a folder for each class, as a config with model.num_classes has it"
    )
    parser.add_argument("--root", help="where runs lie, whose packed data is used (default: DDPM_RUNS, or runs/)")
    parser.add_argument("--profile", metavar="SITE", help="the site profile whose data_cache is used")
    args = parser.parse_intermixed_args()
    folders = [w for w in args.words if "=" not in w]
    if len(folders) != 1:
        parser.error(f"give one CONFIG and one DIR, not {' '.join([args.config, *folders])}")
    args.overrides = [w for w in args.words if "=" in w]
    args.folder = Path(folders[0]).expanduser()
    return args


def unpack(images: data.PackedImages, folder: Path, ids: list[int], classes: list[str] | None) -> None:
    """Write image i as `folder`/[CLASS/]00000i.png, for each of `ids`. The folder appears whole or not at all.

    An image without a class (label -1), or in no class folder (class ""), comes to lie in `folder` itself.
    """
    from PIL import Image

    show = console.show_progress("unpacking")
    with publishing_folder(folder) as tmp:
        for name in classes or []:
            (tmp / name).mkdir(exist_ok=True)
        for done, i in enumerate(ids, start=1):
            where = tmp / classes[images.labels[i]] if classes and images.labels[i] >= 0 else tmp
            Image.fromarray(images.images[i]).save(where / f"{i:06d}.png")
            if done % 500 == 0 or done == len(ids):
                show(done, len(ids))


def main() -> int:
    args = parse()
    if args.folder.exists():
        raise RequestError(f"{args.folder} exists: name another folder, or remove it")
    console.check_outside_runs(args.folder, "DIR")
    config = reading.load(Path(args.config), args.overrides, shelf=environment.PROJECT / "configs")
    cache = prepare.cache_of(of_profile(args.profile), environment.runs_root(args.root)) / "data"
    key, packed = data.pack(config.data, args.split, cache, progress=console.show_progress("packing"))
    num = len(packed) if args.num is None else args.num
    if not 1 <= num <= len(packed):
        raise RequestError(f"--num {num}: the {args.split} split has {counted(len(packed), 'image')}")
    by_class = args.by_class or config.model.num_classes > 0
    classes = read_signed(cache / key / "meta.json")["classes"] if by_class else None
    unpack(packed, args.folder, [i * len(packed) // num for i in range(num)], classes)
    told = f" in {len(classes)} class folders" if classes else ""
    print(f"{counted(num, 'image')} of {config.data.name}, {args.split}: {args.folder}{told}")
    return 0


if __name__ == "__main__":
    console.run_script(main)
