"""Every path of a run. The layout is public: users script against it.

A run is one directory, the only thing that jobs, scripts and people share. No torch here: `status` and `--dry-run` read
runs on a login node.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpm.errors import RequestError
from ddpm.run.files import link_to_nothing

SCHEMA = 1
MAX_NAME = 100
NAME_RE = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_NAME}}}")
EXPORTED_WEIGHTS, EXPORTED_CONFIG, EXPORTED_CLASSES = "model.safetensors", "config.yaml", "classes.json"
"""A model without its run: files of one folder; classes.json lists their names, where it has some."""
ASIDE = ".damaged-"
"""Marks the name of a damaged file that was moved away from where a score belongs."""


def is_name(name: str) -> bool:
    return NAME_RE.fullmatch(name) is not None


def check_name(name: str, what: str = "run name") -> str:
    """Return `name`, or raise RequestError: names become directories, job names and log lines."""
    if not isinstance(name, str) or not is_name(name) or name.startswith("."):
        raise RequestError(
            f"{what} {name!r} is not allowed: use 1 to 100 of A-Z a-z 0-9 . _ - and do not begin with a dot"
        )
    return name


def check_set_name(name: str) -> str:
    """Check the name of a new sample set; existing sets keep whatever name they have. Raises RequestError."""
    check_name(name, "sample set name")
    if name.endswith(".json") or ASIDE in name:
        raise RequestError(
            f"sample set name {name!r} is not allowed: a file of another set's scores is called so; choose one that "
            f"does not end in .json, and has no {ASIDE!r} in it"
        )
    return name


def fit_name(name: str) -> str:
    """A name that was put together, made to fit MAX_NAME: one that is too long is cut and ends in a digest of
    itself."""
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def listed(directory: Path) -> list[Path]:
    """The content of a directory; [] if there is none. Unlike glob, raises OSError if it cannot be read, or is a link
    to nothing, whose target may only be missing for a while."""
    return [directory / name for name in names_in(directory)]


def names_in(directory: Path) -> list[str]:
    """`listed` as names: making paths takes time, and a set has hundreds of files."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - iterdir makes paths, which takes time
    except FileNotFoundError:
        if why := link_to_nothing(directory):
            raise NotADirectoryError(errno.ENOTDIR, why, str(directory)) from None
        return []


def files_of_kind(directory: Path, suffix: str) -> list[Path]:
    """What in a directory ends in `suffix`, sorted; without hidden files, as other systems leave them."""
    return sorted(p for p in listed(directory) if p.suffix == suffix and not p.name.startswith("."))


def begun_in(directory: Path) -> list[Path]:
    """The folders in a directory that are sample sets or bounds."""
    named = (p for p in sorted(listed(directory)) if p.is_dir() and p.name[0] != "." and is_name(p.name))
    return [p for p in named if _is_begun(p)]


def _is_begun(made: Path) -> bool:
    """Whether a folder has a request, or files made from one. True if it cannot be listed."""
    try:
        names = ["request.json"] if os.path.lexists(made / "request.json") else names_in(made)
    except OSError:
        return True
    return any(name.startswith(("request.json", "shard-", "features-", "part")) for name in names)


@dataclass(frozen=True)
class Folder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def quoted(self) -> str:
        """Its path as a word of a shell command, for messages."""
        return shlex.quote(str(self.path))


class Made(Folder):
    """What is made of a checkpoint as its request asks for."""

    @property
    def request(self) -> Path:
        return self.path / "request.json"


class SampleSet(Made):
    """Paths of samples/SET: the request, the shards and their features."""

    @property
    def part(self) -> Path:
        """Finished batches of unfinished shards."""
        return self.path / "part"

    def shard(self, index: int, count: int) -> Path:
        return self.path / f"shard-{index:05d}-of-{count:05d}.npz"

    def shard_manifest(self, index: int, count: int) -> Path:
        return self.shard(index, count).with_suffix(".json")

    def num_published(self) -> int:
        """Shards whose manifest is there, under their own name. Raises OSError where it cannot look."""
        is_manifest = re.compile(r"shard-[0-9]{5,}-of-[0-9]{5,}\.json").fullmatch
        return sum(is_manifest(name) is not None for name in names_in(self.path))

    def features(self, extractor: str, index: int, count: int) -> Path:
        return self.path / f"features-{extractor}-{index:05d}-of-{count:05d}.npy"


