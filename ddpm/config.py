"""The config of a run: typed, frozen, from YAML and `key=value`, validated once, with a digest of its mathematics.

Names are public. Every field has a default and a documented unit. Knows no scheduler and no
resources: what depends on the number of ranks is checked where they are known (`check_world_size`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ddpm.errors import RequestError
from ddpm.rundir import check_name, sha256_json


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Ints = Annotated[tuple[int, ...], BeforeValidator(_listed)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    name: Literal["cifar10", "images", "digits"] = "cifar10"
    """`cifar10` (torchvision downloads it), `images` (a folder or zip of class folders), `digits` (scikit-learn's)."""
    path: str | None = None
    """Where it lies: a folder or .zip for `images`; for `cifar10` torchvision's root, or a folder or .zip of images."""
    image_size: int = Field(32, ge=4, le=1024)
    """Height and width in pixels; other sizes are centre-cropped to a square and resized (Lanczos, antialiased)."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""

    @model_validator(mode="after")
    def _images_need_a_path(self) -> Data:
        if self.name == "images" and self.path is None:
            raise ValueError("data.path is needed for data.name=images: a folder or a .zip of images in class folders")
        return self


class Model(Section):
    base_channels: int = Field(128, ge=8)
    """Width of the first level."""
    channel_mults: Ints = (1, 2, 2, 2)
    """Width of each level as a multiple of base_channels; each further level halves the resolution."""
    blocks_per_level: int = Field(2, ge=1)
    block: Literal["residual"] = "residual"
    attention_resolutions: Ints = (16,)
    """Feature-map sizes in pixels that get self-attention."""
    attention_heads: int = Field(1, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    num_classes: int = Field(0, ge=0)
    """0: unconditional. Otherwise each image's class index conditions every block."""

    @model_validator(mode="after")
    def _mults(self) -> Model:
        if not self.channel_mults or min(self.channel_mults) < 1:
            raise ValueError(f"model.channel_mults = {list(self.channel_mults)}: needs one factor >= 1 per level")
        return self


class Diffusion(Section):
    timesteps: int = Field(1000, ge=2)
    """T; t runs 0 … T-1."""
    schedule: Literal["linear"] = "linear"
    beta_start: float = Field(1.0e-4, gt=0, lt=1)
    """At T = 1000; scaled by 1000/T."""
    beta_end: float = Field(0.02, gt=0, lt=1)
    """At T = 1000; scaled by 1000/T."""
    prediction: Literal["eps"] = "eps"
    loss: Literal["l2"] = "l2"
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """Of the ancestral sampler's reverse steps: beta_t, or the posterior's."""

    @model_validator(mode="after")
    def _betas(self) -> Diffusion:
        if self.beta_start >= self.beta_end:
            raise ValueError(f"diffusion.beta_start = {self.beta_start}: must be below beta_end = {self.beta_end}")
        if self.beta_end * 1000 / self.timesteps >= 1:
            least = int(self.beta_end * 1000) + 1
            raise ValueError(
                f"diffusion.timesteps = {self.timesteps}: beta_end is scaled by 1000/T and reaches 1; "
                f"use at least {least}"
            )
        return self


class Train(Section):
    total_steps: int = Field(800_000, ge=1)
    """Optimizer steps. A finished run may be extended by submitting it again with more."""
    global_batch: int = Field(128, ge=1)
    """Images a step over all ranks: the unit of training."""
    micro_batch: int | None = Field(None, ge=1)
    """Images that one rank holds at a time; gradients are accumulated over the rest. null: all of the rank's share."""
    optimizer: Literal["adam"] = "adam"
    lr: float = Field(2.0e-4, gt=0)
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
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    deterministic: Literal["auto"] | bool = "auto"
    """Bit-identical resume. auto: on a CPU (free there); on a GPU ask for it."""
    max_rollbacks: int = Field(3, ge=0)
    """Times a non-finite loss may send the run back to its last good checkpoint."""

    @model_validator(mode="after")
    def _micro(self) -> Train:
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch = {self.micro_batch} does not divide train.global_batch = "
                f"{self.global_batch}; these do: {divisors(self.global_batch)}"
            )
        if self.lr_schedule == "cosine" and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"train.warmup_steps = {self.warmup_steps}: must be below train.total_steps = "
                f"{self.total_steps} with lr_schedule=cosine"
            )
        return self


class Checkpoint(Section):
    every_min: float | None = Field(10.0, gt=0)
    """Minutes between saves; null: only by steps."""
    every_steps: int | None = Field(None, ge=1)
    keep_last: int = Field(3, ge=1)
    milestone_every_steps: int | None = Field(50_000, ge=1)
    """These are kept for good, with their EMA weights as safetensors."""
    milestone_every_epochs: int | None = Field(None, ge=1)


class Log(Section):
    every_steps: int = Field(100, ge=1)
    grid_every_steps: int | None = Field(10_000, ge=1)
    """Steps between sample grids; null: only at the end."""
    grid_images: int = Field(64, ge=1, le=1024)


