"""A run's logs: which files they are, and which of their lines are the scheduler's own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from ddpm.run.events import read_events
from ddpm.run.paths import RunDir, listed
from launch.queue.local import TORCHRUN

STAGES = ("train", "sample", "evaluate")
OF_SLURM = re.compile(r"(train|sample|evaluate)-(\d+)(_\d+)?\.out")
"""The log of a job of SLURM's, or of a task of its array: its stage and its id."""
NOISE = re.compile(
    r"srun:(?! error: Unable to create step)|slurmstepd|submitit |\[\d{4}-\d\d-\d\dT[^\]]*\] (?:error|fatal): "
)
"""Beginnings of lines that come from the scheduler: slurmstepd's is its name, from 25.05 on the time. Not
that there are no ranks at all, which nobody else says."""
POLL_S = 0.5
ASK_EVERY_S = 3.0
"""How often to ask for the run's state while nothing is added: a requeued job is away for a moment."""
BLOCK = 1 << 20


def of_run(run: RunDir, stage: str | None) -> list[Path]:
    """The log files of one stage, or of all stages, the most recently written one last. Each job and each task of an
    array has one, to which its lives append; with --cluster local the stages of a job share one. Empty ones are left
    out.
    """
    events = read_events(run) if stage else []  # following a log asks for this twice a second
    local = {e["job"]: (e.get("stage") or "").split("+") for e in events if e["event"] == "submitted"}
    found = []
    for path in listed(run.logs):
        match = OF_SLURM.fullmatch(path.name)
        stages = [match[1]] if match else local.get(path.stem, STAGES) if path.name.startswith("local-") else []
        if path.is_file() and path.suffix == ".out" and (stage in stages if stage else stages):
            found.append((path.stat(), path))
    return [path for _, path in sorted((stat.st_mtime, path) for stat, path in found if stat.st_size)]


def unheard(run: RunDir) -> str:
    """For a message that no job has said anything, once none waits: SLURM ends one in no time whose log it cannot
    write, as where runs lie in a login node's /tmp."""
    return (
        f"unless it was cancelled while it waited, nodes may not see {run.path.parent}: python launch/doctor.py with "
        f"--probe asks one"
    )


def job_of(log: Path) -> str:
    """The SLURM job whose log this is; "" for a job of this machine."""
    found = OF_SLURM.fullmatch(log.name)
    return found[2] if found else ""


class Filter:
    """Decides which lines are shown: those of NOISE only with `everything`. `hidden` counts the others."""

    def __init__(self, *, everything: bool) -> None:
        self._everything, self.hidden = everything, 0

    def __call__(self, line: str) -> bool:
        keep = self._everything or not NOISE.match(line)
        self.hidden += not keep
        return keep


def last_error(text: str, num: int = 12) -> list[str]:
    """The lines of a failed job's log that say why: the last ones, of several ranks those before torchrun ended the
    others, whose own words are of the first one's end."""
    said = text.splitlines()
    ended = next((i for i, line in enumerate(said) if TORCHRUN.match(line)), len(said))
    return said[max(0, ended - num) : ended] or said[-num:]


def show(path: Path, keep: Callable[[str], bool]) -> None:
    with path.open(errors="replace") as f:
        for line in f:
            if keep(line):
                print(line.rstrip("\n"))


def follow(
    find: Callable[[], list[Path]], keep: Callable[[str], bool], over: Callable[[], str] = str, last_lines: int = 10
) -> str:
    """Print the end of the newest file, and then whatever is added to any of them, also to those of later jobs.

    over: returns how the run has ended, "" while it is at work or this is unknown; asked while nothing is added.
    Returns that text once it was given twice in a row; ctrl-C ends it too.
    """
    files = find()
    at = {path: path.stat().st_size for path in files}
    shown = files[-1] if files else None
    if shown:
        at[shown] = _begin(shown, last_lines)
    asked_at, ended = time.monotonic(), False
    while True:
        added = False
        for path in find():
            lines, at[path] = _added(path, at.get(path, 0))
            kept = [line for line in lines if keep(line)]
            if kept and path != shown:
                print(f"==> {path} <==", flush=True)
                shown = path
            if kept:
                print("\n".join(kept), flush=True)
            added = added or bool(lines)
        if added:
            asked_at, ended = time.monotonic(), False
        elif at and time.monotonic() - asked_at >= ASK_EVERY_S:
            asked_at, told = time.monotonic(), over()
            if told and ended:
                return told
            ended = bool(told)
        time.sleep(POLL_S)


def tail(path: Path, most: int = 4096) -> str:
    """The end of a file as text; "" if it is gone."""
    try:
        with path.open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - most))
            return f.read().decode(errors="replace")
    except OSError:
        return ""


def _begin(path: Path, last_lines: int) -> int:
    """The byte at which the last lines of a file begin."""
    with path.open("rb") as f:
        size = f.seek(0, 2)
        start = f.seek(max(0, size - BLOCK))
        tail = f.read(size - start)
    lines = tail.splitlines(keepends=True)
    return size - sum(map(len, lines[-last_lines:]))


def _added(path: Path, since: int) -> tuple[list[str], int]:
    """The whole lines from byte `since` on, and the byte at which the next one begins."""
    with path.open("rb") as f:
        f.seek(since if since <= f.seek(0, 2) else 0)
        since, data = f.tell(), f.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode(errors="replace").splitlines(), since + len(whole)
