"""One of SLURM's commands, with a time limit: what it prints, or the error that its words make. Knows no run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from launch.cluster.answers import NoAnswer, SchedulerError

TIMEOUT_S = 30
NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|Connection (?:refused|reset)"
    r"|in standby mode|[Tt]emporarily un(?:available|able)|Unable to establish controller"
    r"|[Cc]ould not establish a configuration source|Communication connection failure|Message (?:send|receive) failure"
    r"|authentication error|try (?:again|later)"
)
LINES_AT_MOST = 20
USERS_OWN = ("SQUEUE_", "SINFO_", "SCANCEL_", "SACCTMGR_", "SLURM_TIME_FORMAT")
"""Variables by which a user has SLURM's commands show less, or show it otherwise: not what is asked here."""


def failure(command: str, said: str) -> SchedulerError:
    """The error that a command's words make: all of them, since the last line may be the one that says least.

    Whether SLURM was out of reach is in the last: what a site's plugin wrote before may be about anything.
    """
    lines = words(command, said)
    unreached = lines and NO_ANSWER.search(lines[-1])
    return (NoAnswer if unreached else SchedulerError)(f"{command}: " + "\n  ".join(shortened(lines)))


def words(command: str, said: str) -> list[str]:
    """The lines that a command wrote, without its name, without control characters."""
    lines = (line.rstrip().removeprefix(f"{command}: ") for line in said.splitlines())
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines if line]


def shortened(lines: list[str]) -> list[str]:
    """At most LINES_AT_MOST of them: the first ones and the last ones."""
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
    """What the command prints. env: instead of this process's without USERS_OWN. Raises SchedulerError."""
    if env is None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(USERS_OWN)}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, env=env)
    except FileNotFoundError:
        raise SchedulerError(f"{argv[0]}: not found on this machine") from None
    except subprocess.TimeoutExpired as e:
        said = e.stderr.decode(errors="replace") if isinstance(e.stderr, bytes) else e.stderr or ""
        lines = [f"no answer in {timeout_s:.0f} s", *shortened(words(argv[0], said))]
        raise NoAnswer(f"{argv[0]}: " + "\n  ".join(lines)) from None
    if done.returncode != 0:
        raise failure(argv[0], done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")
    return done.stdout
