"""Whether training is finished: the one place that answers."""

from __future__ import annotations

from ddpm.config import Config
from ddpm.rundir import DamagedFile, RunDir, read_signed


def finished_step(run: RunDir, config: Config) -> int | None:
    """The step at which training has ended, by its end or early; None where it has not.

    The manifest of the last step is published last of all.
    """
    try:
        step = run.latest_step()
        manifest = read_signed(run.manifest(step))
        whole = manifest["bytes"] == run.checkpoint(step).stat().st_size
    except (DamagedFile, OSError):
        return None
    settled_at, bound = manifest.get("early_stopped"), config.train.early_stop_below
    settled = settled_at is not None and bound is not None and settled_at < bound
    # without its EMA weights it was saved as one of many, and has only later become the last
    done = whole and (step >= config.train.total_steps or settled) and run.ema_weights(step).exists()
    return step if done else None
