"""`--from RUN|FILE[@STEP]`: the weights that a new run starts from, and whether an existing run started from them.

A folder from launch/export.py stands for its file of weights. Loads torch when weights are read, by
ddpm/network/start.py.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import DDPMError, RequestError
from ddpm.run.files import DamagedFile
from ddpm.run.paths import EXPORTED_WEIGHTS, RunDir
from ddpm.run.records import read_run
from launch.cluster import environment
from launch.terminal import console

if TYPE_CHECKING:
    from ddpm.network.start import Start

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of files of weights."""
DIFFUSERS = ("model_index.json", "config.json", "unet")
"""Files of a published model in diffusers' layout, which none of our folders has."""


class Origin(NamedTuple):
    """What --from asks for."""

    word: str
    """A run or a file, without its step."""
    step: int | str | None
    """A number, or `best` of the milestones; None: the newest."""
    weights: str | None
    root: str | None

    def places(self) -> list[Path]:
        """Where it may be: the path as typed, an exported folder's weights, a run of that name."""
        typed = environment.user_path(self.word, "--from")
        return [typed, typed / EXPORTED_WEIGHTS, environment.runs_root(self.root) / self.word]


def asked(word: str | None, weights: str | None, root: str | None) -> Origin | None:
    """What the options ask for; None without --from. Raises RequestError."""
    if word is None:
        if weights is not None:
            raise RequestError(f"--from-weights {weights}: goes with --from RUN|FILE[@STEP], which is not there")
        return None
    name, at, step = word.rpartition("@")
    if not at or not (step.isdecimal() or step == "best") or Path(word).expanduser().exists():
        name, step = word, ""
    if not name:
        raise RequestError(
            f"--from {word!r}: give a run or a file of weights, with @STEP or @best for another than its newest"
        )
    return Origin(name, int(step) if step.isdecimal() else step or None, weights, root)


def check_same(run: RunDir, origin: Origin | None) -> None:
    """Raise RequestError if an existing run did not start from what is asked for. The source itself may be gone."""
    if origin is None:
        return
    began = read_run(run).get("from")
    if began is None:
        raise RequestError(
            f"--from {origin.word}: run {run.name} exists and started from its seed; choose another --name, or leave "
            f"--from out to go on with it"
        )
    same = began["source"] in map(str, origin.places())
    if not same or origin.step not in (None, "best", began["step"]) or (origin.weights or "ema") != began["weights"]:
        at = f"@{began['step']}" if began.get("step") else ""
        raise RequestError(
            f"--from {origin.word}: run {run.name} exists and started from the weights ({began['weights']}) of "
            f"{began['source']}{at}; choose another --name, or leave --from out to go on with it"
        )


def read(origin: Origin, config: Config) -> Start:
    """Read the weights. Raises RequestError if there are none, or they do not fit the config's network."""
    path, exported, _ = origin.places()
    if (file := next((p for p in (path, exported) if p.is_file()), None)) is not None:
        return _of_file(file, origin, config)
    if any((path / name).exists() for name in DIFFUSERS):
        raise RequestError(
            f"--from {origin.word}: a folder in diffusers' layout; make a run of it (python tools/convert_diffusers.py "
            f"{origin.word} OUT.safetensors --run NEW_RUN), and start from that"
        )
    try:
        run = console.find_run(origin.word, origin.root)
    except RequestError as e:
        raise RequestError(f"--from {origin.word}: {e}; and no file of weights ({' '.join(SUFFIXES)})") from None
    there = None
    try:
        there = reading.of_run(run)
    except (DDPMError, DamagedFile) as e:
        console.warn(f"warning: --from {origin.word}: {e}")
    from ddpm.network import start
    from launch.queue import milestones

    try:
        step = milestones.asked_step(run, origin.step)
        found = start.of_run(run, step, origin.weights or "ema", config, console.warn)
    except RequestError as e:
        told = _apart(there, config, "model", "train.label_dropout")
        raise RequestError(f"--from {origin.word}: {e}{told}") from None
    if told := _apart(there, config, "diffusion"):
        console.warn(f"warning: --from {origin.word}{told}: the weights were trained for another process")
    return found


def _of_file(path: Path, origin: Origin, config: Config) -> Start:
    if origin.step is not None:
        raise RequestError(f"--from {path}@{origin.step}: a file holds one step's weights; leave @{origin.step} out")
    if path.suffix not in SUFFIXES:
        raise RequestError(f"--from {path}: expected a run's directory, or a file of {' '.join(SUFFIXES)}")
    from ddpm.network import start

    try:
        return start.of_file(path, origin.weights, config)
    except RequestError as e:
        theirs = path.with_name("config.yaml")
        wants = str(e).endswith("give the config they were trained with") and theirs.is_file()
        more = f": {shlex.quote(str(theirs))}" if wants else ""
        raise RequestError(f"--from {e}{more}") from None


def _apart(there: Config | None, here: Config, *keys: str) -> str:
    """The differences between two configs in some keys or sections, as `; key is A there and B here`, or ""."""
    found = [] if there is None else reading.differences(there, here)
    told = (f"; {key} is {reading.as_typed(old)} there and {reading.as_typed(new)} here" for key, old, new in found
            if key in keys or key.partition(".")[0] in keys)  # fmt: skip
    return "".join(sorted(told))
