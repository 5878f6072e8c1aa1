"""Runs one SLURM command with a time limit; returns what it prints, or raises an error with its words. Knows no run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from launch.cluster import asked
from launch.cluster.answers import NoAnswer, SchedulerError

TIMEOUT_S = 30
NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|Connection (?:refused|reset)"
    r"|in standby mode|[Tt]emporarily un(?:available|able)|Unable to establish controller"
    r"|[Cc]ould not establish a configuration source|Communication connection failure|Message (?:send|receive) failure"
    r"|authentication error|try (?:again|later)|Unexpected message received"
)
CLUSTER_LINE = re.compile(r"^CLUSTER: .*\n", re.M)
"""What squeue and sinfo print before their answer where they are told which cluster to ask, even without a header."""
LINES_AT_MOST = 20
USERS_OWN = ("SQUEUE_", "SINFO_", "SCANCEL_", "SACCTMGR_")
"""Variables that change what SLURM's commands show to a user: removed, since their output is parsed here."""
TIMES = {"SLURM_TIME_FORMAT": "%s"}
"""Has them show seconds since 1970: local times are ambiguous for an hour when clocks go back."""


def failure(command: str, said: str) -> SchedulerError:
    """The error for a command's output, with all of it, since the last line may say least.

    Whether SLURM was unreachable is read from the last line: earlier lines may be a site plugin's.
    """
    lines = words(command, said)
    unreached = lines and NO_ANSWER.search(lines[-1])
    return (NoAnswer if unreached else SchedulerError)(f"{command}: " + "\n  ".join(shortened(lines)))


def words(command: str, said: str) -> list[str]:
    """The lines of a command's output, without its name before them and without control characters."""
    lines = (line.rstrip().removeprefix(f"{command}: ") for line in said.splitlines())
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines if line]


def shortened(lines: list[str]) -> list[str]:
    """At most LINES_AT_MOST of the lines: the first ones and the last ones."""
    half = LINES_AT_MOST // 2
    return (
        lines
        if len(lines) <= LINES_AT_MOST
        else [*lines[: half - 1], f"… {len(lines) - 2 * half + 1} lines more …", *lines[-half:]]
    )


def available(command: str = "sbatch") -> bool:
    return shutil.which(command) is not None


def run(
    argv: list[str], *, timeout_s: float = TIMEOUT_S, cwd: str | None = None, env: dict[str, str] | None = None
) -> str:
    """Run a command; returns its output. env: default this process's, without USERS_OWN and with TIMES. Raises
    SchedulerError.

    sbatch is told by an option where to queue: what is in its environment is in its job's. A command that asks on its
    input, as a site's own sbatch may, hears nobody, since nobody would see the question.
    """
    if env is None:
        env = {k: v for k, v in os.environ.items() if not k.startswith((*USERS_OWN, "SLURM_CLUSTERS"))} | TIMES
        if argv[0] != "sbatch" and (cluster := asked.cluster()):
            env["SLURM_CLUSTERS"] = cluster
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s,
            cwd=cwd, env=env,
        )  # fmt: skip
    except FileNotFoundError:
        if cwd is not None and not Path(cwd).is_dir():
            raise NoAnswer(f"{argv[0]}: {cwd} is not there, as where its file system is away for a moment") from None
        raise SchedulerError(f"{argv[0]}: not found on this machine") from None
    except subprocess.TimeoutExpired as e:
        lines = [f"no answer in {timeout_s:.0f} s", *shortened(words(argv[0], _both(e.stdout, e.stderr)))]
        raise NoAnswer(f"{argv[0]}: " + "\n  ".join(lines)) from None
    if done.returncode != 0:
        raise failure(argv[0], _both(done.stdout, done.stderr) or f"exit code {done.returncode}")
    return CLUSTER_LINE.sub("", done.stdout)


def _both(out: str | bytes | None, err: str | bytes | None) -> str:
    """What a command said, its errors last: a site's own sbatch may refuse, or ask, on its output."""
    texts = (text.decode(errors="replace") if isinstance(text, bytes) else text or "" for text in (out, err))
    return "\n".join(filter(None, (CLUSTER_LINE.sub("", text).strip() for text in texts)))


_answers: ContextVar[dict[tuple[str, ...], str] | None] = ContextVar("answers", default=None)
"""The cluster that was asked and the words -> what it said."""


@contextmanager
def asked_once() -> Iterator[None]:
    """Within: what `ask` asks is asked once, however many jobs are queued."""
    kept = _answers.get()
    token = _answers.set({} if kept is None else kept)
    try:
        yield
    finally:
        _answers.reset(token)


def ask(argv: list[str], *, timeout_s: float = TIMEOUT_S) -> str:
    """`run` of a question about the cluster and no job. Raises SchedulerError."""
    kept = _answers.get()
    if kept is None:
        return run(argv, timeout_s=timeout_s)
    question = (asked.cluster(), *argv)
    if question not in kept:
        kept[question] = run(argv, timeout_s=timeout_s)
    return kept[question]
