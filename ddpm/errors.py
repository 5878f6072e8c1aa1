"""The exceptions that a user can act on, and the exit code each one becomes.

Scripts:  0 done or queued, 1 the work failed, 2 the request was wrong, 3 the environment lacks something.
Jobs:     0 finished, 75 saved - put me back, 76 another job holds the run, 78 do not retry, else a failure.
A message names the key or path, the value received, what is allowed, and the next step.
"""

from __future__ import annotations

import re
from typing import Any

EXIT_REQUEUE = 75
EXIT_BUSY = 76
EXIT_FATAL = 78

GPU_MEMORY = re.compile(r"OutOfMemoryError|(?<!HOST)_ALLOC(?:ATION)?_FAILED|\b(?i:CUDA|HIP)\b.{0,20}\bout of memory")
"""What torch, CUDA, its libraries and Triton say in an error when a GPU's memory is used up."""


class DDPMError(Exception):
    """Base: a message for the user, never a traceback."""

    exit_code = 1


class RequestError(DDPMError):
    """What was asked for is wrong: a key, a value, a name, a path."""

    exit_code = 2


class EnvironmentLacks(DDPMError):
    """This machine lacks something the request needs: a scheduler, a download, a package."""

    exit_code = 3


class NodeUnfit(DDPMError):
    """This node cannot do the work, but another one may: the job is tried again."""


class RanksLost(DDPMError):
    """A rank of this job died, hangs, or cannot be reached: the job is tried again."""

    @classmethod
    def silent(cls, at: dict[int, str], why: str) -> RanksLost:
        """at: the ranks that are not heard, and where each is; "" if that is not known."""
        ranks = f"rank{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}"
        where = ", ".join(dict.fromkeys(filter(None, at.values())))
        return cls(f"{ranks} on {where or 'an unknown node'} {why}")


class RunBusy(DDPMError):
    """Another job has the run, or has taken it over from this one."""

    exit_code = EXIT_BUSY


class RunGone(RunBusy):
    """The run directory was moved, renamed, deleted or overwritten by a copy while a job had it."""

    exit_code = EXIT_FATAL


class DoNotRetry(DDPMError):
    """Starting this job again would end the same way: all checkpoints damaged, rollbacks used up."""

    exit_code = EXIT_FATAL


class Stopped(Exception):
    """Raised inside long work when a stop was requested; `reason` is the word that `stop_requested()` returned."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def lacks_gpu_memory(error: BaseException) -> bool:
    """Whether it says that a GPU's memory is gone: torch has a type for this, CUDA's libraries only words."""
    return bool(GPU_MEMORY.search(f"{type(error).__name__}: {error}"))


def shown(value: Any, most: int = 200) -> str:
    """A value as it appears in a message: its repr, shortened to `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
