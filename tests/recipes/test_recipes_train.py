"""Every recipe learns, survives being killed, draws a grid and is scored: as processes, on a machine without a GPU.

What is shrunk, by overrides on the recipe: width, batch, length, warm-up, learning rate, the sample set and the
intervals; precision is off. Structure, schedule, loss, optimizer, accumulation and image size stay. DDPM_TEST_IMAGES
names a folder or zip of ten classes for the CIFAR-10 recipes to train on; else there are pictures made here. CelebA is
in miniature.

Of the recipes at 32x32 one, drawn anew each time, learns for 200 steps of 8 images. Of the others, those at 64x64 and
128x128 among them, three go through the same life in 6 steps of 2 images, or of one in each micro-batch, and their loss
is not judged. DDPM_TEST_FULL=1 gives all of them 400 steps of 32 images.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir
from tests import forked
from tests.celeba import write_celeba
from tests.cli.harness import PROJECT, Shell, events, read, wait_for
from tests.draws import FULL, drawn
from tests.images import given_or_made

RECIPES: dict[str, tuple[Path, list[str]]] = {
    p.stem: (p, []) for p in sorted((PROJECT / "configs").glob("*.yaml")) if p.stem != "quickstart"
}
RECIPES["conditional-l1"] = (RECIPES["cifar10-conditional"][0], ["diffusion.loss=l1", "diffusion.schedule=linear"])
STEPS, BATCH = (400, 32) if FULL else (200, 8)
FEW_STEPS, FEW_IMAGES, WIDTH = 6, 2, 8
NUM_SAMPLES = 8
BOUNDS = {"l2": 0.25, "l1": 0.35}
"""A network that answers zero has 1.0 and 0.80."""


class Place:
    """One root for all runs, so that images are packed once for each size, and the images."""

    def __init__(self, where: Path) -> None:
        self.shell = Shell(where)
        self.images = given_or_made(where).absolute()
        self.celeba = write_celeba(where / "celeba")

    def stage(self, *args: str) -> forked.Process:
        """A job's process, its output in one stream."""
        _, options = self.shell.command("jobs")
        return forked.Process([sys.executable, "-m", "launch.jobs", *args], PROJECT, options["env"], one_stream=True)

    def run_stage(self, *args: str) -> None:
        process = self.stage(*args)
        output, _ = process.communicate(timeout=7200)
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("recipes"))


def judged() -> set[str]:
    """Recipes that learn long enough for their loss to be judged."""
    configs = {name: reading.load(path, chosen) for name, (path, chosen) in RECIPES.items()}
    small = [name for name, config in configs.items() if config.data.image_size <= 32]
    return set(RECIPES) if FULL else set(drawn("recipes that learn", small, 1))


JUDGED = sorted(judged())


def overrides(config: Config, place: Place, steps: int, batch: int) -> list[str]:
    accumulation = config.train.global_batch // (config.train.micro_batch or config.train.global_batch)
    batch = max(batch, accumulation)
    data = [f"data.path={place.celeba}"]
    if config.data.name == "cifar10":
        data = ["data.name=images", f"data.path={place.images}"]
    return [
        *data,
        f"model.base_channels={WIDTH}",
        *([f"model.norm_groups={WIDTH // 2}"] if config.model.norm_groups else []),
        f"train.total_steps={steps}",
        f"train.global_batch={batch}",
        *([f"train.micro_batch={batch // accumulation}"] if accumulation > 1 else []),
        "train.lr=2.0e-3",
        f"train.warmup_steps={steps // 20}",
        "train.amp=off",
        "train.compile=false",
        "checkpoint.every_min=null",
        f"checkpoint.every_steps={steps // 2}",
        "log.every_steps=1",
        "log.grid_images=1",
        f"sample.num_samples={NUM_SAMPLES}",
        f"sample.batch={NUM_SAMPLES}",
        "sample.steps=5",
        "sample.shards=1",
        "evaluate.extractor=pixels",
    ]


@pytest.mark.parametrize("name", [*JUDGED, *drawn("recipes that take steps", sorted({*RECIPES} - {*JUDGED}), 3)])
def test_a_narrow_version_learns_is_killed_resumes_and_is_scored(name: str, place: Place) -> None:
    path, chosen = RECIPES[name]
    config = reading.load(path, chosen)
    steps, batch = (STEPS, BATCH) if name in JUDGED else (FEW_STEPS, FEW_IMAGES)
    words = ["--cluster", "local", "--prepare", "--name", name, *chosen, *overrides(config, place, steps, batch)]
    done = place.shell("submit", str(path), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(place.shell.root / name)

    process = place.stage("train", str(run.path))
    wait_for(lambda: run.manifest(steps // 2).exists() or process.poll() is not None, "the save", timeout_s=7200)
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and run.latest_step() == steps // 2, output

    place.run_stage("train", str(run.path))
    told = [(e["event"], e["step"]) for e in events(run.path) if e["event"] in ("started", "resumed", "finished")]
    assert told == [("started", 0), ("resumed", steps // 2), ("finished", steps)]
    metrics = list(read_jsonl(run.metrics))
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    loss = float(np.mean([m["loss"] for m in metrics[-50:]]))
    print(f"{name}: eps-loss {loss:.4f} over the last 50 of {steps} steps")
    if name in JUDGED:
        assert loss <= BOUNDS[config.diffusion.loss]

    grid = np.asarray(Image.open(run.grid(steps)))
    inside = grid[4:-4, 4:-4]  # without the lines between images
    assert inside.ndim == 3 and np.ptp(inside[: config.data.image_size - 8, : config.data.image_size - 8]) > 0

    set_name = f"ddim5-step{steps}-seed0"
    place.run_stage("sample", str(run.path), set_name, "--shard", "0")
    place.run_stage("evaluate", str(run.path), set_name)
    score: dict[str, Any] = read(run.eval / f"{set_name}.json")
    checkpoint = {"step": steps, "sha256": read(run.manifest(steps))["sha256"], "weights": config.sample.weights}
    assert score["frechet_distance"] > 0 and score["num_samples"] == NUM_SAMPLES
    assert score["checkpoint"] == checkpoint and score["extractor"]["name"] == "pixels"
    assert score["sampler"] == {"name": "ddim", "steps": 5, "eta": 0.0, "guidance": None}
    assert (
        score["reference"]["split"] == "train" and score["reference"]["digest"] == read(run.run_json)["data"]["digest"]
    )
