"""One shard of a sample set: from a request and a network to published, packed images.

Owns the request (samples/SET/request.json), the shards and their finished batches (samples/SET/part/). Must not know
jobs, checkpoints or how the network was built: `eps_model` arrives ready. torch is imported where images are computed,
so that publishing a request and listing what is missing stay cheap on a login node.

Sample i is a function of (request, i) alone. Its noise is counted by i. The network always runs at `batch` rows, and
sample i sits in row i % batch of its call: any `batch` consecutive samples fill every row once, so even a kernel whose
rounding depends on the row gives the same bytes under every sharding, at no cost.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddpm import rundir
from ddpm.errors import DoNotRetry, RequestError, RunBusy, Stopped
from ddpm.rundir import DamagedFile, SampleSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

EpsModel = Callable[["Tensor", "Tensor", "Tensor | None"], "Tensor"]
"""(x_t (B, C, H, W), t int64 (B,), labels int64 (B,) or None) -> eps (B, C, H, W)."""
StopRequested = Callable[[], "str | None"]
Progress = Callable[[int, int], None]


# ---------------------------------------------------------------- the request


@dataclass(frozen=True)
class CheckpointRef:
    step: int
    sha256: str


@dataclass(frozen=True)
class Request:
    """What a sample set is: everything that its samples follow from. Field for field request.json, less its digest."""

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
    class_plan: None

    def __post_init__(self) -> None:
        for name in ("num_samples", "shards", "batch", "steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.shards > self.num_samples:
            raise RequestError(f"shards = {self.shards}: at most num_samples = {self.num_samples}")
        for name in ("guidance", "class_plan"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} = {getattr(self, name)!r}: not supported yet; leave it null")
        object.__setattr__(self, "eta", float(self.eta))  # 0 and 0.0 are one request and must have one digest

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of all other fields."""
        return rundir.sha256_json(asdict(self))

    def to_record(self) -> dict[str, Any]:
        """The content of request.json."""
        return {**asdict(self), "digest": self.digest}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """The request in request.json's content. Raises DamagedFile if its form or its digest does not hold."""
        body = {k: v for k, v in record.items() if k != "digest"}
        if sorted(body) != sorted(f.name for f in fields(cls)) or rundir.sha256_json(body) != record.get("digest"):
            raise DamagedFile("its digest does not match its content")
        try:
            return cls(**{**body, "checkpoint": CheckpointRef(**body["checkpoint"])})
        except (TypeError, RequestError) as e:
            raise DamagedFile(f"this version cannot read it ({e})") from None


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
                f"sample set {sample_set.name!r} exists with another request: {_differences(there, request)}; "
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


def _differences(there: Request, asked: Request) -> str:
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


# ---------------------------------------------------------------- finished batches


class _Part(NamedTuple):
    images: np.ndarray
    nfe: int


def _part_path(sample_set: SampleSet, first: int, num: int) -> Path:
    return sample_set.part / f"{first:09d}-{num}.npz"


def _part_check(request: Request, first: int, part: _Part) -> str:
    """Ties a part's pixels to its request and place: a part left by another request is no part."""
    digest = hashlib.sha256(f"{request.digest} {first} {part.nfe} {part.images.shape}".encode())
    digest.update(part.images.tobytes())
    return digest.hexdigest()


def _read_part(sample_set: SampleSet, request: Request, first: int, num: int) -> _Part | None:
    """A finished batch that an earlier life left, or None; a damaged one is removed and said."""
    path = _part_path(sample_set, first, num)
    try:
        arrays = parse_npz(path.read_bytes(), path.name)
        part = _Part(arrays["images"], int(arrays["nfe"]))
        if str(arrays["check"]) == _part_check(request, first, part):
            return part
        reason = "its content does not match its check"
    except FileNotFoundError:
        return None
    except (DamagedFile, KeyError, ValueError, TypeError) as e:
        reason = str(e)
    log.warning("part=%s damaged, computing these samples again: %s", path, reason)
    path.unlink(missing_ok=True)
    return None


