#!/usr/bin/env python
"""Export a run's averaged weights as a folder for others: safetensors, config, model card. `ddpm.load` reads it."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from ddpm.config import reading
from ddpm.config.sample import FILE
from ddpm.config.schema import Config
from ddpm.data.labels import class_names
from ddpm.errors import RequestError
from ddpm.run import generations
from ddpm.run.files import publishing_folder, sha256_file, write_bytes, write_json
from ddpm.run.log import amount
from ddpm.run.paths import EXPORTED_CLASSES, EXPORTED_CONFIG, EXPORTED_WEIGHTS, RunDir
from ddpm.run.records import read_run
from ddpm.sampling.request import precision_of
from ddpm.scoring.against import SPLITS
from launch.cluster import environment
from launch.queue import milestones
from launch.queue.sets import good_scores
from launch.terminal import console
from launch.terminal.card import card

EXAMPLES = """examples:
  python launch/export.py cifar10 ~/cifar10-ho              model.safetensors, config.yaml and README.md
  python launch/export.py cifar10 early --step 100000       of an earlier checkpoint; best: of the milestones

Use it anywhere, without the run:  ddpm.load("cifar10-ho").sample(16)
"""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a name or a directory")
    parser.add_argument("dest", metavar="DEST", help="a folder that does not exist yet")
    parser.add_step()
    parser.add_root()
    return parser.parse_args()


def for_others(config: Config, run: RunDir) -> Config:
    """The config without paths of this machine, and with `auto` replaced by what it meant for the run."""
    data, evaluate = config.data, config.evaluate
    if data.path is not None:
        data = data.model_copy(update={"path": Path(data.path).name})
    if evaluate.reference not in SPLITS:
        evaluate = evaluate.model_copy(update={"reference": "train"})
    if evaluate.extractor.startswith(FILE):
        evaluate = evaluate.model_copy(update={"extractor": "inception"})
    sample = config.sample.model_copy(update={"precision": precision_of(config, run), "weights": "ema"})
    return config.model_copy(update={"data": data, "evaluate": evaluate, "sample": sample})


def export(run: RunDir, dest: Path, step: int | None) -> int:
    """Make the folder, whole or not at all; returns the step of its weights. Raises RequestError. Loads torch."""
    config = reading.of_run(run)
    generation = generations.choose(run, step, console.warn)
    generations.check_mathematics(run.checkpoint(generation.step), generation.manifest, config.digest())
    from ddpm.run.saving import ema_bytes

    scores = [score for score in good_scores(run, config.evaluate) if _is_of(score.record, generation.sha256)]
    with publishing_folder(dest) as folder:
        weights = folder / EXPORTED_WEIGHTS
        write_bytes(weights, ema_bytes(generations.load(run, generation.step)["ema"], generation.step))
        write_bytes(folder / EXPORTED_CONFIG, for_others(config, run).to_yaml().encode())
        names = class_names(config, read_run(run))
        if names:
            write_json(folder / EXPORTED_CLASSES, names)
        text = card(config, read_run(run), generation.manifest, sha256_file(weights), scores, name=run.name)
        write_bytes(folder / "README.md", text.encode())
    return generation.step


def _is_of(record: dict[str, object], sha256: str) -> bool:
    checkpoint = record.get("checkpoint")
    return isinstance(checkpoint, dict) and checkpoint.get("sha256") == sha256 and checkpoint.get("weights") == "ema"


def main() -> int:
    args = parse()
    run = console.find_run(args.run, args.root)
    dest = environment.user_path(args.dest, "DEST")
    if dest.exists() or dest.is_symlink():
        raise RequestError(f"DEST = {dest}: exists; name a folder that does not")
    console.check_outside_runs(dest, "DEST")
    if not dest.parent.is_dir():
        raise RequestError(f"DEST = {dest}: there is no folder {dest.parent} to make it in")
    try:
        step = export(run, dest, milestones.asked_step(run, args.step))
    except generations.NothingSaved as e:
        raise RequestError(f"{e} (python launch/submit.py {run.quoted})") from None
    size = sum(path.stat().st_size for path in dest.iterdir())
    print(f"{dest}: the average weights of {run.name} at step {step}, its config and a model card, {amount(size)}")
    return 0


if __name__ == "__main__":
    console.run_script(main)
