"""The recipes in configs/ as a table: what each one trains, for how long, what it needs, what was reported of it.

Owns: reading what the comment at the top of a config file says, in these words:

    Memory: 7.1 GiB     reports FID 3.17 [for 50,000 samples | at epoch 180]

The rest is in the config.
Must not know: torch, which would take seconds, so it does not estimate memory (tools/inspect_config.py does).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.network.made import other_than_the_unet
from ddpm.run.log import counted
from launch.terminal import streams

NOTES = (
    "memory: an estimate, in GiB, of training on one GPU: weights, gradients, Adam's moments, EMA, and the activations "
    "of the images that it holds at a time (the batch, or train.micro_batch), all in fp32 without compiling; bf16 and "
    "compiling need less, CUDA itself some more. For any config: python tools/inspect_config.py CONFIG",
    "reported FID: by the recipe's source, which the top of its file names.",
    "Train one: python launch/submit.py configs/RECIPE.yaml --partition gpu",
)
PIPE_COLUMNS = 120


@dataclass(frozen=True)
class Recipe:
    """A config and what its file's header says of it; None or "" where it says nothing."""

    name: str
    config: Config
    memory_gib: float | None
    fid: str


def header(text: str) -> str:
    """The comment that opens a config file, as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(filter(None, lines))


def read(path: Path) -> Recipe:
    """Raises RequestError where it is no valid config."""
    config = reading.load(path)
    text = header(path.read_text())
    memory = re.search(r"\bMemory: (\d+(?:\.\d+)?) GiB", text)
    fid = re.search(r"\breports? (?:(no) FID|FID (\d+(?:\.\d+)?(?: for [\d,]+ samples| at epoch \d+)?))", text)
    return Recipe(
        name=path.stem,
        config=config,
        memory_gib=float(memory[1]) if memory else None,
        fid=("none" if fid[1] else fid[2]) if fid else "",
    )


def print_table(shelf: Path) -> None:
    """The recipes in folder `shelf`. Raises RequestError naming a file that is no valid config.

    Nothing is cropped: in a narrow terminal the scores fold, and in one that is narrower still lines are too long.
    """
    from rich.console import Console
    from rich.table import Table

    names = ("recipe", "data", "params", "batch", "length", "memory", "reported FID")
    rows = [_row(read(path)) for path in sorted(shelf.glob("*.yaml"), key=lambda path: path.stem)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, name in enumerate(names[:-1]):
        width = max(len(row[i]) for row in (names, *rows))
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True, min_width=width)
    table.add_column(names[-1])
    for row in rows:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else PIPE_COLUMNS
    terminal = streams.drawing(sys.stdout, width=wide, highlight=False, markup=False)
    terminal.width = max(terminal.width, Console(width=1000).measure(table).minimum)
    terminal.print(table)
    for note in NOTES:
        terminal.print(f"\n{note}")


def _row(recipe: Recipe) -> tuple[str, ...]:
    config, size = recipe.config, recipe.config.data.image_size
    return (
        recipe.name,
        f"{config.data.name} {size}x{size}",
        "-" if other_than_the_unet() else f"{config.network.num_parameters / 1e6:.1f} M",
        str(config.train.global_batch),
        length(config),
        "-" if recipe.memory_gib is None else f"{recipe.memory_gib:g}",
        recipe.fid or "-",
    )


def length(config: Config) -> str:
    """How long the config trains, as it says it."""
    train = config.train
    for number, unit in ((train.total_epochs, "epochs"), (train.total_images, "images")):
        if number is not None:
            return f"{number:,} {unit}"
    return counted(train.total_steps, "step", ",")
