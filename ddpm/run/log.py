"""The one voice of everything that runs: a line with its time, for a job's log or a terminal.

What is said holds names of folders and classes, and words of other programs and files: a terminal would obey the
control characters in them.
"""

from __future__ import annotations

import contextlib
import unicodedata

from ddpm.run.files import now


def has_control(text: str) -> bool:
    """Whether it has what is no character to read: a line's end, an escape, half of a surrogate pair."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def plain(words: object) -> str:
    """As text in one line that only shows: what is no printable character is written as \\x1b."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(words))


def plain_lines(words: object) -> str:
    """The same of text that may have several lines."""
    return "\n".join(map(plain, str(words).split("\n")))


def amount(num_bytes: int) -> str:
    """Bytes for people: `572 MiB`, in the unit in which it is at least one."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.1f} {unit}"


def say(message: str = "", **fields: object) -> None:
    """One log line: `2026-11-20T09:00:00.000Z message key=value …`."""
    told = [plain_lines(message)] if message else []
    with contextlib.suppress(OSError):  # a full disk ends no training, and the job's log may lie on it
        print(now(), *told, *(f"{k}={plain(v)}" for k, v in fields.items()), flush=True)
