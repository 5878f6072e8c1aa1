"""A sample set on disk: what it asks for (samples/SET/request.json), its packed shards, and what is missing of it.

Owns the request and the reading of shards and manifests. Must not know how a sample is computed or what it is scored
by. Loads no torch: publishing a request and listing what is missing stay cheap on a login node.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm import rundir
from ddpm.errors import RequestError
from ddpm.rundir import DamagedFile, SampleSet

VARIANCES = ("fixed_large", "fixed_small")
"""Of the ancestral sampler, as in diffusion.variance."""


# ---------------------------------------------------------------- the request


@dataclass(frozen=True)
class CheckpointRef:
    step: int
    sha256: str


@dataclass(frozen=True)
class Request:
    """What a sample set is: everything that its samples follow from. Field for field request.json, less its digest.

    request.json says `clip_x_0` only where it is false, and `variance` only where it is not the config's: sets from
    before there was a choice keep their digests.
    """

    checkpoint: CheckpointRef
    weights: str
    sampler: str
    steps: int
    eta: float
    guidance: float | None
    seed: int
    num_samples: int
    shards: int
    batch: int
    precision: str
    class_plan: tuple[int, ...] | None
    """How many samples of each class, all of class 0 first; None: the classes in turn."""
    clip_x_0: bool = True
    variance: str | None = None
    """The ancestral sampler's, one of VARIANCES; None: the config's diffusion.variance."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "shards", "batch", "steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.shards > self.num_samples:
            raise RequestError(f"shards = {self.shards}: at most num_samples = {self.num_samples}")
        object.__setattr__(self, "eta", float(self.eta))  # 0 and 0.0 are one request and must have one digest
        if self.eta and self.sampler != "ddim":
            raise RequestError(f"eta = {self.eta}: only ddim has it; with sampler = {self.sampler} leave it out, or 0")
        if self.variance is not None:
            if self.variance not in VARIANCES:
                raise RequestError(f"variance = {self.variance!r}: use one of {', '.join(VARIANCES)}")
            if self.sampler != "ancestral":
                raise RequestError(
                    f"variance = {self.variance}: only ancestral has one; with sampler = {self.sampler} leave it out"
                )
        if self.guidance is not None:
            if not 0.0 <= self.guidance < math.inf:
                raise RequestError(f"guidance = {self.guidance}: must be at least 0; null is none")
            object.__setattr__(self, "guidance", float(self.guidance))
        if self.class_plan is not None:
            plan = tuple(self.class_plan)  # JSON has lists
            if any(count < 0 for count in plan) or sum(plan) != self.num_samples:
                raise RequestError(
                    f"class_plan = {list(plan)}: must be counts of 0 or more, one per class, that sum to "
                    f"num_samples = {self.num_samples}; here the sum is {sum(plan)}"
                )
            object.__setattr__(self, "class_plan", plan)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of all other fields."""
        return rundir.sha256_json(self._body())

    def to_record(self) -> dict[str, Any]:
        """The content of request.json."""
        return {**self._body(), "digest": self.digest}

    def _body(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in _LATER or v != _LATER[k]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """The request in request.json's content. Raises DamagedFile if its form or its digest does not hold."""
        body = {k: v for k, v in record.items() if k != "digest"}
        if rundir.sha256_json(body) != record.get("digest"):
            raise DamagedFile("its digest does not match its content")
        try:
            request = cls(**{**body, "checkpoint": CheckpointRef(**body["checkpoint"])})
        except (KeyError, TypeError, RequestError) as e:
            raise DamagedFile(f"this version cannot read it ({e})") from None
        if request.digest != record["digest"]:
            raise DamagedFile("it says what is left out of a request.json")
        return request


_LATER = {"clip_x_0": True, "variance": None}
"""Fields that came after the first sets, and what a request.json means that does not say them."""


def publish_request(sample_set: SampleSet, request: Request) -> Request:
    """Publish `request` as the set's, once; the same request again is fine and changes nothing.

    Raises RequestError if the set already has another one, naming every field that differs.
    """
    rundir.check_name(sample_set.name, "sample set name")
    sample_set.path.mkdir(parents=True, exist_ok=True)
    try:
        rundir.write_json(sample_set.request, request.to_record())
    except FileExistsError:
        there = read_request(sample_set)
        if there.digest != request.digest:
            raise RequestError(
                f"sample set {sample_set.name!r} exists with another request: {differences(there, request)}; "
                f"ask for the same, or start another set with --set OTHERNAME"
            ) from None
    return request


def read_request(sample_set: SampleSet) -> Request:
    """The set's request. Raises RequestError where there is none, or where it is damaged."""
    if not sample_set.request.exists():
        raise RequestError(f"{sample_set.request}: no such sample set; make it with {repair_command(sample_set)}")
    try:
        return Request.from_record(rundir.read_json(sample_set.request) or {})
    except DamagedFile as e:
        raise RequestError(
            f"{sample_set.request} is damaged: {e}; nothing can be added to this set. Start another one with "
            f"--set OTHERNAME, or restore the file"
        ) from None


def withdraw_request(sample_set: SampleSet) -> None:
    """Unpublish the request of a set that has nothing else yet: it was never asked for."""
    sample_set.request.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a shard that somebody began
        sample_set.path.rmdir()


def differences(there: Request, asked: Request) -> str:
    """The fields in which two requests differ, for a message."""

    def flat(request: Request) -> dict[str, Any]:
        record = asdict(request)
        checkpoint = record.pop("checkpoint")
        return {**{f"checkpoint.{k}": v for k, v in checkpoint.items()}, **record}

    old, new = flat(there), flat(asked)
    return ", ".join(f"{k} is {old[k]!r} there and {new[k]!r} asked for" for k in old if old[k] != new[k])


def repair_command(sample_set: SampleSet) -> str:
    """What a person types to have the missing shards of a set computed."""
    run = sample_set.path.parent.parent
    return f"`python launch/sample.py {shlex.quote(str(run))} --set {sample_set.name}`"


# ---------------------------------------------------------------- shards on disk


class Shard(NamedTuple):
    """A verified shard."""

    images: np.ndarray
    """uint8 (n, H, W, C)"""
    labels: np.ndarray
    """int64 (n,), -1 where the model has no classes"""
    first: int
    """Index of the first sample."""
    manifest: dict[str, Any]


def shard_range(num_samples: int, shards: int, index: int) -> tuple[int, int]:
    """(first, num) of shard `index`: contiguous, in order, sizes differing by at most one."""
    if not 1 <= shards <= num_samples:
        raise RequestError(f"shards = {shards}: must be from 1 to num_samples = {num_samples}")
    if not 0 <= index < shards:
        raise RequestError(f"shard {index}: must be from 0 to {shards - 1}")
    first, end = index * num_samples // shards, (index + 1) * num_samples // shards
    return first, end - first


def read_manifest(sample_set: SampleSet, request: Request, index: int) -> dict[str, Any]:
    """A shard's manifest. Raises FileNotFoundError, or DamagedFile if it is not what this request's shard must say."""
    path = sample_set.shard_manifest(index, request.shards)
    manifest = rundir.read_signed(path)
    first, num = shard_range(request.num_samples, request.shards, index)
    expected = {"request_digest": request.digest, "shard": index, "first": first, "num": num}
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise DamagedFile(f"{path.name}: its {key} is {manifest.get(key)!r}, this shard's is {value!r}")
    if not sample_set.shard(index, request.shards).exists():
        raise DamagedFile(f"{path.with_suffix('.npz').name}: missing, though its manifest is there")
    return manifest


def missing_shards(sample_set: SampleSet, request: Request) -> list[int]:
    """Shards without a good manifest. Reads manifests only: `verify_shard` is what hashes the images."""
    missing = []
    for index in range(request.shards):
        try:
            read_manifest(sample_set, request, index)
        except (FileNotFoundError, DamagedFile):
            missing.append(index)
    return missing


def verify_shard(sample_set: SampleSet, request: Request, index: int) -> Shard:
    """A published shard, every byte checked. Raises FileNotFoundError if there is none, DamagedFile with a reason."""
    manifest = read_manifest(sample_set, request, index)
    path = sample_set.shard(index, request.shards)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise DamagedFile(f"{path.name}: its sha256 is not the one in its manifest")
    arrays = parse_npz(data, path.name)
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None or labels is None or len(images) != manifest["num"] or len(labels) != manifest["num"]:
        raise DamagedFile(f"{path.name}: does not hold {manifest['num']} images and labels")
    if int(arrays.get("first", -1)) != manifest["first"]:
        raise DamagedFile(
            f"{path.name}: begins at sample {arrays.get('first')}, not at {manifest['first']}: a copy of another shard"
        )
    return Shard(images, labels, manifest["first"], manifest)


def withdraw_shard(sample_set: SampleSet, request: Request, index: int) -> None:
    """Unpublish a shard: without its manifest it does not exist, and is computed again."""
    sample_set.shard_manifest(index, request.shards).unlink(missing_ok=True)


def unpack_png(sample_set: SampleSet, request: Request, directory: Path) -> Path:
    """Write every sample as `directory`/000007.png, for tools that want files; returns `directory`.

    The directory appears whole: a kill leaves a temporary beside it. One that already holds all of them is left alone.
    Raises RequestError for a directory with other content, DamagedFile for a shard that is not good.
    """
    import shutil

    from PIL import Image

    if directory.exists():
        if len(list(directory.glob("*.png"))) == request.num_samples:
            return directory
        raise RequestError(
            f"{directory} exists and does not hold this set's {request.num_samples} images; remove it, "
            f"or name another directory"
        )
    tmp = directory.with_name(f"{rundir.TMP_PREFIX}{directory.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for index in range(request.shards):
        shard = verify_shard(sample_set, request, index)
        for i, image in enumerate(shard.images, start=shard.first):
            Image.fromarray(image).save(tmp / f"{i:06d}.png")
    tmp.rename(directory)
    return directory


def npz_bytes(**arrays: Any) -> bytes:
    """Arrays as the bytes of an uncompressed .npz; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def parse_npz(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz; zip's own checksums are verified. Raises DamagedFile. Never unpickles."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as e:  # zipfile and numpy raise a dozen kinds, depending on which bit flipped
        raise DamagedFile(f"{name}: not a readable .npz ({type(e).__name__}: {e})") from None
