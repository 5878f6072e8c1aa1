"""The config of a run: typed, frozen, from YAML and `key=value`, validated once, with a digest of its mathematics.

Names are public. Every field has a default and a documented unit. Knows no scheduler and no
resources: what depends on the number of ranks is checked where they are known (`check_world_size`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ddpm.attributes import NAMES, unknown_name
from ddpm.config_file import build, dump_yaml, field_keys, load_yaml, unknown_key
from ddpm.errors import RequestError
from ddpm.rundir import check_name, sha256_json
from ddpm.structure import Structure

LENGTHS = ("total_steps", "total_images", "total_epochs")
"""Keys of `train`, of which one says how long it lasts."""
UNLEARNED = ("micro_batch", "compile", "deterministic", "max_rollbacks", "early_stop_below", "early_stop_window")
"""Keys of `train` that change no step."""
LATER = {
    "data": ("attributes", "label_attributes"),
    "model": ("attention_in", "middle_attention", "downsample", "upsample", "norm_groups", "time_embed_channels"),
    "diffusion": ("dns_offset",),
    "train": ("weight_decay", "label_dropout", "ema_start_step", "ema_every_steps", "ema_warmup"),
}
"""Keys that came after the first runs: the digest leaves them out at their defaults, so that those runs keep theirs."""
NEEDED_BY = {"dns_offset": ("dns",), "beta_start": ("linear", "dns"), "beta_end": ("linear", "dns")}
"""Keys of `diffusion` that not every schedule has a use for."""
LEAST_ALPHA_BAR = 2.0**-126
"""float32's smallest normal number: samplers divide by the root of alpha_bar."""
NUM_CIFAR10_CLASSES = 10


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Variance = Literal["fixed_large", "fixed_small"]
VARIANCES = get_args(Variance)
"""Of the ancestral sampler's reverse steps."""
Ints = Annotated[tuple[int, ...], BeforeValidator(_listed)]
Strs = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    name: Literal["cifar10", "celeba", "images", "digits"] = "cifar10"
    """`cifar10` and `celeba` (torchvision downloads them), `images` (a folder or zip of class folders), `digits`
    (scikit-learn's)."""
    path: str | None = None
    """Where it lies: a folder or .zip for `images`; for `cifar10` torchvision's root, or a folder or .zip of images;
    for `celeba` torchvision's root, or the folder that holds the images and their lists."""
    image_size: int = Field(32, ge=4, le=1024)
    """Height and width in pixels; other sizes are centre-cropped to a square and resized (Lanczos, antialiased)."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    attributes: dict[str, bool] = {}
    """`celeba` alone: keep the images that have (true) or lack (false) each of these, e.g. {Smiling: true}."""
    label_attributes: Strs = ()
    """`celeba` alone: bit i of the label says whether an image has the i-th; so num_classes = 2**their number."""

    @model_validator(mode="after")
    def _images_need_a_path(self) -> Data:
        if self.name == "images" and self.path is None:
            raise ValueError("data.path is needed for data.name=images: a folder or a .zip of images in class folders")
        return self

    @model_validator(mode="after")
    def _attributes_are_celebas(self) -> Data:
        labels = list(self.label_attributes)
        for key, value in (("attributes", self.attributes), ("label_attributes", labels)):
            if value and self.name != "celeba":
                raise ValueError(f"data.{key} = {value}: data.name={self.name} has none; leave it out, or use celeba")
        if len(set(labels)) < len(labels):
            raise ValueError(f"data.label_attributes = {labels}: name each attribute once")
        if wrong := unknown_name(self.attributes, labels, NAMES):
            raise ValueError(wrong)
        return self


class Model(Section):
    base_channels: int = Field(128, ge=8)
    """Width of the first level."""
    channel_mults: Ints = (1, 2, 2, 2)
    """Width of each level as a multiple of base_channels; each further level halves the resolution."""
    blocks_per_level: int = Field(2, ge=1)
    """Of the encoder; a level of the decoder has one more, so that each takes one of the encoder's outputs."""
    block: Literal["residual", "plain"] = "residual"
    """`residual` (Wide ResNet, as in the paper), or `plain`: twice convolution, GroupNorm, SiLU with no way around."""
    attention_resolutions: Ints = (16,)
    """Feature-map sizes in pixels that get self-attention."""
    attention_heads: int = Field(1, ge=1)
    """Of every attention; must divide its channels."""
    attention_in: Literal["both", "encoder", "decoder"] = "both"
    """Where attention_resolutions apply."""
    middle_attention: bool = True
    """Self-attention between the bottleneck's two blocks."""
    downsample: Literal["conv", "pool", "conv_asymmetric"] = "conv"
    """A 3x3 convolution of stride 2 with zeros all around, the mean of 2x2, or that convolution with zeros below and
    right alone: TensorFlow's "same" padding, which Ho et al.'s code and published weights have."""
    upsample: Literal["conv", "transpose"] = "conv"
    """Nearest neighbour and a 3x3 convolution, or a transposed convolution (2x2, stride 2)."""
    norm_groups: int | None = Field(None, ge=1)
    """GroupNorm's groups; must divide the channels of every level, and be fewer: a group for each channel takes away
    what t and class have added to it. null: 32, or the most that divide both and are fewer than the channels."""
    time_embed_channels: int | None = Field(None, ge=1)
    """Width of the embedding of t and class that blocks are given; the MLP that makes it has 4 * base_channels inside.
    null: 4 * base_channels too."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Before the second convolution of every block."""
    num_classes: int = Field(0, ge=0)
    """0: unconditional. Otherwise each image's class index conditions every block."""


