"""`evaluate.py --images`: the score, or the statistics, of images that no run made, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from ddpm.errors import RequestError
from ddpm.run.log import counted
from launch.terminal import console
from launch.terminal.results import print_score


def score_images(args: argparse.Namespace) -> int:
    """Score one set of images against another on this machine, or write one set's statistics. Returns the exit code."""
    images = _there("--images", args.images)
    reference = _there("--reference", args.reference, ", or a pytorch-fid .npz") if args.reference else None
    name = args.extractor or "inception"
    if args.dry_run:
        what = f"score {images} against {reference}" if reference else f"write statistics of {images}"
        print(f"would {what} with {name} on this machine")
        return 0
    stats = Path(args.save_stats).expanduser() if args.save_stats else None
    if stats:
        check_new(stats)
    keep = Path(args.keep).expanduser() if args.keep else None
    if keep:
        console.check_outside_runs(keep, "--keep")
    if keep and not (keep.is_dir() and os.access(keep, os.W_OK)):
        raise RequestError(f"--keep {keep}: not a directory that can be written; make it first")
    from ddpm.network.device import as_device, keep_freed_memory
    from ddpm.scoring.extractors import build_extractor, ensure_weights
    from ddpm.scoring.foreign import evaluate_images, load_images, save_statistics

    ensure_weights(name)
    device = as_device()
    if device.type == "cpu":
        keep_freed_memory()
    packed = load_images(images, args.size)
    size = packed.images.shape[1]
    extractor = build_extractor(name, device, image_size=size, warn=lambda message: print(message, file=sys.stderr))
    show = console.show_progress("features of")
    if stats:
        save_statistics(packed, stats, extractor, keep, show)
        print(f"{stats}: statistics of {counted(len(packed), 'image')}, {extractor.name} features")
    elif reference:
        with contextlib.redirect_stdout(sys.stderr):  # where the record alone goes
            result = evaluate_images(packed, reference, extractor, args.size, keep, show)
        print_score(result, None, as_json=args.json)
    return 0


def check_new(stats: Path) -> None:
    """Raise RequestError where no statistics can be written under that name: before hours of work are lost to it."""
    console.check_outside_runs(stats, "--save-stats")
    folder = stats.absolute().parent
    if stats.exists() or not os.access(folder, os.W_OK | os.X_OK):
        why = "exists" if stats.exists() else f"{folder} cannot be written" if folder.is_dir() else "no such directory"
        raise RequestError(f"--save-stats {stats}: {why}; name another")


def _there(option: str, word: str, or_else: str = "") -> Path:
    path = Path(word).expanduser()
    if not path.exists():
        raise RequestError(f"{option} {path}: does not exist; give a folder or zip of images, an .npy or .npz{or_else}")
    return path
