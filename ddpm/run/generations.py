"""Which checkpoint is read: a generation is verified whole before anybody trusts it.

A generation is step-K.pt (with ema-K.safetensors at milestones and the end) and, written last, step-K.json with the
.pt's sha256 and a digest of itself. A .pt without its .json does not exist, and one that tells of another run, or of
other images, is as good as damaged. Loads no torch before a state is loaded: choosing one stays cheap on a login node.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.errors import RequestError
from ddpm.run import evidence
from ddpm.run.evidence import Incomplete
from ddpm.run.files import DamagedFile, marks, open_file, read_signed, sha256_file
from ddpm.run.paths import RunDir
from ddpm.run.records import identity

Tell = Callable[[str], None]


class NothingSaved(RequestError):
    """A checkpoint was asked for of a run that has none; how a run is trained is the caller's to say."""


class AnotherStep(RequestError):
    """The checkpoint of one step was asked for and cannot be had; others can, and how is the caller's to say."""


class NoneHolds(RequestError):
    """What was saved of `run` is missing or damaged; what brings it back is the caller's to say."""

    def __init__(self, why: str, run: RunDir) -> None:
        super().__init__(why)
        self.run = run


@dataclass(frozen=True)
class Generation:
    """A checkpoint whose size, digest and manifest hold."""

    step: int
    sha256: str
    manifest: dict[str, Any]