class BoundSet(Made):
    """Paths of bits-per-dim/NAME: what is asked for, and its parts."""

    def part(self, index: int) -> Path:
        return self.path / f"part-{index:05d}.npy"


class RunDir(Folder):
    """Paths of one run."""

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def code(self) -> Path:
        """The code that its jobs run."""
        return self.path / "code.zip"

    def earlier_code(self, digest: str) -> Path:
        """Code that its jobs ran before it was given other code."""
        return self.path / f"code-{digest}.zip"

    @property
    def notify(self) -> Path:
        """Says whom to tell of the run's end; readable by its owner alone."""
        return self.path / "notify.json"

    @property
    def start(self) -> Path:
        """The weights that the run starts from, if it was begun with another model's."""
        return self.path / "start.safetensors"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def fence(self) -> Path:
        return self.path / "fence"

    @property
    def compiled(self) -> Path:
        """The compiled network, for the next life."""
        return self.path / "compiled.zip"

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    def is_stopped(self) -> bool:
        """Whether there is a STOP, be it a file, folder or link."""
        return os.path.lexists(self.stop_file)

    def renew_stop(self) -> None:
        """Make STOP, or touch an existing one, which gives it a new mark."""
        if self.is_stopped():
            with contextlib.suppress(PermissionError):  # another user's file, which counts all the same
                os.utime(self.stop_file, follow_symlinks=False)
        else:
            self.stop_file.touch()

    def stop_mark(self) -> str:
        """What tells one STOP from a later one (its time); "" if there is none."""
        try:
            return str(os.lstat(self.stop_file).st_mtime_ns)
        except OSError:  # also a stale handle, which is no STOP and ends no training
            return ""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def grids(self) -> Path:
        return self.path / "grids"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def bounds(self) -> Path:
        return self.path / "bits-per-dim"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def milestones(self) -> Path:
        """The scores of milestones, and which of them is best."""
        return self.path / "milestones.json"

    def score(self, set_name: str) -> Path:
        """The set's first score."""
        return self.eval / f"{set_name}.json"

    def further_scores(self, set_name: str) -> Path:
        """The folder of the set's other scores."""
        return self.eval / set_name

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:09d}.pt"

    def manifest(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:09d}.json"

    def ema_weights(self, step: int) -> Path:
        return self.checkpoints / f"ema-{step:09d}.safetensors"

    def grid(self, step: int) -> Path:
        return self.grids / f"step-{step:09d}.png"

    def exit_marker(self, job: str, restart: int) -> Path:
        """Where rank 0 leaves its exit code for the batch shell: what starts the ranks may report another rank's."""
        return self.logs / f".exit-{job}.{restart}"

    def shard_marker(self, job: str) -> Path:
        """Which shards a job makes: written anew in each of its lives, and removed once it is done."""
        return self.logs / f".shard-{job}"

    def sample_set(self, name: str) -> SampleSet:
        return SampleSet(self.samples / name)

    def sample_sets(self) -> list[SampleSet]:
        return [SampleSet(path) for path in begun_in(self.samples)]

    def bound_set(self, name: str) -> BoundSet:
        return BoundSet(self.bounds / name)

    def bound_sets(self) -> list[BoundSet]:
        return [BoundSet(path) for path in begun_in(self.bounds)]

    def steps_saved(self) -> list[int]:
        """Steps whose manifest exists, newest first; contents are not verified. A manifest that is a link to nothing
        does not count."""
        return list(self._saved())

    def lost_manifests(self) -> list[Path]:
        """Manifests that are links to nothing."""
        return sorted(path for _, path in self._manifests() if link_to_nothing(path))

    def _saved(self) -> Iterator[int]:
        return (step for step, path in sorted(self._manifests(), reverse=True) if not link_to_nothing(path))

    def _manifests(self) -> list[tuple[int, Path]]:
        found = (re.fullmatch(r"step-([0-9]{9,})\.json", name) for name in names_in(self.checkpoints))
        folder = self.checkpoints
        return [(int(m[1]), folder / m[0]) for m in found if m]

    def latest_step(self) -> int:
        """The newest saved step, 0 if there is none: the restart policy's measure of progress."""
        return next(self._saved(), 0)
