"""Log lines with their time, for a job's log or a terminal: everything that runs prints through `say`.

Lines contain names of folders and classes and the output of other programs. Control characters in them are escaped,
since a terminal would obey them.
"""

from __future__ import annotations

import contextlib
import unicodedata

from ddpm.run.files import now


def has_control(text: str) -> bool:
    """Whether the text has control characters: line breaks, escapes, lone surrogates."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def plain(words: object) -> str:
    """`words` as one line of printable text: other characters are escaped, as in \\x1b."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(words))


def plain_lines(words: object) -> str:
    """`plain` for text of several lines."""
    return "\n".join(map(plain, str(words).split("\n")))


def amount(num_bytes: int) -> str:
    """A number of bytes for people: `572 MiB`, in the largest unit of which there is at least one."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.1f} {unit}"


def counted(number: int, what: str, form: str = "") -> str:
    """`1 image`, `2 images`, `2 classes`. form: of the number, as in an f-string."""
    more = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:{form}} {what}{more}"


def say(message: str = "", **fields: object) -> None:
    """One log line: `2026-11-20T09:00:00.000Z message key=value …`."""
    told = [plain_lines(message)] if message else []
    with contextlib.suppress(OSError):  # a full disk ends no training, and the job's log may lie on it
        print(now(), *told, *(f"{k}={plain(v)}" for k, v in fields.items()), flush=True)
