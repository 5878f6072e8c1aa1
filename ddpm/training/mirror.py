"""Mirrors the metrics of a run to Weights & Biases: one W&B run for all lives, with the run's id.

metrics.jsonl is what counts: whatever goes wrong here is one line in the log, and the life goes on without W&B. Must
not know: whether there is a network, which wandb's own variables say.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ddpm.config.schema import Config
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from ddpm.run.records import usable
from ddpm.training.board import scalars


class Mirror:
    """Opens W&B with the first record. `held`: a context in which stop signals are blocked: wandb's service is started
    in it, and would otherwise die of them before it has written its data."""

    def __init__(
        self, run: RunDir, config: Config, held: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._run, self._config, self._held = run, config, held
        self._id = usable(run).get("run_id")
        self._there: Any = None
        self._works = config.log.wandb is not None and self._id is not None

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self.show(scalars(record), record["step"])

    def show(self, values: Mapping[str, float], step: int) -> None:
        """Send values, by name, at a step of training."""
        if self._works:
            self._try(lambda: self._opened().log({**values, "step": step}))

    def close(self) -> None:
        """Write all that was sent; a later record opens W&B again."""
        if self._there is not None:
            self._try(self._finish)
            self._there = None

    def _opened(self) -> Any:
        if self._there is None:
            import wandb

            with self._held():
                self._there = wandb.init(
                    project=self._config.log.wandb,
                    name=self._run.name,
                    id=self._id,
                    resume="allow",
                    dir=str(self._run.path),
                    config=self._config.model_dump(mode="json"),
                    settings=wandb.Settings(silent=True, console="off", disable_git=True),
                )
            self._there.define_metric("*", step_metric="step")  # W&B's own never goes back, as a life's does
            if self._there.offline:
                say("wandb is offline; where there is a network:", type=sync_command(self._run))
        return self._there

    def _finish(self) -> None:
        import wandb

        self._there.finish()
        wandb.teardown()  # else its service outlives this process

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as e:  # whatever a foreign service may do
            self._works = False
            say("wandb is left out from now on", error=f"{type(e).__name__}: {e}"[:300])


def sync_command(run: RunDir) -> str:
    """The command that uploads a run's offline parts as one W&B run."""
    where = shlex.quote(str(run.path / "wandb"))
    return f"wandb sync --id {usable(run).get('run_id')} {where}/offline-run-*"