class Sample(Section):
    num_samples: int = Field(50_000, ge=1)
    sampler: Literal["ancestral", "ddim"] = "ddim"
    steps: int = Field(100, ge=1)
    """Sampler steps, at most diffusion.timesteps."""
    eta: float = Field(0.0, ge=0, le=1)
    """DDIM's noise: 0 deterministic, 1 close to ancestral."""
    batch: int = Field(500, ge=1)
    """Images per network call; every call has exactly this many rows, so that sharding changes no byte."""
    shards: int = Field(64, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""


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
    def _across_sections(self) -> Config:
        size, levels = self.data.image_size, len(self.model.channel_mults)
        if size % 2 ** (levels - 1):
            raise ValueError(
                f"data.image_size = {size}: {levels} levels halve it {levels - 1} times, so it must be "
                f"divisible by {2 ** (levels - 1)}"
            )
        resolutions = [size // 2**i for i in range(levels)]
        for r in self.model.attention_resolutions:
            if r not in resolutions:
                raise ValueError(
                    f"model.attention_resolutions = {list(self.model.attention_resolutions)}: the network "
                    f"never has {r}x{r}; it has {resolutions}"
                )
        heads = self.model.attention_heads
        for r, mult in zip(resolutions, self.model.channel_mults, strict=True):
            channels = self.model.base_channels * mult
            if (r in self.model.attention_resolutions or r == resolutions[-1]) and channels % heads:
                raise ValueError(f"model.attention_heads = {heads} does not divide the {channels} channels at {r}x{r}")
        if self.sample.steps > self.diffusion.timesteps:
            raise ValueError(
                f"sample.steps = {self.sample.steps}: at most diffusion.timesteps = {self.diffusion.timesteps}"
            )
        if self.sample.shards > self.sample.num_samples:
            raise ValueError(
                f"sample.shards = {self.sample.shards}: at most sample.num_samples = {self.sample.num_samples}"
            )
        check_name(self.name)
        return self

    def digest(self) -> str:
        """sha256 of what changes the mathematics of training.

        Left out: length, resources (micro_batch, compile), checkpoint intervals, logging, sampling, scoring, and where
        the data lies (its pixels have a digest of their own, kept in run.json).
        """
        record = self.model_dump(mode="json", include={"seed", "data", "model", "diffusion", "train"})
        del record["data"]["path"]
        for key in ("total_steps", "micro_batch", "compile", "deterministic", "max_rollbacks"):
            del record["train"][key]
        if self.train.lr_schedule == "cosine":
            record["train"]["total_steps"] = self.train.total_steps  # the learning rate depends on it
        return sha256_json(record)

    def to_yaml(self) -> str:
        return yaml.dump(
            self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120
        )


# ---------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, `off` and `no` are words, a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|nan))$"
    ),
    [*"-+0123456789."],
)
_Loader.add_implicit_resolver(*_FLOAT)


class _Dumper(yaml.SafeDumper):
    """Quotes what other readers of YAML, or ours, would not take for a word: a run may be named 1e-4."""


_Dumper.add_implicit_resolver(*_FLOAT)


def load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise RequestError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from None


def field_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a config section, e.g. train.lr."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += field_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


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
    """Put one `section.key=value` into `tree`; the value is read as YAML."""
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
    node[leaf] = load_yaml(text, override)


def unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.6)
    leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    section = key.rsplit(".", 1)[0] + "." if "." in key else ""
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key!r} is a section; give one of its keys: {', '.join(inside)}"
    if near or leaf:
        return f"unknown key {key!r}; did you mean {(near or leaf)[0]!r}?"
    siblings = [k for k in known if k.startswith(section)] if section else []
    return f"unknown key {key!r}; known: {', '.join(siblings or known)}"


def build(kind: type[Any], tree: Mapping[str, Any], where: str) -> Any:
    """Validate `tree` as `kind`; one RequestError with a line per problem."""
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as e:
        lines = {problem(kind, dict(err)): None for err in e.errors()}
        raise RequestError(f"{where}: " + "\n  ".join(lines)) from None


def problem(kind: type[BaseModel], err: dict[str, Any]) -> str:
    """One validation error as `key = value: what is allowed`."""
    loc = [str(p) for p in err["loc"] if not str(p).startswith(("function-", "literal[", "constrained-"))]
    known = field_keys(kind)
    key = ".".join(loc)
    while loc and ".".join(loc) not in known and err["type"] != "extra_forbidden" and len(loc) > 1:
        loc.pop()  # union branches and list positions follow the key
        key = ".".join(loc) if ".".join(loc) in known else key
    if err["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(key, known)
    message = str(err["msg"]).removeprefix("Value error, ")
    if err["type"] == "value_error":
        return message if not loc or loc[-1] in message else f"{key} = {message}"
    if err["type"] == "model_type":
        return f"{key} = {err['input']!r}: expected a section of keys; leave it out for the defaults"
    if err["type"] == "tuple_type":
        message = "input should be a list, such as [1, 2]"
    section: Any = kind
    for part in key.split(".")[:-1]:
        section = section.model_fields[part].annotation if part in section.model_fields else section
    field = section.model_fields.get(key.split(".")[-1]) if hasattr(section, "model_fields") else None
    allowed = f" (default {field.default!r})" if field is not None else ""
    return f"{key} = {err['input']!r}: {message[0].lower()}{message[1:]}{allowed}"


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