class Diffusion(Section):
    timesteps: int = Field(1000, ge=2)
    """T; t runs 0 … T-1."""
    schedule: Literal["linear", "cosine", "dns"] = "linear"
    """`linear` (Ho et al.), `cosine` (Nichol & Dhariwal), or `dns`: the square of a line, see ddpm/schedule.py."""
    dns_offset: float = Field(5.0, gt=0)
    """Steps by which `dns` starts up its square; timesteps give the slow form."""
    beta_start: float = Field(1.0e-4, gt=0, lt=1)
    """At T = 1000; scaled by 1000/T."""
    beta_end: float = Field(0.02, gt=0, lt=1)
    """At T = 1000; scaled by 1000/T."""
    prediction: Literal["eps"] = "eps"
    """What the network is trained to tell: the noise."""
    loss: Literal["l2", "l1"] = "l2"
    """Mean squared, or mean absolute, error of the noise."""
    variance: Variance = "fixed_large"
    """Of the ancestral sampler's reverse steps: beta_t, or the posterior's."""

    @model_validator(mode="after")
    def _betas(self) -> Diffusion:
        if self.beta_start >= self.beta_end:
            raise ValueError(f"diffusion.beta_start = {self.beta_start}: must be below beta_end = {self.beta_end}")
        if self.schedule != "cosine" and self.beta_end * 1000 / self.timesteps >= 1:
            least = int(self.beta_end * 1000) + 1
            raise ValueError(
                f"diffusion.timesteps = {self.timesteps}: beta_end is scaled by 1000/T and reaches 1; "
                f"use at least {least}"
            )
        for key, schedules in NEEDED_BY.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.schedule not in schedules and value != default:
                raise ValueError(
                    f"diffusion.{key} = {value}: schedule={self.schedule} makes no use of it; leave it out (default "
                    f"{default}), or use {' or '.join(schedules)}"
                )
        if (last := self._log_alpha_bar()) < math.log(LEAST_ALPHA_BAR):
            raise ValueError(
                f"diffusion.beta_end = {self.beta_end}: alpha_bar falls to 1e{last / math.log(10):.0f} at t = "
                f"{self.timesteps - 1}, which float32 cannot hold (1e-38); use less (default 0.02)"
            )
        return self

    def _log_alpha_bar(self) -> float:
        """Of the last timestep; ddpm/schedule.py has it exactly, but needs torch."""
        if self.schedule == "cosine":  # which clips its betas
            return 0.0
        size, offset = self.timesteps, self.dns_offset
        dns = self.schedule == "dns"
        places = (((i + offset) / (size + 1 + offset)) ** 2 if dns else i / (size - 1) for i in range(size))
        low, high = self.beta_start * 1000 / size, self.beta_end * 1000 / size
        return sum(math.log1p(-(low + (high - low) * place)) for place in places)


class Train(Section):
    if TYPE_CHECKING:
        total_steps: int = 800_000  # what trains or queues has passed resolve_length, after which it is never None
    else:
        total_steps: int | None = Field(800_000, ge=1)
        """Optimizer steps. A finished run may be extended by submitting it again with more."""
    total_images: int | None = Field(None, ge=1)
    """The length in training images instead, …"""
    total_epochs: int | None = Field(None, ge=1)
    """… or in passes over the data: `Config.resolve_length` turns both into total_steps, rounding up."""
    global_batch: int = Field(128, ge=1)
    """Images a step over all ranks: the unit of training."""
    micro_batch: int | None = Field(None, ge=1)
    """Images that one rank holds at a time; gradients are accumulated over the rest. null: all of the rank's share."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Both with PyTorch's betas and epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """adamw's: the share of lr * weight that a step takes away."""
    lr: float = Field(2.0e-4, gt=0)
    """The learning rate after warm-up."""
    warmup_steps: int = Field(5000, ge=0)
    """The learning rate rises linearly from 0 over these steps."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: stay, or fall to 0 at total_steps along a half cosine."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest L2 norm of the whole gradient; null: no clipping."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast. auto: bf16 on a GPU that has it, fp16 (with loss scaling) on an older one, off on a CPU."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile. auto: on a GPU; it does not pay on a CPU."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a step trains an image without its label: what classifier-free guidance needs."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the average of the weights that an update keeps."""
    ema_start_step: int = Field(0, ge=0)
    """Before this step the average is a copy of the weights."""
    ema_every_steps: int = Field(1, ge=1)
    """The average is updated at the steps that this divides."""
    ema_warmup: bool = False
    """The n-th update keeps min(ema_decay, (1 + n) / (10 + n))."""
    early_stop_below: float | None = Field(None, gt=0)
    """Stop when the mean absolute change over the last early_stop_window logged losses is below this; null: never."""
    early_stop_window: int = Field(10, ge=2)
    """Logged losses (one each log.every_steps) that early stopping looks back on."""
    deterministic: Literal["auto"] | bool = "auto"
    """Bit-identical resume. auto: on a CPU (free there); on a GPU ask for it."""
    max_rollbacks: int = Field(3, ge=0)
    """Times a non-finite loss may send the run back to its last good checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        given = [f"train.{key} = {tree[key]!r}" for key in LENGTHS if tree.get(key) is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: only one of them says how long to train; remove the others")
        if not given and "total_steps" in tree:
            raise ValueError(f"train.total_steps = None: needs a length; give one of {', '.join(LENGTHS)}")
        return {**tree, "total_steps": tree.get("total_steps")} if given else tree

    @model_validator(mode="after")
    def _micro(self) -> Train:
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch = {self.micro_batch} does not divide train.global_batch = "
                f"{self.global_batch}; these do: {divisors(self.global_batch)}"
            )
        return self

    @model_validator(mode="after")
    def _learning(self) -> Train:
        known = self.total_steps is not None
        if known and self.lr_schedule == "cosine" and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"train.warmup_steps = {self.warmup_steps}: must be below train.total_steps = "
                f"{self.total_steps} with lr_schedule=cosine"
            )
        for key in ("ema_start_step", "ema_every_steps"):
            if known and getattr(self, key) > self.total_steps:
                raise ValueError(
                    f"train.{key} = {getattr(self, key)}: at most train.total_steps = {self.total_steps}, or there is "
                    f"no average of the weights; use less, or train longer"
                )
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError(
                f"train.weight_decay = {self.weight_decay}: train.optimizer=adam has none; use adamw, or leave it out"
            )
        return self


class Checkpoint(Section):
    every_min: float | None = Field(10.0, gt=0)
    """Minutes between saves; null: only by steps."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between saves, besides; null: only by minutes."""
    keep_last: int = Field(3, ge=1)
    """Checkpoints that are kept, besides the milestones."""
    milestone_every_steps: int | None = Field(50_000, ge=1)
    """These are kept for good, with their EMA weights as safetensors."""
    milestone_every_epochs: int | None = Field(None, ge=1)
    """The same, in passes over the data."""


class Log(Section):
    every_steps: int = Field(100, ge=1)
    """Steps between lines of metrics."""
    grid_every_steps: int | None = Field(10_000, ge=1)
    """Steps between sample grids; null: only at the end."""
    grid_images: int = Field(64, ge=1, le=1024)
    """Samples in a grid."""


