"""The config of a run: its sections, what must hold between them, and a digest of its mathematics.

Names are public. Every field has a default and a documented unit. Knows no scheduler and no resources: what depends on
the number of ranks is checked where they are known (`check_world_size`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import Field, model_validator

from ddpm.config.data import Data
from ddpm.config.diffusion import Diffusion
from ddpm.config.model import Model
from ddpm.config.sample import Evaluate, Sample
from ddpm.config.section import Section, build
from ddpm.config.train import LENGTHS, WITHOUT_LENGTH, Checkpoint, Log, Train, divisors
from ddpm.config.unet_shape import Structure
from ddpm.config.yaml import dump_yaml
from ddpm.errors import RequestError
from ddpm.run.files import sha256_json
from ddpm.run.log import counted
from ddpm.run.paths import check_name

UNLEARNED = ("micro_batch", "compile", "deterministic", "max_rollbacks", "early_stop_below", "early_stop_window")
"""Keys of `train` that change no step's mathematics: they are not in the digest."""
OF_BITS = ("train.micro_batch", "train.compile", "train.deterministic")
"""The keys among these that change the bits of a step."""
FIRST = {
    "data": ("name", "image_size", "flip"),
    "model": (
        *("base_channels", "channel_mults", "blocks_per_level", "block", "attention_resolutions", "attention_heads"),
        *("dropout", "num_classes"),
    ),
    "diffusion": ("timesteps", "schedule", "beta_start", "beta_end", "prediction", "loss", "variance"),
    "train": ("global_batch", "optimizer", "lr", "warmup_steps", "lr_schedule", "grad_clip", "amp", "ema_decay"),
}
"""Keys of the first runs. The digest leaves any later key out at its default, so that runs from before it keep
theirs: the default of a new key must mean what was done without it."""
NUM_CIFAR10_CLASSES = 10
STALE_AVERAGE = 0.25
"""Share of the weights that an average began with, above which it is hardly of the trained ones."""


class Config(Section):
    all_keys = "--dry-run prints all of them"
    name: str = "run"
    """Name of the run directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """All randomness of training is derived from it."""
    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()

    @property
    def network(self) -> Structure:
        return self._structure(null_label=self.train.label_dropout > 0)

    def _structure(self, **more: Any) -> Structure:
        own = {field.name for field in fields(Structure)}  # a key of another network's is none of the U-Net's
        return Structure(image_size=self.data.image_size, **self.model.model_dump(include=own), **more)

    @model_validator(mode="after")
    def _a_network(self) -> Config:
        check_name(self.name)
        try:
            self._structure()
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
        """This config with its length in total_steps, converted from images or from epochs of `num_images` images.

        RequestError if the length makes it invalid: a cosine needs more steps than the warm-up has.
        """
        train = self.train
        if train.total_steps is not None:
            return self
        images = train.total_images or (train.total_epochs or 0) * num_images
        tree = self.model_dump()
        tree["train"] |= dict.fromkeys(LENGTHS) | {"total_steps": -(-images // train.global_batch)}
        resolved: Config = build(Config, tree, f"a length of {counted(images, 'image')}")
        return resolved

    def warnings(self) -> list[str]:
        """A line for each setting that is allowed but hardly intended: `key = value: what it does`."""
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
        kept = 0.0 if train.ema_warmup or self.sample.weights != "ema" else train.ema_decay ** self._num_averages()
        if kept > STALE_AVERAGE:
            told.append(
                f"train.ema_decay = {train.ema_decay}: after train.total_steps = {train.total_steps} the average, with "
                f"which samples are made, is still {kept:.0%} of the weights that it began with; for a short run give "
                f"train.ema_warmup=true"
            )
        return told

    def _num_averages(self) -> float:
        """How often the average of the weights moves; for ever where the length is not known yet."""
        train = self.train
        if train.total_steps is None:
            return math.inf
        return train.total_steps // train.ema_every_steps - max(train.ema_start_step - 1, 0) // train.ema_every_steps

    def mathematics(self) -> dict[str, Any]:
        """Keys that change the mathematics of training, by section; keys that are not in FIRST only if they
        differ from their default.

        Left out: length, early stopping, resources (micro_batch, compile), checkpoint intervals, logging, sampling,
        scoring, and where the data lies and how its pictures are read (run.json keeps a digest of the resulting
        pixels).
        """
        record = self.model_dump(mode="json", include={"seed", "data", "model", "diffusion", "train"})
        for key in ("path", "background", "skip_damaged"):
            del record["data"][key]
        length = {key: record["train"].pop(key) for key in LENGTHS}
        for key in UNLEARNED:
            del record["train"][key]
        defaults = type(self)().model_dump(mode="json")
        for section, first in FIRST.items():
            for key in record[section].keys() - set(first):
                if record[section][key] == defaults[section][key]:
                    del record[section][key]
        if self.train.lr_schedule not in WITHOUT_LENGTH:
            record["train"] |= {key: value for key, value in length.items() if value is not None}
        return record

    def digest(self) -> str:
        """sha256 of the mathematics."""
        return sha256_json(self.mathematics())

    def to_yaml(self, like: Mapping[str, Any] | None = None) -> str:
        """like: a config's keys, as written by other code: those that it has not are left out at their defaults, since
        that code would refuse them."""
        tree, defaults = self.model_dump(mode="json"), type(self)().model_dump(mode="json")
        if like is not None:
            tree = _without_new(tree, like, defaults)
        return dump_yaml(tree)


def _without_new(tree: Any, like: Any, defaults: Any) -> Any:
    if not all(isinstance(each, Mapping) for each in (tree, like, defaults)):
        return tree
    kept = (key for key in tree if key in like or tree[key] != defaults.get(key))
    return {key: _without_new(tree[key], like.get(key), defaults.get(key)) for key in kept}


def check_world_size(config: Config, world_size: int) -> int:
    """Accumulation steps per rank. RequestError, with what would fit, if the global batch cannot be divided so."""
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % world_size:
        raise RequestError(
            f"train.global_batch = {batch} does not divide over {counted(world_size, 'rank')}; it does over "
            f"{divisors(batch)}, or choose a multiple of {world_size} such as "
            f"{max(1, round(batch / world_size)) * world_size}"
        )
    share = batch // world_size
    if not isinstance(micro, int):
        return 1
    if share % micro:
        raise RequestError(
            f"train.micro_batch = {micro} does not divide each rank's share of {counted(share, 'image')} "
            f"(train.global_batch = {batch} over {counted(world_size, 'rank')}); these do: {divisors(share)}"
        )
    return share // micro
