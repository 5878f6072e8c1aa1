"""metrics.jsonl, TensorBoard and the console: one line a log step, none twice and none missing over any restarts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from ddpm.config.schema import Config
from ddpm.run.files import LINES_BYTES, now, read_bytes, write_bytes, write_json
from ddpm.run.images import read_png, write_png
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from ddpm.run.records import missing_lines, parse_metrics, place_of
from ddpm.training.board import add_grid, add_histograms, add_scalars, introduce

HEARTBEAT_EVERY_S = 5.0
BOARD_AGAIN_AFTER_S = 60.0
"""Time from a failed write of TensorBoard's to its next event file: a full disk stays full for a while."""


class Telemetry:
    """What rank 0 tells the world about a run. Opened at the `step` from which training goes on.

    logged_step: the step of the last line of metrics at or before `step`. gap: the gap between lines that this life has
    reported already, or ""; another one is reported. may_publish: called before a file appears; raises if a later job
    has taken the run over.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        *,
        step: int,
        logged_step: int,
        owner: dict[str, Any],
        gap: str = "",
        may_publish: Callable[[], None],
    ) -> None:
        self._config, self._run, self._owner, self._may_publish = config, run, owner, may_publish
        self._total_steps, self.gap = config.train.total_steps, gap
        self._trim(step, logged_step)
        self._metrics: BinaryIO = run.metrics.open("a+b", buffering=0)
        self._unwritten = b""
        self._board: Any = None
        self._board_at = 0.0
        self._first_step = step
        self._grids: list[int] = []  # drawn in this life
        self._heartbeat_at = 0.0
        self._inode = place_of(run)
        self._refused: dict[str, str] = {}
        self._bar = _bar(self._total_steps, step) if sys.stderr.isatty() else None

    def _trim(self, step: int, logged_step: int) -> None:
        """Drop lines past the resumed step, which will be written again with the same values; move unreadable lines
        aside.

        Always writes a new file: what a process of an earlier life still appends then goes to the old file, which no
        longer has a name.
        """
        kept = self._lines_up_to(step)
        gap = missing_lines(kept, self._config.log.every_steps, logged_step=logged_step)
        if gap and gap != self.gap:
            say(f"{gap}: the file was damaged; training goes on without them")
            self.gap = gap
        self._rewrite(kept)

    def _lines_up_to(self, step: int) -> list[dict[str, Any]]:
        """The lines up to `step` in the file that is now called metrics.jsonl; unreadable ones are moved aside."""
        data = b""
        with contextlib.suppress(FileNotFoundError):
            data = read_bytes(self._run.metrics, LINES_BYTES)
        records, odd, wrong = parse_metrics(data)
        if odd:
            aside = self._run.metrics.with_suffix(".unread")
            aside = aside / aside.name if aside.is_dir() else aside
            with aside.open("ab") as f:
                f.write(b"\n".join(odd) + b"\n")
            say(f"{wrong}: kept in {aside.name}, left out here")
        elif wrong:
            say(f"{wrong}: put in order")
        return [r for r in records if r["step"] <= step]

    def _rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(r) + "\n" for r in records).encode()
        write_bytes(self._run.metrics, lines, replace=True, may_publish=self._may_publish)

    def _move_to_new_file(self) -> None:
        """If metrics.jsonl was replaced by another file (an older copy, an editor's), write this life's lines there
        too."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._metrics.fileno()), self._run.metrics.stat()):
                return
        self._metrics.seek(0)
        known = {r["step"]: r for r in parse_metrics(self._metrics.read() + self._unwritten)[0]}
        known |= {r["step"]: r for r in self._lines_up_to(self._first_step)}
        self._rewrite(known[step] for step in sorted(known))
        self._metrics.close()
        self._metrics, self._unwritten = self._run.metrics.open("a+b", buffering=0), b""
        say("metrics.jsonl was replaced under this job: the lines of this life were written to the new one too")

    @property
    def board(self) -> Any:
        """TensorBoard's writer, made when first needed (its import takes a second), and again after a failed write.

        It hides what earlier writers showed past the step at which this life began, and shows this life from there on.
        """
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._may_publish()  # it makes every folder of its path, also of a run that was moved away
            threading.excepthook = _quiet_about_the_board
            board = SummaryWriter(str(self._run.tensorboard), purge_step=self._first_step + 1)
            introduce(board, self._config, self._first_step)
            for record in parse_metrics(read_bytes(self._run.metrics, LINES_BYTES) + self._unwritten)[0]:
                if record["step"] > self._first_step:
                    add_scalars(board, record)
            for step in self._grids:
                if (path := self._run.grid(step)).exists():
                    add_grid(board, step, read_png(path))
            self._board = board
        return self._board

    def _show(self, add: Callable[[Any], None]) -> None:
        """Show in TensorBoard what was just written to metrics.jsonl or grids/; a new writer does so when it is
        made."""
        if self._board is not None:
            add(self._board)
        elif time.monotonic() >= self._board_at:
            _ = self.board

    def log(self, record: dict[str, Any]) -> None:
        """One metrics record (a line of metrics.jsonl), to the file, TensorBoard and the console."""
        record = {**record, "time": now()}
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._try("metrics", self._write)
        self._try("tensorboard", lambda: self._show(lambda board: add_scalars(board, record)))
        if self._bar is None:
            say(
                step=f"{record['step']}/{self._total_steps}",
                epoch=f"{record['epoch']:.2f}",
                loss=f"{record['loss']:.4f}",
                **_validation(record),
                grad_norm=f"{record['grad_norm']:.3f}",
                lr=f"{record['lr']:.2e}",
                images_per_s=f"{record['images_per_s']:.1f}",
            )
        else:
            losses = f"loss {record['loss']:.4f}"
            losses += "".join(f" validation {loss}" for loss in _validation(record).values())
            self._bar.update(0, description=f"{losses}  {record['images_per_s']:.0f} img/s")

    def lacks(self, step: int, key: str) -> bool:
        """Whether an earlier life's line of `step` exists and has no `key`."""
        try:
            return any(r["step"] == step and r.get(key) is None for r in self._lines_up_to(step))
        except OSError:
            return False

    def amend(self, step: int, fields: dict[str, Any]) -> None:
        """Add fields to the line of `step` that an earlier life wrote; called before this life's first line."""
        amended: dict[str, Any] = {}

        def write() -> None:
            kept = [{**r, **fields} if r["step"] == step else r for r in self._lines_up_to(self._first_step)]
            self._rewrite(kept)
            self._metrics.close()
            self._metrics = self._run.metrics.open("a+b", buffering=0)
            for of_step in (r for r in kept if r["step"] == step):
                amended.update(fields, step=step, time=of_step["time"])

        self._try("metrics", write)
        if amended:
            say(step=f"{step}/{self._total_steps}", **_validation(amended))
            self._try("tensorboard", lambda: add_scalars(self.board, amended))

    def _write(self) -> None:
        self._move_to_new_file()
        while self._unwritten:  # what a full disk refuses waits for the next line
            self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]

    def _try(self, what: str, write: Callable[[], Any]) -> None:
        """Call `write`; an OSError, such as a full disk, ends no training and is logged when it first occurs."""
        try:
            write()
            self._refused.pop(what, None)
        except OSError as e:
            why = e.strerror or str(e)
            if self._refused.get(what) != why:
                say(f"{what} not written", error=e)
            self._refused[what] = why
            if what == "tensorboard":
                self._board = None  # its writer thread is dead; another one will show all again
                self._board_at = time.monotonic() + BOARD_AGAIN_AFTER_S

    def heartbeat(self, step: int, latest: dict[str, Any], *, force: bool = False) -> None:
        """Tell the status view that this life is alive, every few seconds."""
        if self._bar is not None:
            self._bar.update(0, completed=step)
        if not force and time.monotonic() - self._heartbeat_at < HEARTBEAT_EVERY_S:
            return
        self._heartbeat_at = time.monotonic()
        record = {"time": now(), "step": step, "total_steps": self._total_steps, **self._owner, "inode": self._inode}
        record |= {key: latest.get(key) for key in ("loss", "images_per_s")}
        self._try(
            "heartbeat", lambda: write_json(self._run.heartbeat, record, replace=True, may_publish=self._may_publish)
        )

    def grid(self, step: int, grid: np.ndarray) -> None:
        """Publish a sample grid, uint8 (H, W, 3)."""
        self._try("grid", lambda: write_png(self._run.grid(step), grid, may_publish=self._may_publish))
        self._show_grid(step, grid)

    def grid_again(self, step: int) -> None:
        """Show an earlier life's grid of `step` again: this life's event file hides its image in TensorBoard."""
        if step > self._first_step:
            self._try("grid", lambda: self._show_grid(step, read_png(self._run.grid(step))))

    def _show_grid(self, step: int, grid: np.ndarray) -> None:
        if step > self._first_step:  # earlier ones are in earlier event files, which this life's does not hide
            self._grids.append(step)
        self._try("tensorboard", lambda: self._show(lambda board: add_grid(board, step, grid)))
        self.flush_board()

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Show histograms of the gradients, by part of the network. Nothing else has them: what is not shown now never
        is."""
        if self._board is not None or time.monotonic() >= self._board_at:
            self._try("tensorboard", lambda: add_histograms(self.board, step, values))

    def sync(self) -> None:
        """Make every line durable: called before a checkpoint, which promises them. Raises OSError."""
        self._write()
        os.fsync(self._metrics.fileno())
        self.flush_board()

    def flush_board(self) -> None:
        """Write TensorBoard's pending data to its file."""
        if self._board is not None:
            self._try("tensorboard", self._board.flush)

    def close(self) -> None:
        self._try("metrics", self.sync)
        self._metrics.close()
        if self._board is not None or self._board_at:
            self._try("tensorboard", lambda: self.board.close())
        if self._bar is not None:
            self._bar.stop()


_excepthook = threading.excepthook


def _validation(record: dict[str, Any]) -> dict[str, str]:
    """The loss on held-out images as console text; {} if the record has none."""
    loss = record.get("validation_loss")
    return {} if loss is None else {"validation_loss": f"{loss:.4f}"}


def _quiet_about_the_board(args: threading.ExceptHookArgs) -> None:
    """Suppress the traceback of TensorBoard's thread after a failed write: `Telemetry` logs one line for it."""
    if not (type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)):
        _excepthook(args)


def _bar(total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(file=sys.__stderr__),
    )
    bar.start()
    bar.add_task("", total=total, completed=done)
    return bar
