"""Reads and checks the values of site profiles and options: times, memory, GPUs, words, lines."""

from __future__ import annotations

import re
import urllib.parse
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ddpm.errors import shown
from ddpm.run.log import has_control

UNIT_MIN = {"m": 1, "min": 1, "h": 60, "d": 1440}
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
"""Units of memory in bytes; an amount without one is in M."""


def minutes(text: str | int) -> int:
    """A time limit in minutes from 4h, 90m, 2d, 1d12h, minutes, or SLURM's own [D-]HH:MM[:SS]."""
    text = str(text).strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    if re.fullmatch(r"(?:\d+(?:min|[mhd]))+", text):
        total = sum(int(n) * UNIT_MIN[u] for n, u in re.findall(r"(\d+)(min|[mhd])", text))
    else:
        total = slurm_minutes(text)
    if total < 1:
        raise ValueError(f"time = {text!r}: not a time limit; for example 4h, 90m, 2d, 04:00:00 or 1-12:00:00")
    if (match := re.fullmatch(r"(\d{1,2}):(\d\d)", text)) and int(match[1]) < 24:
        a, b = int(match[1]), int(match[2])
        raise ValueError(
            f"time = {text!r}: {a} minutes and {b} seconds to SLURM, {a} hours and {b} minutes to people; write "
            f"{a * 60 + b}m, or 00:{a:02}:{b:02}"
        )
    return total


