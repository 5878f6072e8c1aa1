"""What the scripts share at a terminal: errors without tracebacks, exit codes, command lines, runs by name."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ddpm.errors import DDPMError, EnvironmentLacks, RequestError
from ddpm.run.files import DamagedFile, not_ours
from ddpm.run.paths import RunDir
from ddpm.run.stopping import ShowProgress
from launch.cluster import environment


def run_script(main: Callable[[], int]) -> None:
    """Run a script's main and leave with its exit code; what a user can mend is one message, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no é is no reason to die
    try:
        code = main()
    except DDPMError as e:
        print(f"error: {e}", file=sys.stderr)
        code = e.exit_code
    except DamagedFile as e:
        print(f"error: damaged: {e}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as e:
        if e.errno == errno.EPIPE:  # `… | head` has read enough
            code = 0
        else:  # no permission, no room: the machine's, or another user's directory
            print(f"error: {e.strerror or e}" + (f": {e.filename}" if e.filename else "") + _whose(e), file=sys.stderr)
            code = EnvironmentLacks.exit_code
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        os._exit(code)  # the interpreter would complain about the same again
    sys.exit(code)


def _whose(error: OSError) -> str:
    why = not_ours(Path(error.filename)) if isinstance(error, PermissionError) and error.filename else ""
    return why and f". {why}"


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one message, without the whole usage, and knows what was meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = difflib.get_close_matches(unknown.group(1), self._option_string_actions, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        self.exit(2, f"error: {message}; {hint}\n")


def show_progress(doing: str) -> ShowProgress:
    """A function (done, total) that says so: one line that changes on a terminal, else a line per 10,000 images."""
    tty = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if tty:
            print(f"\r{doing} {done}/{total} images", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done % 10_000 == 0:
            print(f"{doing} {done}/{total} images", flush=True)

    return show


def all_runs(root: Path) -> list[RunDir]:
    """The runs in a directory, by name."""
    return [RunDir(p.parent) for p in sorted(root.glob("*/run.json")) if not p.parent.name.startswith(".")]


def find_run(word: str, root: str | None) -> RunDir:
    """A run by its directory or its name. Raises RequestError naming the runs there are."""
    base = environment.runs_root(root)
    for path in (Path(word).expanduser().absolute(), base / word):
        if (path / "run.json").is_file():
            return RunDir(path)
    known = ", ".join(run.name for run in all_runs(base)) or "none"
    raise RequestError(f"no run {word!r}; in {base} there are: {known} (--root looks elsewhere)")
