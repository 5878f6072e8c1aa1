"""The metrics of a run in Weights & Biases too: one run there for all of its lives, by its id.

metrics.jsonl is what counts: whatever goes wrong here is one line of the log, after which a life goes on without. Must
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
from ddpm.training.board import TAGS


class Mirror:
    """Opened by the first record. `held`: within it the signals that stop a life wait, also for wandb's service, which
    would otherwise die of them before it has written what it was given."""

    def __init__(
        self, run: RunDir, config: Config, held: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._run, self._config, self._held = run, config, held
        self._id = usable(run).get("run_id")
        self._there: Any = None
        self._works = config.log.wandb is not None and self._id is not None

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        shown = {tag: record[key] for key, tag in TAGS.items() if record.get(key) is not None}
        self.show(shown, record["step"])

    def show(self, values: Mapping[str, float], step: int) -> None:
        """Values by name, at a step of training."""
        if self._works:
            self._try(lambda: self._opened().log({**values, "step": step}))

    def close(self) -> None:
        """Have all that was given written; what comes later opens it again."""
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
            self._there.define_metric("*", step_metric="step")  # its own steps never go back, as a later life's do
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
        except Exception as e:  # whatever another's service does
            self._works = False
            say("wandb is left out from now on", error=f"{type(e).__name__}: {e}"[:300])


def sync_command(run: RunDir) -> str:
    """What brings a run's offline parts to the server, as one run."""
    where = shlex.quote(str(run.path / "wandb"))
    return f"wandb sync --id {usable(run).get('run_id')} {where}/offline-run-*"
