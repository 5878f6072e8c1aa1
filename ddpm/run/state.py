"""Whether training is finished: the one place that answers.

The answer is in the manifest of the last step: its step and, if training ended early, the mean change of the loss at
which it settled. Training applies the same rule to what it is about to publish.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ddpm.run.files import DamagedFile
from ddpm.run.generations import read_manifest
from ddpm.run.paths import RunDir

if TYPE_CHECKING:
    from ddpm.config.schema import Config


def settled(losses: Sequence[float], config: Config) -> float | None:
    """The mean change of the last logged losses if it is so small that training ends early, else None.

    losses: oldest first; the config says how many of the last ones count.
    """
    bound, window = config.train.early_stop_below, config.train.early_stop_window
    last = losses[-window:]
    if bound is None or len(last) < window:
        return None
    changes = [abs(b - a) for a, b in pairwise(last)]
    mean = sum(changes) / len(changes)
    return mean if mean < bound else None


def is_last(step: int, settled_at: float | None, config: Config) -> bool:
    """Whether nothing is left to train after `step`; settled_at: what `settled` said there, under whatever bound."""
    bound = config.train.early_stop_below
    early = settled_at is not None and bound is not None and settled_at < bound
    return early or step >= config.train.total_steps


def finished_step(run: RunDir, config: Config) -> int | None:
    """The step at which training has ended, at its full length or early; None if it has not ended.

    Raises OSError if the file system fails for a moment: a wrong answer could end jobs for good.
    """
    try:
        step = run.latest_step()
        manifest = read_manifest(run, step)
        whole = manifest.get("bytes") == run.checkpoint(step).stat().st_size
    except (DamagedFile, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        return None
    # without its EMA weights it was saved as one of many, and has only later become the last
    done = whole and is_last(step, manifest.get("early_stopped"), config) and run.ema_weights(step).exists()
    return step if done else None
