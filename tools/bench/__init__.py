"""What this project costs, and how exact it is: `python -m tools.bench`; what takes long has scripts of its own."""

import ctypes
import signal
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

_LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec had better not
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """A child's first act: the kernel kills it once the process that has started it is dead, by kill -9 too."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
