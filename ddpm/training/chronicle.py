"""What a life writes of a run: events, log lines, metrics, heartbeat, grids and saves, all of them by rank 0 alone.

Every rank has a chronicle and calls it at the same places: rank 0 a `MainChronicle`, the others a `Chronicle`, which
does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.config.schema import Config
from ddpm.run.events import EventLog, read_events
from ddpm.run.evidence import last_saved
from ddpm.run.fence import Fence
from ddpm.run.files import FULL, LINES_BYTES, PASSING, DamagedFile, read_bytes, write_bytes
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from ddpm.run.saving import Checkpointer
from ddpm.training.due import Due
from ddpm.training.mirror import Mirror
from ddpm.training.telemetry import Telemetry

MAY_PASS = PASSING | FULL | {errno.EROFS}
"""Errors of a save after which it may succeed in a moment."""
SAVE_AGAIN_S = 2
END_SAVE_S = 60.0


class Chronicle:
    """What a trainer can have told or kept; here nothing is done."""

    def miss(self, step: int) -> None:
        """Called where training resumes at `step`: if a later step had been saved, say so and keep its metrics."""

    def begin(self, step: int, logged_step: int) -> None:
        """Called before the first step of a life and after each rollback: metrics past `step` will be written again.

        logged_step: step of the last line of metrics at or before `step`.
        """

    def say(self, message: str, **fields: Any) -> None:
        """A line in the job's log."""

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Append a life event; a full disk only logs. Raises RunBusy, as all writing here does."""

    def log(self, record: dict[str, Any]) -> None:
        """Write a line of metrics."""

    def lacks_validation(self, step: int) -> bool:
        """Whether the step's line of metrics exists and has no loss on held-out images."""
        return False

    def validated(self, step: int, loss: float) -> None:
        """Add the loss on held-out images to a line that an earlier life has written."""

    def alive(self, step: int, *, force: bool = False) -> None:
        """A sign of life for the status view."""

    def has_grid(self, step: int, attempt: int) -> bool:
        """Whether the step's grid exists and was drawn with weights of this attempt."""
        return False

    def grid_again(self, step: int) -> None:
        """Show an existing grid in TensorBoard again."""

    def grid(self, step: int, grid: np.ndarray) -> None:
        """Publish a grid, uint8 (H, W, 3)."""

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Show histograms of the gradients, by part of the network, in TensorBoard."""

    def save(self, state: dict[str, Any], *, wait: bool = False, final: bool = False, stop_reason: str = "") -> bool:
        """Start a save of `state`; with `wait` return once it is over. False: it has failed, as far as is known.

        stop_reason: why training stops, if it does: such a save is tried again for a while after an error that may
        pass.
        """
        return True

    def settle(self) -> None:
        """Wait until the save under way has succeeded or failed. Raises RunBusy."""

    def end_save(self) -> None:
        """Let the save under way end, for END_SAVE_S at most, before an error ends the process."""

    def rest(self) -> None:
        """Called at a stop, after which this process may be killed or may go on."""

    def close(self, step: int) -> None:
        """Called at the end of training."""


class MainChronicle(Chronicle):
    """The chronicle of rank 0.

    owner: {"job", "restart", "host"} of this life. num_images: of the dataset, on which milestones may depend. mirror:
    where metrics go besides; None: to W&B, if the config asks for it. on_milestone: called after each save of a
    milestone, by the thread that made it. patience_s: for how many seconds a stop for this reason may retry its save;
    asked after an error that may pass.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        fence: Fence,
        events: EventLog,
        *,
        owner: dict[str, Any],
        world_size: int,
        num_images: int,
        mirror: Mirror | None = None,
        on_milestone: Callable[[], object] = lambda: None,
        patience_s: Callable[[str], float] = lambda reason: 0.0,
    ) -> None:
        self.config, self.run, self.fence, self.events = config, run, fence, events
        self.owner, self.world_size, self.is_milestone = owner, world_size, Due(config, num_images).milestone
        self._mirror, self._on_milestone, self.patience_s = mirror or Mirror(run, config), on_milestone, patience_s
        self._latest: dict[str, Any] = {}
        self._telemetry: Telemetry | None = None
        self._gap = ""
        self._saver: Checkpointer | None = None
        self._fails = False  # whether the last save failed

    @property
    def telemetry(self) -> Telemetry:
        assert self._telemetry is not None, "begin first"
        return self._telemetry

    @property
    def saver(self) -> Checkpointer:
        assert self._saver is not None, "begin first"
        return self._saver

    def miss(self, step: int) -> None:
        if (saved := last_saved(read_events(self.run))) <= step:
            return
        kept = self.run.path / f"metrics.past-{step:09d}.{self.fence.token}.jsonl"
        say("a saved step is missing", saved=saved, going_on_from=step, metrics_kept_as=kept.name)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError, DamagedFile):
            write_bytes(
                kept,
                read_bytes(self.run.metrics, LINES_BYTES),
                token=str(self.fence.token),
                may_publish=self.fence.check,
            )

    def begin(self, step: int, logged_step: int) -> None:
        if self._telemetry is not None:
            self._telemetry.close()
        self._telemetry = Telemetry(
            self.config,
            self.run,
            step=step,
            logged_step=logged_step,
            owner=self.owner,
            gap=self._gap,
            may_publish=self.fence.check,
        )
        self._gap = self._telemetry.gap
        if self._saver is None:
            self._saver = Checkpointer(
                self.run,
                self.fence,
                keep_last=self.config.checkpoint.keep_last,
                is_milestone=self.is_milestone,
                world_size=self.world_size,
                log=say,
                on_saved=self._saved,
                on_failed=self._not_saved,
            )

    def _saved(self, step: int, sha256: str) -> None:
        self._fails = False
        self.event("checkpoint", step, sha256=sha256)
        if self.is_milestone(step):
            self._on_milestone()

    def _not_saved(self, step: int, why: str) -> None:
        """Log an event for the first of several failed saves in a row. Its `step` is the last one that was saved."""
        if not self._fails:
            self._fails = True
            with contextlib.suppress(OSError):
                self.event("save_failed", self.run.latest_step(), at_step=step, reason=why)

    def say(self, message: str, **fields: Any) -> None:
        say(message, **fields)

    def event(self, event: str, step: int, **fields: Any) -> None:
        try:
            self.fence.check()  # another run may have this name by now, and its events must not get this one
            self.events.append(event, world_size=self.world_size, step=step, **fields)
        except OSError as e:
            say("event not written", event=event, step=step, error=e)

    def log(self, record: dict[str, Any]) -> None:
        self._latest = record
        self.telemetry.log(record)
        self._mirror.log(record)

    def lacks_validation(self, step: int) -> bool:
        return self.telemetry.lacks(step, "validation_loss")

    def validated(self, step: int, loss: float) -> None:
        self.telemetry.amend(step, {"validation_loss": loss})
        self._mirror.log({"step": step, "validation_loss": loss})

    def alive(self, step: int, *, force: bool = False) -> None:
        self.telemetry.heartbeat(step, self._latest, force=force)

    def has_grid(self, step: int, attempt: int) -> bool:
        drawn = self.run.grid(step)
        try:  # after a rollback the grid may be of weights that were given up
            return drawn.exists() and (attempt == 0 or _mtime(drawn) >= _mtime(self.run.manifest(step)))
        except OSError:  # gone meanwhile, or a file system that fails for a moment: drawn again, at worst
            return False

    def grid_again(self, step: int) -> None:
        self.telemetry.grid_again(step)

    def grid(self, step: int, grid: np.ndarray) -> None:
        self.telemetry.grid(step, grid)

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        self.telemetry.histograms(step, values)

    def save(self, state: dict[str, Any], *, wait: bool = False, final: bool = False, stop_reason: str = "") -> bool:
        deadline: float | None = None
        while True:
            try:
                self.telemetry.sync()  # a checkpoint promises the lines before it
                self.saver.save(state, wait=wait, final=final)
            except OSError as e:
                if e.errno in MAY_PASS and deadline is None:
                    deadline = time.monotonic() + (self.patience_s(stop_reason) if stop_reason else 0.0)
                again = deadline is not None and e.errno in MAY_PASS and time.monotonic() + SAVE_AGAIN_S < deadline
                say("checkpoint failed", step=state["step"], error=e, **({"again_in_s": SAVE_AGAIN_S} if again else {}))
                if not again:
                    self._not_saved(state["step"], e.strerror or str(e))
                    return False
                time.sleep(SAVE_AGAIN_S)
            else:
                return True

    def settle(self) -> None:
        self.saver.wait(raising=False)

    def end_save(self) -> None:
        if self._saver is not None:
            self._saver.join(END_SAVE_S)

    def rest(self) -> None:
        self._mirror.close()

    def close(self, step: int) -> None:
        self.alive(step, force=True)
        self.telemetry.close()
        self.rest()


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns
