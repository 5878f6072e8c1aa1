"""Shows a score in TensorBoard and in W&B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ddpm.config.schema import Config
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from ddpm.scoring.record import curve_of, key_of
from ddpm.training.mirror import Mirror
from launch.cluster import environment


def mirror_of(run: RunDir, config: Config, held: Callable[[], AbstractContextManager[None]] = nullcontext) -> Mirror:
    """The run's W&B mirror, offline unless the user's own variables say otherwise, since nodes seldom have a
    network."""
    environment.set_defaults(WANDB_MODE="offline")
    return Mirror(run, config, held)


def show_score(run: RunDir, config: Config, record: Mapping[str, Any]) -> None:
    """Show a score at its checkpoint's step. It goes to a folder of its own: TensorBoard only follows the newest file
    of a folder, which may be that of a training at work."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        where = run.tensorboard / "scores"
        where.mkdir(parents=run.path.is_dir(), exist_ok=True)  # never the run itself, which may have been moved away
        with SummaryWriter(str(where)) as board:
            board.add_scalar(curve_of(record), record[key_of(record)], record["checkpoint"]["step"])
    except OSError as e:  # another's run, or a full disk
        say("not shown in TensorBoard", error=e)
    mirror = mirror_of(run, config)
    mirror.show({curve_of(record): record[key_of(record)]}, record["checkpoint"]["step"])
    mirror.close()
