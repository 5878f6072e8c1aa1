"""A score where people watch training: in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm.run.log import say
from ddpm.run.paths import RunDir
from ddpm.scoring.record import curve_of, key_of


def show_score(run: RunDir, record: Mapping[str, Any]) -> None:
    """At its checkpoint's step. In a folder beside the files of a training that may be at work: TensorBoard reads on in
    the newest file of a folder alone."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        where = run.tensorboard / "scores"
        where.mkdir(parents=run.path.is_dir(), exist_ok=True)  # never the run itself, which may have been moved away
        with SummaryWriter(str(where)) as board:
            board.add_scalar(curve_of(record), record[key_of(record)], record["checkpoint"]["step"])
    except OSError as e:  # another's run, or a full disk
        say("not shown in TensorBoard", error=e)