class Sample(Section):
    num_samples: int = Field(50_000, ge=1)
    """Images in the set."""
    sampler: Literal["ancestral", "ddim", "dpmpp_2m"] = "ddim"
    """`ancestral` (Ho et al.), `ddim` (Song et al.), `dpmpp_2m` (DPM-Solver++(2M), Lu et al.)."""
    steps: int = Field(100, ge=1)
    """Sampler steps, at most diffusion.timesteps."""
    eta: float = Field(0.0, ge=0, le=1)
    """`ddim` alone: its noise; 0 deterministic, 1 close to ancestral."""
    guidance: float | None = Field(None, ge=0)
    """Weight w of classifier-free guidance: eps = (1 + w) eps(label) - w eps(no label), two evaluations a step; null:
    none. Needs a model trained with train.label_dropout."""
    class_plan: Ints | None = None
    """Images of each class, summing to num_samples; null: the classes in turn."""
    clip_x_0: bool = True
    """Clip every predicted x_0 to [-1, 1], where images lie."""
    batch: int = Field(500, ge=1)
    """Images per network call; every call has exactly this many rows, so that sharding changes no byte."""
    shards: int = Field(64, ge=1)
    """Parts that the set is made in, each a job of its own."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Sample i follows from it and from i."""
    weights: Literal["ema", "model"] = "ema"
    """Their average, or those of the last step; the grids of training and ddpm.load take the same."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the run was trained in it, else fp32."""

    @model_validator(mode="after")
    def _noise(self) -> Sample:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"sample.eta = {self.eta}: sampler={self.sampler} has none; leave it out, or use ddim")
        return self


class Evaluate(Section):
    extractor: Literal["inception", "random-inception", "pixels"] = "inception"
    """The last two check the wiring and need no download; their numbers are no FID."""
    reference: str = "train"
    """`train`, `test`, a pytorch-fid .npz, or a folder or zip of images."""


