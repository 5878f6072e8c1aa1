"""The request of a sample set: samples/SET/request.json, and how a config makes one.

Owns the request, its digest and the defaults of fields that it leaves out. Must not know how a sample is computed.
Loads no torch: publishing a request stays cheap on a login node.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ddpm.config.diffusion import VARIANCES
from ddpm.config.sample import MOST_SAMPLES, MOST_SHARDS, SAMPLERS, kind_of, names_with
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import files, paths
from ddpm.run.files import DamagedFile
from ddpm.run.paths import Made, RunDir, SampleSet
from ddpm.run.records import read_run


class OfOtherCode(DamagedFile):
    """A whole request for what this code does not know, as a sampler that other code has."""


@dataclass(frozen=True)
class CheckpointRef:
    """The checkpoint that samples are made from."""

    step: int
    sha256: str


@dataclass(frozen=True)
class Request:
    """Everything that the samples of a set depend on: the fields of request.json, except its digest.

    request.json has `clip_x_0` only if it is false, and `variance` only if it is not the config's, so that sets from
    before these fields keep their digests.
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
    """Number of samples of each class, all of class 0 first; None: the classes in turn."""
    clip_x_0: bool = True
    variance: str | None = None
    """Variance of the ancestral sampler, one of VARIANCES; None: the config's diffusion.variance."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "shards", "batch", "steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name, most in (("num_samples", MOST_SAMPLES), ("shards", MOST_SHARDS)):
            if getattr(self, name) > most:
                raise RequestError(f"{name} = {getattr(self, name)}: at most {most}")
        if self.shards > self.num_samples:
            raise RequestError(f"shards = {self.shards}: at most num_samples = {self.num_samples}")
        object.__setattr__(self, "eta", float(self.eta))  # 0 and 0.0 are one request and must have one digest
        if self.sampler not in SAMPLERS:
            raise RequestError(f"sampler = {self.sampler!r}: use one of {', '.join(SAMPLERS)}")
        kind = SAMPLERS[self.sampler]
        if self.eta and not kind.has_eta:
            those = ", ".join(names_with("has_eta"))
            raise RequestError(
                f"eta = {self.eta}: only {those} has it; with sampler = {self.sampler} leave it out, or 0"
            )
        if self.variance is not None:
            if self.variance not in VARIANCES:
                raise RequestError(f"variance = {self.variance!r}: use one of {', '.join(VARIANCES)}")
            if not kind.has_variance:
                those = ", ".join(names_with("has_variance"))
                raise RequestError(
                    f"variance = {self.variance}: only {those} has one; with sampler = {self.sampler} leave it out"
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
        return files.sha256_json(self._body())

    def to_record(self) -> dict[str, Any]:
        """The content of request.json."""
        return {**self._body(), "digest": self.digest}

    def _body(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in _LATER or v != _LATER[k]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """The request in request.json's content. Raises DamagedFile if its form or its digest does not hold."""
        body = {k: v for k, v in record.items() if k != "digest"}
        if files.sha256_json(body) != record.get("digest"):
            raise DamagedFile("its digest does not match its content")
        try:
            request = cls(**{**body, "checkpoint": CheckpointRef(**body["checkpoint"])})
        except RequestError as e:
            raise OfOtherCode(f"it asks for what this code does not know ({e})") from None
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise DamagedFile(f"this version cannot read it ({e})") from None
        if request.digest != record["digest"]:
            raise DamagedFile("it says what is left out of a request.json")
        return request


_LATER = {"clip_x_0": True, "variance": None}
"""Fields that came after the first sets, with their value in a request.json that does not have them."""


# ---------------------------------------------------------------- what a config asks for


def usual_steps(config: Config, sampler: str) -> int:
    """Steps of a sampler for which none are given: the config's if it is the config's sampler, else the sampler's usual
    number."""
    if sampler == config.sample.sampler:
        return config.sample.steps
    timesteps = config.diffusion.timesteps
    return min(kind_of(sampler).usual_steps or timesteps, timesteps)


def precision_of(config: Config, run: RunDir | None) -> str:
    """fp32 | bf16: the config's sample.precision; for `auto` bf16 if the run was trained in it, else fp32, so that it
    is the same on every machine. run: None for weights without a run."""
    if config.sample.precision != "auto":
        return config.sample.precision
    trained_in = ((read_run(run) if run else {}).get("resolved") or {}).get("amp")
    return "bf16" if trained_in == "bf16" else "fp32"


