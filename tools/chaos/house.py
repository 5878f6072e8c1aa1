"""A run with everything that a run can hold, half-done and finished, and what people do with it.

Both are one run, which starts from another's weights, at two moments: stopped at half its steps, with a set scored and
another half made; and ended, with the chain's set made and scored. Beside them it is kept as it is before its first
life. They lie at one path, which a cell of the table is put back to, so that the paths in its records hold.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.errors import EXIT_REQUEUE
from ddpm.run.paths import BoundSet, RunDir, SampleSet
from tools.chaos import forked
from tools.chaos.forked import NOBODY, Said, Work, as_owner, process
from tools.chaos.lives import TINY, at_steps, stop

STEPS, HALF, EARLY = 12, 6, 3
CONFIG = [
    *TINY, "data.name=images", "model.num_classes=2", f"train.total_steps={STEPS}", "log.every_steps=2",
    f"checkpoint.every_steps={EARLY}", f"checkpoint.milestone_every_steps={HALF}", "sample.num_samples=12",
    "sample.shards=2", "sample.batch=3", "sample.steps=2", "evaluate.extractor=pixels",
    "evaluate.milestones={num_samples: 4}",
]  # fmt: skip
BOUND = ("--bits-per-dim", "--reference", "train", "--num-images", "4", "--step", str(EARLY))


@dataclass(frozen=True)
class House:
    """Where the run lies, and its trees at the two moments."""

    where: Path

    @property
    def root(self) -> Path:
        return self.where / "runs"

    @property
    def run(self) -> RunDir:
        return RunDir(self.root / "run")

    @property
    def weights(self) -> Path:
        """The weights that the run starts from."""
        return self.where / "weights.safetensors"

    @property
    def log(self) -> Path:
        return self.where / "said"

    def keep(self, moment: str) -> None:
        shutil.copytree(self.root, self.where / moment)

    def put_back(self, moment: str) -> None:
        """The tree of that moment, as its owner made it."""
        shutil.rmtree(self.root, ignore_errors=True)
        with as_owner():
            shutil.copytree(self.where / moment, self.root)

    def set_at(self, moment: str, verb: str = "") -> SampleSet:
        """The set that a verb is about. Of the half-done run it is the half-made one; for a score the one that has one,
        which is of the oldest checkpoint, so that training must keep that for it."""
        if moment == "finished":
            return self.run.sample_set(f"ddim2-step{STEPS}-seed0")
        return self.run.sample_set("early" if verb in ("train", "evaluate") else "few")

    @property
    def bound(self) -> BoundSet:
        (made,) = self.run.bound_sets()
        return made

    def do(self, moment: str, verb: str) -> Said:
        before = self._logs()
        said = process(self.log, lambda: VERBS[verb](self, moment))
        of_jobs = [text for path, text in self._logs().items() if path not in before]
        return Said(said.code, "".join([said.text, *of_jobs]))

    def _logs(self) -> dict[Path, str]:
        return {path: path.read_text(errors="replace") for path in sorted(self.run.logs.glob("local-*.out"))}


# ---------------------------------------------------------------- what people do


def script(name: str, *words: str | Path) -> None:
    """A script of launch/ as it is typed; what it starts in the background is forked."""
    from launch.queue import local
    from launch.terminal import console

    local.subprocess = types.SimpleNamespace(Popen=forked.Popen, DEVNULL=None, STDOUT=None)  # type: ignore[assignment]
    sys.argv = [f"launch/{name}.py", *map(str, words)]
    console.run_script(sys.modules[f"launch.{name}"].main)


def job(house: House, stage: str, *words: str) -> None:
    from launch import jobs

    jobs.main([stage, str(house.run.path), *words])


def submit(house: House, name: str, *words: str) -> None:
    script("submit", house.where / "config.yaml", *CONFIG, f"data.path={house.where / 'pictures'}",
           "--root", house.root, "--name", name, "--cluster", "local", *words)  # fmt: skip


def sample(house: House, set_name: str, *words: str | int) -> None:
    script("sample", house.run.path, "--set", set_name, *map(str, words))


def evaluate(house: House, set_name: str) -> None:
    script("evaluate", house.run.path, "--set", set_name)


def status(house: House) -> None:
    """Each way of showing, one after another."""
    codes = []
    for words in SHOWN:
        print(f"$ status {' '.join(words)}", flush=True)
        try:
            script("status", *words, "--root", house.root)
        except SystemExit as e:
            codes.append(int(e.code or 0))
    sys.exit(max(codes))


VERBS: dict[str, Callable[[House, str], object]] = {
    "submit": lambda house, moment: submit(house, "run", "--then", "sample,evaluate", "--wait"),
    "train": lambda house, moment: job(house, "train"),
    "sample": lambda house, moment: sample(house, house.set_at(moment).name),
    "evaluate": lambda house, moment: evaluate(house, house.set_at(moment, "evaluate").name),
    "status": lambda house, moment: status(house),
}
MOMENTS = ("half", "finished")
BEGUN = "begun"
"""Before the first life: there are no sets yet."""
SHOWN: tuple[list[str], ...] = (["run"], [], ["run", "--events"], ["--json"])


# ---------------------------------------------------------------- building


@contextmanager
def stopped() -> Iterator[House]:
    """One whose run was stopped at half its steps, and has no sets; for who changes more of it than `root`."""
    with tempfile.TemporaryDirectory(prefix="ddpm-chaos-", ignore_cleanup_errors=True) as where:
        yield _begun(House(Path(where)), "half")


@functools.cache
def shared() -> House:
    """Both moments, for all rows of this process that change nothing of it but `root`. Raises AssertionError where the
    undisturbed run does not get there."""
    house = House(Path(tempfile.mkdtemp(prefix="ddpm-chaos-")))
    atexit.register(shutil.rmtree, house.where, ignore_errors=True)
    _begun(house)
    steps: list[tuple[Work, int]] = [
        (lambda: sample(house, "early", "--step", EARLY), 0),
        (lambda: evaluate(house, "early"), 0),
        (lambda: script("evaluate", house.run.path, "--all-milestones"), 0),
        (lambda: script("evaluate", house.run.path, *BOUND), 0),
        (lambda: sample(house, "few", "--prepare"), 0),
        (lambda: job(house, "sample", "few", "--shard", "0"), 0),
        (lambda: (_stop_after_a_batch(), job(house, "sample", "few", "--shard", "1")), EXIT_REQUEUE),
    ]
    _build(house, steps, "half")
    _build(house, [(lambda: VERBS["submit"](house, ""), 0)], "finished")
    return house


def _begun(house: House, moment: str = "") -> House:
    """Stopped at half its steps; kept as `moment`, if that has a name."""
    if os.geteuid() == 0:
        os.chown(house.where, NOBODY, NOBODY)
    with as_owner():
        _pictures(house.where / "pictures")
        (house.where / "config.yaml").write_text("name: run\n")
    steps: list[tuple[Work, int]] = [
        (lambda: submit(house, "beside", "--prepare"), 0),  # nothing is done to it, and status shows it always
        (lambda: _weights(house), 0),
        (lambda: submit(house, "run", "--prepare", "--from", str(house.weights)), 0),
    ]
    _build(house, steps, BEGUN)
    _build(house, [(lambda: (at_steps({HALF: stop})(), job(house, "train")), EXIT_REQUEUE)], moment)
    return house


def _build(house: House, steps: list[tuple[Work, int]], moment: str) -> None:
    for work, code in steps:
        said = process(house.log, work)
        assert said.code == code, f"building the run for the table: exit code {said.code}: {said.text[-2000:]}"
    if moment:
        with as_owner():
            house.keep(moment)


def _weights(house: House) -> None:
    import safetensors.torch

    import ddpm

    words = [*CONFIG, f"data.path={house.where / 'pictures'}", "seed=9"]
    network = ddpm.build_model(ddpm.load_config(house.where / "config.yaml", words), device="cpu")
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.state_dict().items()}, house.weights)


def _stop_after_a_batch() -> None:
    from ddpm.sampling import generate

    real = generate.write_part

    def then_stop(*args: Any) -> None:
        real(*args)
        stop(None)

    generate.write_part = then_stop  # type: ignore[assignment]


def _pictures(folder: Path) -> None:
    """24 pictures in two class folders: with few, another label or pixel is in every batch."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(3).integers(0, 256, size=(24, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / "train" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
