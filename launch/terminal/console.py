"""What the scripts share at a terminal: errors without tracebacks, exit codes, command lines, runs by name."""

from __future__ import annotations

import argparse
import difflib
import errno
import fnmatch
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ddpm.errors import DDPMError, EnvironmentLacks, RequestError
from ddpm.run.files import DamagedFile
from ddpm.run.generations import NoneHolds
from ddpm.run.log import plain
from ddpm.run.paths import EXPORTED_WEIGHTS, RunDir, listed
from ddpm.run.records import usable
from ddpm.run.stopping import ShowProgress
from launch.cluster import environment
from launch.terminal import faults, streams


def run_script(main: Callable[[], int]) -> None:
    """Run a script's main and leave with its exit code; what a user can mend is one message, never a traceback."""
    streams.make_safe()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as first.py has set it for loading
            signal.signal(signal.SIGINT, signal.default_int_handler)
        faults.before_cpu_limit(_spent)
        code = main()
    except SystemExit as e:  # argparse has said all there is to say
        code = int(e.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except faults.Spent as e:
        print(f"error: {e}", file=sys.stderr)
        code = EnvironmentLacks.exit_code
    except Exception as e:
        told = faults.words(e)
        if told is None:
            raise
        if isinstance(e, NoneHolds):
            from launch.queue.chain import ways_on  # takes a moment

            told += f". {ways_on(e.run)}"
        code = _exit_code(e)
        with suppress(OSError):
            sys.stdout.flush()  # what came before the error stands before it where both go to one file
        if code:
            print(f"error: {'damaged: ' if isinstance(e, DamagedFile) else ''}{told}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os._exit(code)  # the interpreter would complain about the same again
    sys.exit(code)


def _spent() -> NoReturn:
    raise faults.Spent


def _exit_code(error: Exception) -> int:
    if isinstance(error, DDPMError):
        return error.exit_code
    if isinstance(error, DamagedFile | NotADirectoryError | IsADirectoryError):
        return RequestError.exit_code  # what is asked for is not there as it was
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # `… | head` has read enough
        return 0
    return EnvironmentLacks.exit_code  # no permission, no room, a limit: the machine's, or another user's directory


def step(word: str) -> int | str:
    try:
        return word if word == "best" else int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a number nor best") from None


class Parser(argparse.ArgumentParser):
    """A script's parser: a mistake is one message that guesses what was meant, without the whole usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add_runs(self) -> None:
        self.add_argument("runs", nargs="+", metavar="RUN", help="names, directories, patterns or sweeps")

    def add_step(self, when: str = "") -> None:
        which = f"{when}which checkpoint: a number, or `best` of the milestones (default: the newest)"
        self.add_argument("--step", type=step, help=which)

    def add_verbose(self) -> None:
        self.add_argument("--verbose", action="store_true", help="with --dry-run: the exact job scripts too")

    def check_verbose(self, args: argparse.Namespace) -> None:
        if args.verbose and not args.dry_run:
            self.error("--verbose goes with --dry-run, which shows the job scripts")

    def add_root(self) -> None:
        self.add_argument("--root", help="folder of the runs (default: DDPM_RUNS, or runs/ in the project)")

    def error(self, message: str) -> NoReturn:
        message = re.sub(r": invalid int value: (.*)", r" \1: must be a whole number", message)
        message = re.sub(r": invalid float value: (.*)", r" \1: must be a number", message)
        near = self._meant(message)
        hint = f"did you mean {' or '.join(near)}?" if near else f"see {self.prog} --help"
        self.exit(2, f"error: {message}; {hint}\n")

    def _meant(self, message: str) -> list[str]:
        """Suggestions for the first unrecognized argument."""
        if unknown := re.match(r"unrecognized arguments: --([^\s=]+)(?:=(\S*))?", message):
            if keys := self._keys(unknown[1].replace("-", "_")):
                after = [*sys.argv, ""][[*sys.argv, f"--{unknown[1]}"].index(f"--{unknown[1]}") + 1 :][:1]
                value = unknown[2] or "".join(word for word in after if not word.startswith("-")) or "…"
                return [f"{key}={value}" for key in keys]
            return difflib.get_close_matches(f"--{unknown[1]}", self._option_string_actions, 1)
        if unknown := re.match(r"unrecognized arguments: ([\w.]+)=(\S*)", message):
            option = "--" + unknown[1].rpartition(".")[2].replace("_", "-")
            return [f"{option} {unknown[2]}"] if option in self._option_string_actions else []
        return []

    def _keys(self, word: str) -> list[str]:
        """Config keys that a mistyped option may mean, if this script takes keys."""
        if not any("key=value" in str(action.metavar) for action in self._actions):
            return []
        from ddpm.config.schema import Config
        from ddpm.config.section import field_keys, meant

        known = field_keys(Config)
        return [word] if word in known and "." in word else meant(word, known)


def config_and_changes(words: list[str], root: str | None) -> tuple[Path, list[str], RunDir | None]:
    """CONFIG and key=value of a command line: the file, the changes, and the run that was given in place of a file.

    Raises RequestError.
    """
    files = [word for word in words if "=" not in word]
    changes = [word for word in words if "=" in word]
    if "" in files:
        raise RequestError("an empty word where a config file or key=value was expected: an unset shell variable?")
    if len(files) > 1:
        split = "; a value with blanks needs quotes: 'key=[1, 2]'" if re.search(r"[\]},]", " ".join(files)) else ""
        raise RequestError(f"more than one config file: {' '.join(files)}; give one, and changes as key=value{split}")
    if not files:
        return environment.SHIPPED / "configs" / "cifar10.yaml", changes, None
    path = Path(files[0])
    if not path.is_file():
        for there in (environment.user_path(files[0]), environment.runs_root(root) / files[0]):
            if may_be_run(there):
                if not (there / "config.yaml").exists():
                    from ddpm.config import reading

                    reading.of_run(RunDir(there))  # says that it is lost
                return there / "config.yaml", changes, RunDir(there)
        if path.is_dir():
            way = (
                f"these are exported weights, with which {_with_exported(files[0])} begins a run"
                if (path / EXPORTED_WEIGHTS).is_file()
                else "name a run, or a config file"
            )
            raise RequestError(f"{plain(files[0])}: a folder, and no run there; {way}")
        if not os.path.lexists(path) and path.suffix not in (".yaml", ".yml"):
            raise _none(files[0], environment.runs_root(root), or_recipe=True)
    return path, changes, None


def _with_exported(folder: str) -> str:
    config = f"{folder.rstrip('/')}/config.yaml"
    return f"python launch/submit.py {shlex.quote(config)} --from {shlex.quote(folder)} --name NAME"


def warn(message: str) -> None:
    """Print to stderr, which is not part of the result."""
    print(message, file=sys.stderr, flush=True)


def show_progress(doing: str) -> ShowProgress:
    """A function (done, total) that says so: one line that changes on a terminal, else a line per 10,000 images."""
    tty, told = sys.stderr.isatty(), 0

    def show(done: int, total: int) -> None:
        nonlocal told
        told = min(told, done)
        if tty:
            end = "" if done < total else "\n"
            print(f"\r{doing} {done}/{total} images", end=end, file=streams.below(sys.stderr), flush=True)
        elif done // 10_000 > told // 10_000:
            told = done
            print(f"{doing} {done}/{total} images", flush=True)

    return show


def same_root(option: str | None) -> str:
    """The --root option for a command in a message, if this command had one."""
    return f" --root {shlex.quote(option)}" if option else ""


def all_runs(root: Path) -> list[RunDir]:
    """The runs in a directory, by name, and directories in it that may be runs but cannot be read."""
    return [RunDir(p) for p in sorted(listed(root)) if not p.name.startswith(".") and may_be_run(p)]


def may_be_run(path: Path) -> bool:
    """Whether a path is a run, also a damaged one, or cannot be read."""
    try:
        names = {p.name for p in path.iterdir()}
    except PermissionError:  # another user's
        return True
    except OSError:
        return False
    return "run.json" in names or {"config.yaml", "checkpoints"} <= names


def check_outside_runs(path: Path, option: str) -> None:
    """Raise RequestError where `path`, which a user gives for output, lies in a run: there it may take a file's place,
    or be taken for one, and it goes when the run is removed."""
    there = path.expanduser().resolve()
    for folder in (there, *there.parents):
        own, others = folder / "run.json", (folder / "config.yaml", folder / "checkpoints")  # others have one too
        if os.path.lexists(own) and any(map(os.path.lexists, others)):
            raise RequestError(f"{option} {path}: lies in run {plain(folder.name)}; name a place outside of runs")


def find_run(word: str, root: str | None) -> RunDir:
    """A run by its directory or its name. Raises RequestError naming the existing runs."""
    base = environment.runs_root(root)
    for path in (environment.user_path(word), base / word):
        if may_be_run(path):
            return RunDir(path)
    if os.path.lexists(environment.user_path(word) / EXPORTED_WEIGHTS):
        raise RequestError(
            f"{plain(word)}: exported weights, and no run: ddpm.load({word!r}).sample(64) in Python draws from them, "
            f"and {_with_exported(word)} begins a run with them"
        )
    raise _none(word, base)


def _none(word: str, base: Path, *, or_recipe: bool = False) -> RequestError:
    """That a word names no run in `base`, with those there are; or_recipe: nor a config file."""
    every = all_runs(base)
    names, sweeps = [run.name for run in every], list(dict.fromkeys(filter(None, map(sweep_of, every))))
    known = ", ".join(map(plain, names)) or "none"
    if sweeps:
        known += f", and the sweeps {', '.join(map(plain, sweeps))}"
    recipes = {path.stem: path for path in environment.SHIPPED.glob("configs/*.yaml")} if or_recipe else {}
    near = difflib.get_close_matches(
        Path(word).name, [*names, *([] if or_recipe else sweeps), *recipes], 1 if or_recipe else 2
    )
    meant = f"; did you mean {' or '.join(plain(str(recipes.get(name, name))) for name in near)}?" if near else ""
    if or_recipe and not near:
        meant = "; python launch/submit.py --list shows the recipes"
    what = "no run and no config file" if or_recipe else "no run"
    return RequestError(f"{what} {word!r}; in {base} there are: {known} (--root looks elsewhere){meant}")


def sweep_of(run: RunDir) -> str | None:
    """The name of the sweep that a run belongs to; None if it does not."""
    return (usable(run).get("sweep") or {}).get("name")


def find_runs(words: Sequence[str], root: str | None) -> list[RunDir]:
    """The runs that words name, each once: a run, a pattern of names (`cifar10-lr*`), or all runs of a sweep.

    Raises RequestError where one names none.
    """
    found: dict[Path, RunDir] = {}
    for word in words:
        try:
            runs = [find_run(word, root)]
        except RequestError:
            every = all_runs(environment.runs_root(root))
            runs = [r for r in every if fnmatch.fnmatchcase(r.name, word)]
            runs = runs or [r for r in every if sweep_of(r) == word]
            if not runs:
                raise
        found |= {run.path: run for run in runs}
    return list(found.values())