def from_config(config: Config, checkpoint: CheckpointRef, precision: str, variance: str | None = None) -> Request:
    """The request that `config.sample` makes for one checkpoint. variance: instead of the config's."""
    s = config.sample
    request = Request(
        checkpoint=checkpoint,
        weights=s.weights,
        sampler=s.sampler,
        steps=s.steps,
        eta=s.eta,
        guidance=s.guidance,
        seed=s.seed,
        num_samples=s.num_samples,
        shards=s.shards,
        batch=min(s.batch, s.num_samples),
        precision=precision,
        class_plan=s.class_plan,
        clip_x_0=s.clip_x_0,
        variance=variance,
    )
    return replace(request, variance=None) if variance == config.diffusion.variance else request


# ---------------------------------------------------------------- the request on disk


def publish_request(sample_set: SampleSet, request: Request) -> Request:
    """Publish `request` as the set's; a set that already has the same request stays as it is.

    Raises RequestError, naming every field that differs, if the set has another request.
    """
    if not sample_set.request.exists():
        paths.check_set_name(sample_set.name)
    sample_set.path.mkdir(parents=True, exist_ok=True)
    try:
        files.write_json(sample_set.request, request.to_record())
    except FileExistsError:
        check_same(sample_set, request)
    return request


def check_same(sample_set: SampleSet, request: Request) -> None:
    """Raise RequestError, naming every field that differs, if the set's request is another one."""
    there = read_request(sample_set)
    if there.digest != request.digest:
        raise RequestError(
            f"sample set {sample_set.name!r} exists with another request: {differences(there, request)}; "
            f"ask for the same, or start another set with --set OTHERNAME"
        )


def read_request(sample_set: SampleSet) -> Request:
    """The set's request. Raises RequestError if there is none or it is damaged, OSError if it cannot be read here, or
    for a moment."""
    try:
        record = files.parse_json(files.read_bytes(sample_set.request))
        return Request.from_record(record if isinstance(record, dict) else {})
    except FileNotFoundError:
        raise RequestError(f"{sample_set.request}: no such sample set") from None
    except OfOtherCode as e:
        raise RequestError(
            f"{sample_set.request}: {e}. The checkout that wrote it does: submit from there with --code new, or start "
            f"another set with --set OTHERNAME"
        ) from None
    except (DamagedFile, ValueError, IsADirectoryError) as e:
        there, why = shlex.quote(str(sample_set.request)), e.strerror if isinstance(e, OSError) else e
        raise RequestError(
            f"{sample_set.request} is damaged: {why}; nothing can be added to this set. Restore the file, or move it "
            f"away (mv {there} {there}.old) and ask for the same samples again, which writes it anew"
        ) from None


def samples_record(request: Request) -> dict[str, Any]:
    """What a score records of its samples: the whole request except how it is divided into shards and batches."""
    return {
        "num_samples": request.num_samples,
        "checkpoint": {**asdict(request.checkpoint), "weights": request.weights},
        "sampler": {
            "name": request.sampler,
            "steps": request.steps,
            "eta": request.eta,
            "guidance": request.guidance,
            **({} if request.clip_x_0 else {"clip_x_0": False}),
            **({} if request.variance is None else {"variance": request.variance}),
            **({} if request.class_plan is None else {"class_plan": list(request.class_plan)}),
        },
        "seed": request.seed,
        "precision": request.precision,
    }


def withdraw_request(made: Made) -> None:
    """Unpublish a request of which nothing was made yet, as if it had never been asked for."""
    made.request.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody has begun a shard
        made.path.rmdir()


def differences(there: Any, asked: Any) -> str:
    """The fields in which two requests of one kind differ, for a message."""

    def flat(request: Any) -> dict[str, Any]:
        record = asdict(request)
        checkpoint = record.pop("checkpoint")
        return {**{f"checkpoint.{k}": v for k, v in checkpoint.items()}, **record}

    old, new = flat(there), flat(asked)
    return ", ".join(f"{k} is {old[k]!r} there and {new[k]!r} asked for" for k in old if old[k] != new[k])


def shard_range(num_samples: int, shards: int, index: int) -> tuple[int, int]:
    """(first, num) of shard `index`, 0-based: contiguous, in order, sizes differing by at most one. Raises RequestError
    for shards that cannot be."""
    if not 1 <= shards <= num_samples:
        raise RequestError(f"shards = {shards}: must be from 1 to num_samples = {num_samples}")
    if not 0 <= index < shards:
        raise RequestError(f"shard {index}: must be from 0 to {shards - 1}")
    first, end = index * num_samples // shards, (index + 1) * num_samples // shards
    return first, end - first