class _Reading(threading.Thread):
    """Computes a file's digest in a thread of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path, self._of, self._found = path, marks(path.stat()), ""

    def run(self) -> None:
        with contextlib.suppress(OSError):  # whoever needs the digest meets the error again
            self._found = sha256_file(self._path)

    def found(self) -> str:
        """The digest of the file as it is now, "" where that is not known."""
        self.join()
        return self._found if marks(self._path.stat()) == self._of else ""


_ahead: dict[Path, _Reading] = {}


def read_ahead(run: RunDir) -> None:
    """Begin to read the newest checkpoint, which `verify` then need not read once more."""
    with contextlib.suppress(OSError, RuntimeError):  # this user has no thread left
        for step in run.steps_saved()[:1]:
            reading = _Reading(run.checkpoint(step))
            reading.start()
            _ahead[run.checkpoint(step)] = reading


def _digest(path: Path) -> str:
    reading = _ahead.pop(path, None)
    return (reading.found() if reading is not None else "") or sha256_file(path)


def read_manifest(run: RunDir, step: int) -> dict[str, Any]:
    """A manifest of this run. Raises DamagedFile if it is damaged or another run's, FileNotFoundError if there is none.
    A manifest without a run's id (an old or rebuilt one) counts as this run's."""
    manifest = read_signed(run.manifest(step))
    if why := _of_others(run, manifest):
        raise DamagedFile(f"{run.manifest(step).name}: {why}")
    return manifest


def _of_others(run: RunDir, manifest: Mapping[str, Any]) -> str:
    words = {"run_id": "is of another run", "data_digest": "is of a run on other images"}
    for key, ours in identity(run).items():
        if (there := manifest.get(key)) not in (None, ours):
            return f"{words[key]} ({key} {str(there)[:12]}, and run.json says {ours[:12]})"
    return ""


def of_another(run: RunDir, step: Any, sha256: Any) -> str:
    """For a message: that something made from the checkpoint (`step`, `sha256`) was not made from this run's; "" if it
    was, or if the run has no checkpoint of that step to compare with. Raises OSError if a manifest cannot be read."""
    if not isinstance(step, int):
        return ""
    try:
        manifest = read_signed(run.manifest(step))
    except (DamagedFile, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        return ""
    if (manifest.get("sha256") == sha256) != bool(_of_others(run, manifest)):
        return ""
    return f"is of another checkpoint than this run's step {step}"


def verify(run: RunDir, step: int) -> Generation:
    """Check one generation in full. Raises DamagedFile with the reason, FileNotFoundError where there is none."""
    manifest = read_manifest(run, step)
    path = run.checkpoint(step)
    if lost := {"step", "file", "bytes", "sha256"} - manifest.keys():
        raise DamagedFile(f"{run.manifest(step).name}: says no {min(lost)}")
    if manifest["step"] != step or manifest["file"] != path.name:
        raise DamagedFile(f"{run.manifest(step).name}: is the manifest of {manifest['file']}")
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DamagedFile(f"{path.name}: missing beside its manifest") from None
    if size != manifest["bytes"]:
        open_file(path).close()  # raises where it can tell more
        raise DamagedFile(f"{path.name}: {size} bytes instead of {manifest['bytes']}")
    if (sha256 := _digest(path)) != manifest["sha256"]:
        raise DamagedFile(f"{path.name}: its sha256 does not match its manifest")
    return Generation(step, sha256, manifest)


def verify_again(run: RunDir, step: int) -> Generation:
    """`verify`, tried again after an OSError: a network file system may lose a file handle once."""
    try:
        return verify(run, step)
    except OSError:
        return verify(run, step)


def ema_damage(run: RunDir, generation: Generation) -> str | None:
    """Why the EMA weights beside a generation are not those saved with it; None if they are, or it has none."""
    expected, path = generation.manifest.get("ema_sha256"), run.ema_weights(generation.step)
    try:
        return None if expected in (None, sha256_file(path)) else f"{path.name}: its sha256 does not match the manifest"
    except OSError as e:
        return f"{path.name}: {e.strerror}"


def newest_good(run: RunDir, log: Tell) -> Generation | None:
    """The newest generation that verifies, logging each one that does not; None if none was ever saved.

    Never a silent start at 0: raises Incomplete if all checkpoints are damaged, or if there is none but evidence of
    one; OSError if none is good and some could not be read, which may work the next time.
    """
    evidence.check_start(run)
    steps = run.steps_saved()
    unread = None
    for step in steps:
        try:
            return verify_again(run, step)
        except (DamagedFile, OSError, KeyError) as e:
            log(f"checkpoint rejected: step={step} reason={e}")
            if isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
                unread = unread or e
    if unread:
        raise unread
    if steps:
        raise Incomplete(f"every checkpoint in {run.checkpoints} is damaged ({len(steps)} rejected above)")
    evidence.refuse_start(run)
    return None


def check_there(run: RunDir) -> None:
    """`newest_good` as far as it can be known without reading checkpoints. Raises Incomplete if none can be good."""
    evidence.check_start(run)
    steps = run.steps_saved()
    if not steps:
        evidence.refuse_start(run)
        return
    told = ""
    for step in steps:
        try:
            if read_manifest(run, step)["bytes"] == run.checkpoint(step).stat().st_size:
                return
        except (DamagedFile, FileNotFoundError, KeyError) as e:
            told = told or (f": {e}" if isinstance(e, DamagedFile) else "")
    raise Incomplete(f"no checkpoint in {run.checkpoints} is whole ({len(steps)} have a manifest){told}")


def choose(run: RunDir, step: int | None = None, log: Tell = print) -> Generation:
    """The generation to read: that of `step`, else the newest good one, with a line to `log` for each passed over.

    Raises NothingSaved if the run has none; AnotherStep if `step` is not among them or is damaged, naming the others;
    NoneHolds if checkpoints that it had are missing, if all are damaged, or if run.json and start.safetensors do not
    belong together.
    """
    steps = run.steps_saved()
    try:
        evidence.check_start(run)
        if not steps:
            evidence.refuse_start(run)
        elif step is None and (generation := newest_good(run, log)) is not None:
            return generation
    except Incomplete as e:
        raise NoneHolds(str(e), run) from None
    if step is None or not steps:
        raise NothingSaved(f"run {run.name} has no checkpoint yet: train it first")
    if step not in steps:
        raise AnotherStep(f"run {run.name} has no checkpoint of step {step}; it has {sorted(steps)}")
    try:
        return verify_again(run, step)
    except DamagedFile as e:
        others = [other for other in steps if other != step and _holds(run, other)]
        said = f"the checkpoint of step {step} cannot be used: {e}"
        if others:
            raise AnotherStep(f"{said}; others: {others}") from None
        told = "none of the others can be either" if steps[1:] else "there is no other"
        raise NoneHolds(f"{said}; {told}", run) from None


def _holds(run: RunDir, step: int) -> bool:
    try:
        return bool(verify(run, step))
    except (DamagedFile, OSError):
        return False


def check_mathematics(path: Path, saved: Mapping[str, Any], digest: str) -> None:
    """Raise RequestError if a checkpoint was trained under another config digest: its weights might fit all the same.
    saved: its state or manifest."""
    if (there := saved.get("config_digest")) not in (None, digest):
        raise RequestError(
            f"{path} belongs to other mathematics (config digest {str(there)[:12]}, the run's config.yaml has "
            f"{digest[:12]}): restore the config that it was trained with, or the run's own checkpoints"
        )


def load(run: RunDir, step: int, *, mapped: bool = False) -> dict[str, Any]:
    """The state saved at `step`, tensors on the CPU. Call `verify` first: one flipped bit loads without a complaint.

    mapped: they lie in the file, for whoever copies them at once and has just read it.
    """
    import torch

    return torch.load(run.checkpoint(step), map_location="cpu", weights_only=True, mmap=mapped)