def written(total_min: int) -> str:
    """A time limit as people write it, and `minutes` reads it: 4h, 1d12h, 2h30m."""
    (days, rest), parts = divmod(total_min, 1440), []
    for number, unit in ((days, "d"), (rest // 60, "h"), (rest % 60, "m")):
        parts += [f"{number}{unit}"] if number else []
    return "".join(parts) or "0m"


def slurm_minutes(text: str) -> int:
    """A time limit in SLURM's form, in minutes, rounded up; 0 for anything else. A:B is minutes and seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text)
    if match is None:
        return 0
    days, first, second, third = (int(g) if g else 0 for g in match.groups())
    if match.group(1) is None and match.group(4) is None:
        first, second, third = 0, first, second
    return days * 1440 + first * 60 + second + (third > 0)


def _mem(text: Any) -> Any:
    if text in (None, "none"):
        return None
    if not re.fullmatch(r"(?:0|[1-9]\d*)[KMGTkmgt]?", str(text)):
        raise ValueError(f"{text!r}: not an amount of memory; for example 32G or 500M, or none for the site's own")
    return str(text)


def _amount(mem: str) -> tuple[int, str]:
    """(32, "G") of 32G; "" where no unit is given."""
    number = mem.rstrip("KMGTkmgt")
    return int(number), mem[len(number) :]


def memory_bytes(mem: str) -> int:
    """Bytes of an amount such as 32G; 0 stands for all memory of a node."""
    number, unit = _amount(mem)
    return number * UNITS[unit.upper() or "M"]


def memory_share(mem: str | None, parts: int) -> str | None:
    """One of `parts` equal shares of an amount of memory, rounded up; None if the amount is all memory of a node."""
    number, unit = _amount(mem or "0")
    if parts == 1 or not number:
        return mem if number else None
    if number % parts and unit.upper() in ("G", "T"):
        number, unit = number * UNITS[unit.upper()] // UNITS["M"], "M"
    return f"{-(-number // parts)}{unit}"


def _gpus(value: Any) -> Any:
    if value is None or (isinstance(value, int) and value >= 0):
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+:[1-9]\d*", value):
        return value
    raise ValueError(f"gpus_per_node = {value!r}: a number of GPUs, or their type and number, as 4 or a100:4")


def _word(text: Any) -> Any:
    if isinstance(text, int) and not isinstance(text, bool):
        return str(text)  # an account may be called 123
    if isinstance(text, str) and not (re.fullmatch(r"[^\s'\"\\;$`]{1,200}", text) and text.isprintable()):
        raise ValueError(f"{text!r}: no spaces, quotes, shell or control characters here")
    return text


def _one_line(text: Any) -> Any:
    if isinstance(text, str) and (has_control(text) or len(text) > 1000):
        raise ValueError(f"{text[:80]!r}: must be one line, of at most 1000 characters")
    return text


def _options(options: Any) -> Any:
    """sbatch options, each of which becomes one line of a job's script."""
    for key, value in options.items() if isinstance(options, dict) else ():
        if not isinstance(value, str | int | None):
            raise ValueError(
                f"sbatch.{key} = {shown(value)}: must be a word or a number, or true for an option without a value"
            )
        try:
            _one_line(value)
        except ValueError as e:
            raise ValueError(f"sbatch.{key} = {e}") from None
    return options


def _shell_lines(lines: Any) -> Any:
    """Shell as it was written: an entry of several lines is as good as several entries, and as a block of them."""
    lines = [lines] if isinstance(lines, str) else lines
    if not isinstance(lines, list):
        return lines
    split = [line for entry in lines for line in (entry.splitlines() or [""] if isinstance(entry, str) else [entry])]
    for line in split:
        if isinstance(line, str) and has_control(line.replace("\t", " ")):
            raise ValueError(f"setup = {line!r}: has control characters: type it anew")
    return tuple(split)


def _mounts(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    for mount in value:
        fits = isinstance(mount, str) and re.fullmatch(r"[^,:]+(?::/[^,:]*)?(?::r[ow])?", mount)
        if not fits or has_control(mount):
            raise ValueError(f"mounts = {mount!r}: FROM, FROM:TO or FROM:TO:ro, without commas; e.g. /scratch")
    return tuple(value)


def _tasks(value: Any) -> Any:
    if value == "auto" or (str(value).isdecimal() and int(value) > 0):
        return value if value == "auto" else int(value)
    raise ValueError(f"tasks = {value!r}: how many tasks make the shards, e.g. 8; or auto")


def _mail(text: Any) -> Any:
    if not (isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9_][\w.+=-]*(@[A-Za-z0-9][A-Za-z0-9.-]*)?", text, re.A)):
        raise ValueError(f"notify.mail = {text!r}: one address, as me@example.org")
    return text


def _command(words: Any) -> Any:
    """A command's words; the message repeats none of them, as they may contain a password."""
    fits = isinstance(words, list | tuple) and all(isinstance(w, str) and "\0" not in w for w in words)
    if not fits or (words and not words[0]) or has_control("".join(words)):
        raise ValueError(
            "notify.command: a list of a program and its words, each in one line, which no shell sees; as [mail, -s, a "
            "run has ended, me@x.org]"
        )
    return tuple(words)


def _url(text: Any) -> Any:
    """A URL; the message does not repeat it, as it may contain a secret."""
    try:
        if isinstance(text, str) and re.fullmatch(r"https?://[A-Za-z0-9\[][!-~]{1,2000}", text):
            at = urllib.parse.urlsplit(text)
            port = at.port  # raises where it is none
            if at.hostname and "@" not in at.netloc and port != 0:
                return text
    except ValueError:
        pass
    raise ValueError(
        "notify.url: one address without spaces, https://HOST/… or http://HOST/…, no user before its host (it is not "
        "shown here)"
    )


Word = Annotated[str, BeforeValidator(_word)]
Line = Annotated[str, BeforeValidator(_one_line)]
Minutes = Annotated[int, BeforeValidator(minutes)]
Options = Annotated[dict[str, str | int | bool | None], BeforeValidator(_options)]
ShellLines = Annotated[tuple[str, ...], BeforeValidator(_shell_lines)]
Mail = Annotated[str, BeforeValidator(_mail)]
Command = Annotated[tuple[str, ...], BeforeValidator(_command)]
Url = Annotated[str, BeforeValidator(_url)]
Mounts = Annotated[tuple[str, ...], BeforeValidator(_mounts)]
Memory = Annotated[str | None, BeforeValidator(_mem)]
Gpus = Annotated[int | str | None, BeforeValidator(_gpus)]
Tasks = Annotated[int | Literal["auto"], BeforeValidator(_tasks)]
