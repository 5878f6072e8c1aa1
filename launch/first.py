"""What every script does before it loads anything: is the environment there, and what does ctrl-C do meanwhile.

Imported first, for what it does. Loads nothing that may lack.
"""

import os
import shlex
import signal
import sys

NEEDED = ("pydantic", "yaml", "rich", "numpy", "torch", "safetensors")
LEAST = (3, 10)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - of an old Python too


def lacking() -> str:
    """What this Python has not, in words; "" where it has all."""
    from importlib.util import find_spec

    if sys.version_info < LEAST:
        return f"Python {sys.version.split()[0]} is too old (3.10 to 3.13)"
    missing = [name for name in NEEDED if find_spec(name) is None]
    return f"this Python ({sys.executable}) lacks {', '.join(missing)}" if missing else ""


def check() -> None:
    """Leave with exit code 3 and the line to type where something lacks."""
    if told := lacking():
        words = " ".join(shlex.quote(word) for word in ["python", *sys.argv])
        environment = shlex.quote(os.path.join(ROOT, "tools", "env.sh"))  # noqa: PTH118
        print(f"error: {told}: the environment is not there, or not active. Type:\n  . {environment} && {words}",
              file=sys.stderr)  # fmt: skip
        sys.exit(3)


def is_script() -> bool:
    """Whether one of launch/ was started, and not imported."""
    began = getattr(sys.modules["__main__"], "__file__", None) or ""
    return os.path.dirname(os.path.abspath(began)) == os.path.join(ROOT, "launch")  # noqa: PTH100, PTH118, PTH120


if is_script():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run_script`, which has a word for it: no traceback
    check()
