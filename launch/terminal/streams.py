"""Standard streams as this process can use them: there, and harmless to the terminal behind them."""

from __future__ import annotations

import codecs
import io
import locale
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ddpm.run.log import plain_lines
from launch.cluster import environment

if TYPE_CHECKING:
    from rich.console import Console


class Plain:
    """A stream that shows control characters, where the one below would send them to a terminal, which obeys."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(plain_lines(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def below(stream: Any) -> Any:
    """The stream itself, for what draws on a terminal."""
    return stream._stream if isinstance(stream, Plain) else stream


def draws(stream: Any) -> bool:
    """Whether it is a terminal that obeys: one called dumb, as in Emacs, shows escapes as they are."""
    return bool(stream.isatty()) and environment.terminal() != "dumb"


def drawing(stream: Any, **settings: Any) -> Console:
    """rich's console for tables on `stream`. Where `… | head` has read enough, rich would leave with 1: here that is an
    error as with any other print."""
    from rich.console import Console

    class Drawing(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Drawing(file=below(stream), **settings)


def make_safe() -> None:
    """Call it first. A stream that whoever started us has closed goes nowhere: else the next file that is opened has
    its number, and what is printed lands there."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: PTH123 - open for as long as we live
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=_of_terminal(stream), errors="replace")  # one without é is no reason to die
        if not isinstance(stream, Plain):
            setattr(sys, name, Plain(stream))


def _of_terminal(stream: io.TextIOWrapper) -> str | None:
    """The encoding that the locale says a terminal has, which Python's UTF-8 mode (launch/first.py) does not heed; None
    where the stream's own is right, or all that there is to go by, as where Python lacks the terminal's."""
    told = locale.nl_langinfo(locale.CODESET) if sys.flags.utf8_mode and stream.isatty() else ""
    with suppress(LookupError):
        return None if told in ("", "ANSI_X3.4-1968") else codecs.lookup(told).name
    return None