def _write_part(sample_set: SampleSet, request: Request, first: int, part: _Part, token: str) -> None:
    sample_set.part.mkdir(exist_ok=True)
    data = npz_bytes(images=part.images, nfe=part.nfe, check=_part_check(request, first, part))
    try:
        rundir.write_bytes(_part_path(sample_set, first, len(part.images)), data, token=token)
    except FileExistsError:
        pass  # a twin of this job, not yet dead, finished the same batch


def _remove_parts(sample_set: SampleSet, request: Request, batches: list[tuple[int, int]]) -> None:
    """Remove this shard's parts, and the directory with the last shard of the set: no writer can be left then."""
    for first, num in batches:
        _part_path(sample_set, first, num).unlink(missing_ok=True)
    if sample_set.part.exists() and not any(sample_set.part.iterdir()) and not missing_shards(sample_set, request):
        sample_set.part.rmdir()


def _remove_stale(sample_set: SampleSet, request: Request, index: int, batches: list[tuple[int, int]]) -> None:
    """Remove the temporaries of this shard's killed lives, and only of this shard's."""
    finals = [sample_set.shard(index, request.shards), sample_set.shard_manifest(index, request.shards)]
    for final in finals + [_part_path(sample_set, first, num) for first, num in batches]:
        for stale in final.parent.glob(f"{rundir.TMP_PREFIX}{final.name}.*"):
            stale.unlink(missing_ok=True)


# ---------------------------------------------------------------- generation


def sample_labels(first: int, num: int, num_classes: int) -> np.ndarray:
    """Class of samples first … first+num-1, int64 (num,): i % num_classes, or -1 for a model without classes."""
    index = np.arange(first, first + num, dtype=np.int64)
    return index % num_classes if num_classes else np.full_like(index, -1)


def generate_shard(
    sample_set: SampleSet,
    request: Request,
    index: int,
    *,
    eps_model: EpsModel,
    schedule: Any,
    image_shape: tuple[int, int, int],
    variance: str,
    num_classes: int,
    device: torch.device | str,
    stop_requested: StopRequested = lambda: None,
    progress: Progress | None = None,
    token: str = "",
) -> dict[str, Any]:
    """Compute and publish shard `index` of a published request; returns its manifest, at once if it is already good.

    eps_model: the network at the request's checkpoint, weights and precision, on `device`. schedule, variance: as the
    samplers take them. image_shape: (C, H, W). num_classes: 0 for a model without.
    stop_requested is asked at every sampler step. progress(done, total) counts the shard's samples, after each batch.
    token: names this job in temporaries, so that two lives on two hosts never share one.

    A kill loses the batch in work. Raises Stopped(reason); DoNotRetry if the network's output is not finite.
    """
    first, num = shard_range(request.num_samples, request.shards, index)
    batches = [(i, min(request.batch, first + num - i)) for i in range(first, first + num, request.batch)]
    _remove_stale(sample_set, request, index, batches)
    if manifest := _already_published(sample_set, request, index):
        _remove_parts(sample_set, request, batches)
        return manifest

    compute = _batch_sampler(request, eps_model, schedule, image_shape, variance, num_classes, device, stop_requested)
    parts = []
    for start, count in batches:
        part = _read_part(sample_set, request, start, count)
        if part is None:
            part = compute(start, count)
            _write_part(sample_set, request, start, part, token)
        parts.append(part)
        if progress is not None:
            progress(start + count - first, num)

    nfe = {part.nfe for part in parts}
    assert len(nfe) == 1, f"every sample takes the same number of network evaluations, found {nfe}"
    images = np.concatenate([part.images for part in parts])
    manifest = _publish_shard(sample_set, request, index, images, num_classes, nfe.pop(), token)
    _remove_parts(sample_set, request, batches)
    return manifest