class Config(Section):
    name: str = "run"
    """Names the run directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """All randomness of training follows from it."""
    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _a_network(self) -> Config:
        check_name(self.name)
        try:
            Structure(image_size=self.data.image_size, **self.model.model_dump())
        except ValueError as e:
            raise ValueError(f"{'data' if str(e).startswith('image_size') else 'model'}.{e}") from None
        return self

    @model_validator(mode="after")
    def _classes(self) -> Config:
        classes, attributes = self.model.num_classes, list(self.data.label_attributes)
        if self.data.name == "celeba" and classes != (2 ** len(attributes) if attributes else 0):
            wanted = f"must be {2 ** len(attributes)}, two to the number of them" if attributes else "must be 0"
            raise ValueError(f"model.num_classes = {classes}: with data.label_attributes = {attributes} it {wanted}")
        if self.data.name == "cifar10" and self.data.path is None and classes not in (0, NUM_CIFAR10_CLASSES):
            raise ValueError(
                f"model.num_classes = {classes}: data.name=cifar10 has 10 classes (airplane, automobile, …); use 10, "
                f"or 0 for a model without classes"
            )
        if self.train.label_dropout and not classes:
            raise ValueError(
                f"train.label_dropout = {self.train.label_dropout}: there are no labels to drop; "
                f"give model.num_classes, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _sampling(self) -> Config:
        s, classes = self.sample, self.model.num_classes
        if s.steps > self.diffusion.timesteps:
            raise ValueError(f"sample.steps = {s.steps}: at most diffusion.timesteps = {self.diffusion.timesteps}")
        if s.shards > s.num_samples:
            raise ValueError(f"sample.shards = {s.shards}: at most sample.num_samples = {s.num_samples}")
        if s.guidance is not None and not (classes and self.train.label_dropout):
            raise ValueError(
                f"sample.guidance = {s.guidance}: needs a model of classes that was trained with labels dropped, and "
                f"model.num_classes = {classes}, train.label_dropout = {self.train.label_dropout}; leave it out (null)"
            )
        if s.class_plan is not None:
            plan = f"sample.class_plan = {list(s.class_plan)}"
            if len(s.class_plan) != classes or not classes:
                raise ValueError(f"{plan}: {len(s.class_plan)} counts for model.num_classes = {classes}; one per class")
            if min(s.class_plan) < 0 or sum(s.class_plan) != s.num_samples:
                raise ValueError(
                    f"{plan}: sums to {sum(s.class_plan)}; the counts must be 0 or more and sum to "
                    f"sample.num_samples = {s.num_samples}"
                )
        return self

    def resolve_length(self, num_images: int) -> Config:
        """This config with its length in total_steps alone, where it was in images or in epochs of `num_images`.

        RequestError where the length makes it invalid: a cosine needs more steps than the warm-up has.
        """
        train = self.train
        if train.total_steps is not None:
            return self
        images = train.total_images or (train.total_epochs or 0) * num_images
        tree = self.model_dump()
        tree["train"] |= dict.fromkeys(LENGTHS) | {"total_steps": -(-images // train.global_batch)}
        resolved = build(Config, tree, f"a length of {images} images")
        assert isinstance(resolved, Config)
        return resolved

    def warnings(self) -> list[str]:
        """What is allowed and hardly meant, a line each: `key = value: what it does`."""
        told, train, groups = [], self.train, self.model.norm_groups
        widths = [self.model.base_channels * mult for mult in self.model.channel_mults]
        if blind := [i for i, width in enumerate(widths) if width == groups]:
            told.append(
                f"model.norm_groups = {groups}: a group for each channel of level {', '.join(map(str, blind))}, whose "
                f"blocks therefore cannot heed t and class; use fewer"
            )
        if train.total_steps is not None and train.warmup_steps >= train.total_steps:
            told.append(
                f"train.warmup_steps = {train.warmup_steps}: train.total_steps = {train.total_steps} end before "
                f"train.lr = {train.lr} is reached; for a short run give train.warmup_steps={train.total_steps // 10}"
            )
        return told

    def digest(self) -> str:
        """sha256 of what changes the mathematics of training.

        Left out: length, early stopping, resources (micro_batch, compile), checkpoint intervals, logging, sampling,
        scoring, and where the data lies (its pixels have a digest of their own, kept in run.json).
        """
        record = self.model_dump(mode="json", include={"seed", "data", "model", "diffusion", "train"})
        del record["data"]["path"]
        length = {key: record["train"].pop(key) for key in LENGTHS}
        for key in UNLEARNED:
            del record["train"][key]
        defaults = type(self)().model_dump(mode="json")
        for section, keys in LATER.items():
            for key in keys:
                if record[section][key] == defaults[section][key]:
                    del record[section][key]
        if self.train.lr_schedule == "cosine":  # the learning rate depends on it
            record["train"] |= {key: value for key, value in length.items() if value is not None}
        return sha256_json(record)

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(mode="json"))


# ---------------------------------------------------------------- reading


def load(path: Path, overrides: Iterable[str] = (), *, shelf: Path | None = None) -> Config:
    """The config in YAML file `path` with `key=value` overrides. RequestError names key, value and what is allowed.

    shelf: where else a file may lie that was meant when `path` does not exist.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        known = {p.name: p for d in (shelf, path.parent) if d is not None for p in sorted(d.glob("*.yaml"))}
        near = difflib.get_close_matches(path.name, known, 1, 0.5)
        there = ", ".join(map(str, known.values())) or "none"
        hint = f"did you mean {known[near[0]]}?" if near else f"there are: {there}"
        raise RequestError(f"config file {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"config file {path} cannot be read: {e}") from None
    tree = load_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RequestError(f"{path}: expected keys and values at the top level, found {type(tree).__name__}")
    tree.setdefault("name", path.stem)
    for override in overrides:
        apply_override(tree, override)
    return build(Config, tree, str(path))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into `tree`; the value is read as YAML. One length of training replaces another."""
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise RequestError(f"{override!r} is not key=value; for example train.lr=1e-4")
    if key not in field_keys(Config):
        raise RequestError(unknown_key(key, field_keys(Config)))
    node = tree
    *sections, leaf = key.split(".")
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise RequestError(f"{section}: expected a section of keys, found {node!r}")
    value = load_yaml(text, override)
    if sections == ["train"] and leaf in LENGTHS and value is not None:
        for length in LENGTHS:
            node.pop(length, None)
    node[leaf] = value


# ---------------------------------------------------------------- batches


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def check_world_size(config: Config, world_size: int) -> int:
    """Accumulation steps per rank; RequestError listing what fits where the global batch does not divide."""
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % world_size:
        raise RequestError(
            f"train.global_batch = {batch} does not divide over {world_size} ranks; it does over "
            f"{divisors(batch)}, or choose a multiple of {world_size} such as "
            f"{max(1, round(batch / world_size)) * world_size}"
        )
    share = batch // world_size
    if micro is None:
        return 1
    if share % micro:
        raise RequestError(
            f"train.micro_batch = {micro} does not divide each rank's share of {share} images "
            f"(train.global_batch = {batch} over {world_size} ranks); these do: {divisors(share)}"
        )
    return share // micro
