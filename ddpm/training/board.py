"""What TensorBoard shows of a run: its scalars and grids under their tags, and in each file the config and hparams.

All of it goes into the run's own event files, so that TensorBoard shows nothing of it under other runs. Must not know:
when it is written, and what a failed write means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ddpm.config.schema import Config
from ddpm.run.files import seconds

if TYPE_CHECKING:
    import numpy as np

TAGS = {
    **{key: f"train/{key}" for key in ("loss", "grad_norm", "lr", "images_per_s", "gpu_memory_gib", "mfu")},
    "validation_loss": "loss/validation",
}
"""What TensorBoard calls the keys of a line of metrics.jsonl; a key that is not here is train/KEY."""
PLACES = ("step", "images", "epoch", "time")
"""Keys that say where a line belongs."""
HPARAMS = ("data", "model", "diffusion", "train")
"""Sections of the config that are shown as hparams: they decide what is trained."""


def add_scalars(board: Any, record: dict[str, Any]) -> None:
    """A line of metrics.jsonl, at the time it was written."""
    for tag, value in scalars(record).items():
        board.add_scalar(tag, value, record["step"], walltime=seconds(record["time"]))


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """Tag -> value of all figures of a line of metrics.jsonl."""
    figures = {key: value for key, value in record.items() if key not in PLACES and type(value) in (int, float)}
    return {TAGS.get(key, f"train/{key}"): value for key, value in figures.items()}


def add_grid(board: Any, step: int, grid: np.ndarray) -> None:
    board.add_image("samples", grid, step, dataformats="HWC")


def add_histograms(board: Any, step: int, values: Mapping[str, np.ndarray]) -> None:
    for name, of_part in values.items():
        if of_part.size:
            board.add_histogram(f"gradients/{name}", of_part, step)


def introduce(board: Any, config: Config, step: int) -> None:
    """Write the config as text, at the step where this event file begins, and as hparams, whose metrics are the
    scalars."""
    from torch.utils.tensorboard import summary

    text = "".join(f"    {line}\n" for line in config.to_yaml().splitlines())
    board.add_text("config", text, step)
    # only the second of torch's three summaries: without the others TensorBoard finds columns and metrics in all runs
    _, session, _ = summary.hparams(hparams(config), {})
    board.file_writer.add_summary(session)


def hparams(config: Config) -> dict[str, Any]:
    """SECTION.KEY -> value of the keys that decide what is trained, without empty ones. Lists are JSON text, and so are
    true and false, which TensorBoard would show as 1.0000 and 0.0000."""
    tree = config.model_dump(mode="json", include={*HPARAMS})
    flat = {"seed": config.seed, **{f"{name}.{key}": v for name in HPARAMS for key, v in tree[name].items()}}
    said = {key: v for key, v in flat.items() if v not in (None, [], {})}
    as_they_are = (str, int, float)
    return {key: v if type(v) in as_they_are else json.dumps(v) for key, v in said.items()}
