"""The config's `train`, `checkpoint` and `log`: length, batches and optimizer; what is saved; what is logged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ddpm.config.section import Section
from ddpm.errors import shown

WITHOUT_LENGTH = ("constant",)
"""Learning rates that do not depend on the length: with any other the length is part of the mathematics."""
LENGTHS = ("total_steps", "total_images", "total_epochs")
"""Keys of `train` for its length; a config sets exactly one."""


class Train(Section):
    if TYPE_CHECKING:
        total_steps: int = 800_000  # what trains or queues has passed resolve_length, after which it is never None
    else:
        total_steps: int | None = Field(800_000, ge=1)
        """Optimizer steps. A finished run may be extended by submitting it again with more."""
    total_images: int | None = Field(None, ge=1)
    """Length in training images, instead of steps."""
    total_epochs: int | None = Field(None, ge=1)
    """Length in passes over the data, instead of steps. `Config.resolve_length` turns both into total_steps, rounding
    up."""
    global_batch: int = Field(128, ge=1, le=2**24)
    """Images per step, over all ranks."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Images that a rank computes at a time; gradients are accumulated over its share of the batch. null: the whole
    share; auto: as many as fit the GPU, found when the run first starts."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Both with PyTorch's betas and epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """`adamw` alone: each step subtracts weight_decay * lr * weight."""
    lr: float = Field(2.0e-4, gt=0)
    """The learning rate after warm-up."""
    warmup_steps: int = Field(5000, ge=0)
    """The learning rate rises linearly from 0 over these steps."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: stay, or fall to 0 at total_steps along a half cosine."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest L2 norm of the gradient of all weights together; null: no clipping."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast. auto: bf16 on a GPU that has it, fp16 (with loss scaling) on an older one, off on a CPU."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile. auto: only on a GPU that cannot use the project's own kernels, which are faster, and if it can
    build something there; true: instead of them."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an image is trained without its label; classifier-free guidance needs more than 0."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the averaged weights that an update keeps."""
    ema_start_step: int = Field(0, ge=0)
    """Before this step the average is a copy of the weights."""
    ema_every_steps: int = Field(1, ge=1)
    """The average is updated at steps divisible by this."""
    ema_warmup: bool = False
    """The n-th update keeps min(ema_decay, (1 + n) / (10 + n)) instead of ema_decay."""
    early_stop_below: float | None = Field(None, gt=0)
    """Stop when the mean absolute change between the last early_stop_window logged losses is below this; null:
    never."""
    early_stop_window: int = Field(10, ge=2)
    """Number of logged losses (one every log.every_steps) that early stopping looks at."""
    deterministic: Literal["auto"] | bool = "auto"
    """Bit-identical resume. auto: true on a CPU, where it is free, and on a GPU where this project's kernels serve,
    where it costs 2 %; else false."""
    max_rollbacks: int = Field(3, ge=0)
    """How often a non-finite loss may send the run back to its last good checkpoint."""

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
        if isinstance(self.micro_batch, int) and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch = {self.micro_batch} does not divide train.global_batch = "
                f"{self.global_batch}; these do: {divisors(self.global_batch)}"
            )
        return self

    @model_validator(mode="after")
    def _learning(self) -> Train:
        known = self.total_steps is not None
        if known and self.lr_schedule not in WITHOUT_LENGTH and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"train.warmup_steps = {self.warmup_steps}: must be below train.total_steps = "
                f"{self.total_steps} with lr_schedule={self.lr_schedule}; for a short run give "
                f"train.warmup_steps={self.total_steps // 10}"
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
    """Steps between saves, in addition to every_min; null: only by minutes."""
    keep_last: int = Field(3, ge=1)
    """Number of newest checkpoints that are kept, besides the milestones."""
    milestone_every_steps: int | None = Field(50_000, ge=1)
    """Steps between milestones: checkpoints that are kept for good, with their EMA weights as safetensors. null:
    none."""
    milestone_every_epochs: int | None = Field(None, ge=1)
    """The same in passes over the data."""


class Log(Section):
    every_steps: int = Field(100, ge=1)
    """Steps between lines of metrics."""
    grid_every_steps: int | None = Field(10_000, ge=1)
    """Steps between sample grids; null: only at the end."""
    grid_images: int = Field(64, ge=1, le=1024)
    """Samples in a grid."""
    validate_every_steps: int | None = Field(None, ge=1)
    """Steps between losses on images of the test split, at the same timesteps and noise each time, with the weights
    that `sample.weights` names; also at the end. Must be a multiple of every_steps; null: none."""
    histogram_every_steps: int | None = Field(None, ge=1)
    """Steps between histograms of the gradients in TensorBoard, each of another forward and backward pass of rank 0;
    null: none."""
    wandb: str | None = None
    """Weights & Biases project that also gets metrics and scores, offline unless WANDB_MODE says otherwise."""

    @field_validator("wandb")
    @classmethod
    def _project(cls, project: str | None) -> str | None:
        if project is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}", project):
            raise ValueError(
                f"{shown(project)}: a project's name has 1 to 128 letters, digits, spaces and . _ -, a letter or digit "
                f"first; ENTITY/PROJECT is not taken, WANDB_ENTITY in the environment names the entity"
            )
        return project

    @model_validator(mode="after")
    def _validation(self) -> Log:
        every, lines = self.validate_every_steps, self.every_steps
        if every is not None and every % lines:
            raise ValueError(
                f"log.validate_every_steps = {every}: it stands in lines of metrics, so that it must be a multiple of "
                f"log.every_steps = {lines}; {max(1, round(every / lines)) * lines} is one"
            )
        return self


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
