"""Reads single key presses from a terminal, by name, and restores the terminal afterwards."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType

NAMES = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x1bOA": "up", b"\x1bOB": "down", b"\r": "enter", b"\n": "enter",
         b"\x1b": "back", b"\x7f": "back", b"\x08": "back", b"\x1b[D": "back", b"\x1bOD": "back"}  # fmt: skip
"""Bytes that a key sends -> its name; other keys are named by their letter."""
REST_S = 0.05
"""How long to wait for the remaining bytes of a key that sends several."""


class Keys:
    """Within: keys arrive one by one and without echo. If standard input is no terminal, none ever arrives."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else -1
        self._before: list[object] | None = None

    @property
    def there(self) -> bool:
        return self._fd >= 0

    def __enter__(self) -> Keys:
        if self.there:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]

    def pressed(self, within_s: float) -> str:
        """The next key, "" if none is pressed within that time."""
        if not self.there:
            time.sleep(within_s)
            return ""
        if not self._comes(within_s):
            return ""
        told = os.read(self._fd, 1)
        if not told:  # the terminal is gone
            return "q"
        while told[:1] == b"\x1b" and len(told) < 3 and self._comes(REST_S):
            told += os.read(self._fd, 1)
        return NAMES.get(told, told.decode(errors="replace") if len(told) == 1 else "")

    def _comes(self, within_s: float) -> bool:
        return bool(select.select([self._fd], [], [], within_s)[0])
