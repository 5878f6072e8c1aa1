"""The config's `sample` and `evaluate`: what a sample set and its score are unless asked for otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, field_validator, model_validator

from ddpm.config.section import Ints, Section


class Kind(NamedTuple):
    """Which settings a sampler has."""

    usual_steps: int | None = None
    """Steps where none are given; None: all timesteps."""
    has_eta: bool = False
    """Whether `eta` sets its noise."""
    has_variance: bool = False
    """Whether `diffusion.variance` does."""


SAMPLERS = {"ancestral": Kind(has_variance=True), "ddim": Kind(100, has_eta=True), "dpmpp_2m": Kind(20)}
"""Sampler -> its settings; diffusion/samplers.py computes its steps."""
if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]


def kind_of(sampler: str) -> Kind:
    """The settings of a sampler, whose name need not be a known one."""
    return SAMPLERS.get(sampler, Kind())


def names_with(what: str) -> tuple[str, ...]:
    """Names of the samplers that have `what`: has_eta or has_variance."""
    return tuple(name for name, kind in SAMPLERS.items() if getattr(kind, what))


def _zero(value: float) -> float:
    """-0.0 becomes 0.0: equal values must give one digest."""
    return value + 0.0


MOST_SAMPLES, MOST_SHARDS = 10**9, 10**6
"""Largest numbers of samples and of shards in a set."""


class Sample(Section):
    num_samples: int = Field(50_000, ge=1, le=MOST_SAMPLES)
    """Images in the set."""
    sampler: SamplerName = "ddim"
    """`ancestral` (Ho et al.), `ddim` (Song et al.), `dpmpp_2m` (DPM-Solver++(2M), Lu et al.)."""
    steps: int = Field(100, ge=1)
    """Sampler steps, at most diffusion.timesteps."""
    eta: Annotated[float, AfterValidator(_zero)] = Field(0.0, ge=0, le=1)
    """`ddim` alone: its noise, from 0 (deterministic) to 1 (close to ancestral)."""
    guidance: Annotated[float, AfterValidator(_zero)] | None = Field(None, ge=0)
    """Weight w of classifier-free guidance: eps = (1 + w) eps(label) - w eps(no label), two evaluations a step; null:
    none. Needs a model trained with train.label_dropout."""
    class_plan: Ints | None = None
    """Number of images of each class, summing to num_samples; null: the classes in turn."""
    clip_x_0: bool = True
    """Clip every predicted x_0 to [-1, 1], where images lie."""
    batch: int = Field(500, ge=1, le=2**24)
    """Images per network call; every call has exactly this many rows, so that sharding changes no byte."""
    shards: int = Field(64, ge=1, le=MOST_SHARDS)
    """Number of parts of the set, which jobs make independently of each other."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Sample i is a function of this seed and i."""
    weights: Literal["ema", "model"] = "ema"
    """`ema`: the average of the weights; `model`: those of the checkpoint's step. Grids and ddpm.load use the same."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 if the run was trained in it, else fp32."""

    @model_validator(mode="after")
    def _noise(self) -> Sample:
        if self.eta and not SAMPLERS[self.sampler].has_eta:
            use = " or ".join(names_with("has_eta"))
            raise ValueError(f"sample.eta = {self.eta}: sampler={self.sampler} has none; leave it out, or use {use}")
        return self


EXTRACTORS = ("inception", "dinov2", "random-inception", "pixels")
WITHOUT_WEIGHTS = ("random-inception", "pixels")
FILE = "file:"
"""Prefix of the path of a user's own network."""


class Milestones(Section):
    num_samples: int = Field(5000, ge=2, le=10**9)
    """Images of each milestone; all else as in `sample`."""


class Evaluate(Section):
    extractor: str = "inception"
    """`inception`, `dinov2`, `file:PATH` (TorchScript, or an exported .pt2), or `random-inception` and `pixels`, which
    check the wiring and need no download. Only inception's distance is a FID."""
    reference: str = "train"
    """`train`, `test`, a pytorch-fid .npz, or images: a folder, zip, .npz or .npy."""
    milestones: Milestones | None = None
    """Sample and score each milestone while training goes on, in jobs of their own; null: no."""

    @field_validator("extractor")
    @classmethod
    def _known(cls, extractor: str) -> str:
        if extractor not in EXTRACTORS and not (extractor.startswith(FILE) and extractor != FILE):
            raise ValueError(f"{extractor!r}: use one of {', '.join(EXTRACTORS)}, or {FILE}PATH")
        return extractor
