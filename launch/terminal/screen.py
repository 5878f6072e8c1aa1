"""`status.py --watch` on a terminal: the table kept up to date, and keys for a run's page, its log and its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm.errors import DDPMError
from ddpm.run.files import DamagedFile
from ddpm.run.log import plain
from ddpm.run.paths import RunDir
from launch.cluster.scheduler import SchedulerError
from launch.queue import work
from launch.terminal import console, faults, history, logfiles, streams, view
from launch.terminal.keys import Keys
from launch.terminal.overview import read_life

SIZE_EVERY_S = 0.2
CLEAR, OTHER_SCREEN, BACK = "\x1b[H\x1b[2J", "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
BOLD, REVERSE, PLAIN = "\x1b[1m", "\x1b[7m", "\x1b[0m"
HINTS = {"table": "↑↓ choose  enter page  l log  s stop  q quit", "page": "esc back  l log  s stop  q quit",
         "log": "esc back  enter page  s stop  q quit"}  # fmt: skip

DATE = re.compile(r"^\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)\.\d+Z")
"""The date at the beginning of a line of a log; its time is enough here."""

Row = dict[str, Any]
Look = Callable[[Callable[[str], None]], list[Row]]
"""What the runs are like now; told what is to be said besides."""


def watch(look: Look, *, details: bool) -> None:
    """Until q or ctrl-C, whatever size the terminal becomes; what was seen last stays."""
    out = streams.below(sys.stdout)
    looker = _Looker(look)
    screen = Screen(look(console.warn), details=details)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # ctrl-Z would leave the shell a terminal in this state
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Keys() as keys:
            screen.has_keys = keys.there
            out.write(OTHER_SCREEN)
            drawn: object = None
            while not screen.left:
                size = shutil.get_terminal_size()
                now = CLEAR + "\r\n".join(screen.lines(size.columns, size.lines))
                if (size, now) != drawn:
                    out.write(now)
                    out.flush()
                    drawn = size, now
                _await_news(screen, keys, looker, size)
    finally:
        out.write(BACK)
        view.show(screen.rows, details=details)


def _await_news(screen: Screen, keys: Keys, looker: _Looker, size: os.terminal_size) -> None:
    """Until there is something to draw, at most a second, after which a log may have grown."""
    began = time.monotonic()
    while time.monotonic() - began < 1 and shutil.get_terminal_size() == size:
        if key := keys.pressed(SIZE_EVERY_S):
            screen.press(key)
            return
        if (rows := looker.news()) is not None:
            screen.rows, screen.warning = rows, looker.warning
            return


class _Looker:
    """Looks every few seconds in a thread of its own: keys are heard while SLURM thinks."""

    def __init__(self, look: Look) -> None:
        self._look, self._found, self.warning = look, threading.Event(), ""
        self._rows: list[Row] = []
        self._error: Exception | None = None
        self._began, self._looks = time.monotonic(), False

    def news(self) -> list[Row] | None:
        """What a look has found that is over; begins the next one. Raises what it raised."""
        if self._found.is_set():
            self._found.clear()
            self._began, self._looks = time.monotonic(), False
            if self._error is not None:
                raise self._error
            return self._rows
        if not self._looks and time.monotonic() - self._began >= view.LOOK_EVERY_S:
            self._looks = True
            threading.Thread(target=self._once, daemon=True).start()
        return None

    def _once(self) -> None:
        told: list[str] = []
        try:
            self._rows = self._look(told.append)
            self.warning = " ".join(" ".join(told).split())
        except Exception as e:
            self._error = e
        self._found.set()


class Screen:
    """What is shown, as lines for a size, and what keys do to it."""

    def __init__(self, rows: list[Row], *, details: bool) -> None:
        self.rows, self._details = rows, details
        self.left, self.has_keys, self.warning = False, True, ""
        self._mode, self._chosen, self._asks, self._told = "table", "", False, ""

    @property
    def row(self) -> Row | None:
        """The run that keys are about."""
        chosen = (row for row in self.rows if row["path"] == self._chosen)
        return next(chosen, self.rows[0] if self.rows else None)

    # ------------------------------------------------------------ keys

    def press(self, key: str) -> None:
        self._told = ""
        if self._asks:
            self._asks = False
            if key in ("y", "Y"):
                self._told = self._stop()
        elif key == "q":
            self.left = True
        elif key in ("up", "down", "k", "j") and self._mode == "table" and self.row:
            at = self.rows.index(self.row) + (1 if key in ("down", "j") else -1)
            self._chosen = self.rows[max(0, min(at, len(self.rows) - 1))]["path"]
        elif key == "back":
            self._mode = "table"
        elif key in ("enter", "l") and self.row:
            self._chosen, self._mode = self.row["path"], "page" if key == "enter" else "log"
        elif key == "s" and self.row:
            self._chosen, self._asks = self.row["path"], True

    def _stop(self) -> str:
        """End the chosen run, as cancel.py does; what to say of it."""
        run = RunDir(Path(self._chosen))
        try:
            found = work.end(run)
        except (DDPMError, SchedulerError, OSError) as e:
            return f"not stopped: {e}"
        if found.silent and not found:
            return f"cluster {found.silent[0]} does not answer: {run.stop_file} ends what it still has"
        return f"told to save and leave: {found}" if found else f"nothing of {run.name} is queued or at work"

    # ------------------------------------------------------------ lines

    def lines(self, width: int, height: int) -> list[str]:
        """The screen: at most `height` lines of at most `width` cells, with codes that make text bold or reversed."""
        room = height - self.has_keys
        try:
            shown = {"table": self._table, "page": self._page, "log": self._lines_of_log}[self._mode](width, room)
        except (OSError, DamagedFile) as e:  # another user's, or removed meanwhile
            shown = [_cut(plain(faults.words(e) or e), width)]
        shown = [*shown[:room], *[""] * (room - len(shown))]
        return [*shown, self._foot(width)] if self.has_keys else shown

    def _foot(self, width: int) -> str:
        if self._asks and self.row:
            return f"{BOLD}{_cut('stop ' + self.row['name'] + '? It saves and leaves (y/n)', width)}{PLAIN}"
        return _cut(plain(self._told or self.warning or HINTS[self._mode]), width)

    def _table(self, width: int, room: int) -> list[str]:
        head, *rest = view.page(self.rows, width, details=self._details)
        each, below = rest[: len(self.rows)], rest[len(self.rows) :]
        most = max(room - 1 - len(below), (room - 1) // 2, 1)
        at = self.rows.index(self.row) if self.row else 0
        first = max(0, min(at - most // 2, len(each) - most))
        lines = [f"{BOLD}{_cut(head, width)}{PLAIN}"]
        for i, line in enumerate(each[first : first + most], first):
            chosen = self.has_keys and i == at
            lines.append(f"{REVERSE}{_cut(line, width).ljust(width)}{PLAIN}" if chosen else _cut(line, width))
        return [*lines, *view.fitting(below, max(0, room - len(lines)))]

    def _page(self, width: int, room: int) -> list[str]:
        """A run, and its life: the end of it that has room."""
        if (row := self.row) is None:
            return []
        head, *rest = view.page([row], width, details=True)
        run = RunDir(Path(row["path"]))
        events, _ = read_life(run)
        life = [_cut(plain(line), width) for line in history.short_lines(run, events)]
        top = [f"{BOLD}{_cut(head, width)}{PLAIN}", *rest, "", f"{BOLD}life{PLAIN}"]
        left = max(room - len(top), 1)
        return [*top, *life[-left:]]

    def _lines_of_log(self, width: int, room: int) -> list[str]:
        """The end of what the run's jobs said last."""
        if (row := self.row) is None:
            return []
        run = RunDir(Path(row["path"]))
        files = logfiles.of_run(run, None)
        if not files:
            return [f"no job of {run.name} has said anything yet"]
        keep = logfiles.Filter(everything=False)
        said = [line for line in logfiles.tail(files[-1], 1 << 16).splitlines() if keep(line)]
        lines = [_cut(plain(DATE.sub(r"\1", line)), width) for line in said[-(room - 1) :]]
        return [f"{BOLD}{_cut(plain(files[-1]), width)}{PLAIN}", *lines]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