def _already_published(sample_set: SampleSet, request: Request, index: int) -> dict[str, Any] | None:
    """The manifest of a good shard. What is left of a bad one is removed: manifest first, then it does not exist."""
    try:
        return verify_shard(sample_set, request, index).manifest
    except FileNotFoundError:
        pass
    except DamagedFile as e:
        log.warning("shard=%d set=%s damaged, computing it again: %s", index, sample_set.name, e)
    withdraw_shard(sample_set, request, index)
    sample_set.shard(index, request.shards).unlink(missing_ok=True)
    return None


def _publish_shard(
    sample_set: SampleSet, request: Request, index: int, images: np.ndarray, num_classes: int, nfe: int, token: str
) -> dict[str, Any]:
    first, num = shard_range(request.num_samples, request.shards, index)
    path = sample_set.shard(index, request.shards)
    try:
        with rundir.publishing(path, token=token) as f:
            f.write(npz_bytes(images=images, labels=sample_labels(first, num, num_classes), first=np.int64(first)))
        # killed here: a .npz without its .json does not exist, and the next life removes it
        manifest = rundir.sign(
            {
                "shard": index,
                "first": first,
                "num": num,
                "sha256": f.sha256,
                "request_digest": request.digest,
                "nfe": nfe,
            }
        )
        rundir.write_json(path.with_suffix(".json"), manifest, token=token)
        return manifest
    except FileExistsError:
        try:
            return verify_shard(sample_set, request, index).manifest  # a twin of this job was faster
        except (FileNotFoundError, DamagedFile) as e:
            raise RunBusy(f"another job is publishing shard {index} of {sample_set.path} ({e})") from None


def _batch_sampler(
    request: Request,
    eps_model: EpsModel,
    schedule: Any,
    image_shape: tuple[int, int, int],
    variance: str,
    num_classes: int,
    device: torch.device | str,
    stop_requested: StopRequested,
) -> Callable[[int, int], _Part]:
    """A function (first, num <= batch) -> the images of samples first … first+num-1, in order."""
    import torch

    from ddpm import rng, samplers

    if request.sampler not in samplers.SAMPLERS:
        raise RequestError(f"sampler = {request.sampler!r}: use one of {', '.join(samplers.SAMPLERS)}")
    sampler = samplers.SAMPLERS[request.sampler]
    initial_key, step_key = rng.key(request.seed, "x_T"), rng.key(request.seed, "sampler")

    def poll(step: samplers.SamplerStep | None = None) -> None:
        finished = step is not None and step.index + 1 == step.num_steps  # keep that batch, stop before the next
        if not finished and (reason := stop_requested()):
            raise Stopped(reason)

    def compute(first: int, num: int) -> _Part:
        poll()
        index = torch.arange(first, first + num, device=device)
        row = index % request.batch

        def in_rows(values: Tensor) -> Tensor:
            """Values of the samples (num, ...) at their rows (batch, ...); unused rows are zeros."""
            return values.new_zeros(request.batch, *values.shape[1:]).index_copy_(0, row, values)

        labels = in_rows(index % num_classes) if num_classes else None
        with torch.inference_mode():
            result = sampler(
                lambda x_t, t: eps_model(x_t, t, labels),
                schedule,
                in_rows(rng.normal(initial_key, index, 0, image_shape)),
                noise=lambda t: in_rows(rng.normal(step_key, index, t, image_shape)),
                steps=request.steps,
                eta=request.eta,
                variance=variance,
                callback=poll,
            )
            x_0 = result.x_0[row]
            if not torch.isfinite(x_0).all():
                raise DoNotRetry(
                    f"samples {first} to {first + num - 1} are not finite: the {request.weights} weights of step "
                    f"{request.checkpoint.step} diverged, or {request.precision} is too narrow for them; choose "
                    f"another --step, or sample.precision=fp32"
                )
            images = ((x_0.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
            return _Part(images.permute(0, 2, 3, 1).contiguous().cpu().numpy(), int(result.nfe))

    return compute
