"""What every script does before it loads anything: is the environment there, and what does ctrl-C do meanwhile.

Imported first, for what it does. Loads nothing that may lack.
"""

import _signal  # and not `signal`, which takes a moment to load, in which ctrl-C would be a traceback
import os
import sys

NEEDED = {"pydantic": "2.7", "yaml": "6.0", "rich": "13", "numpy": "1.26", "torch": "2.6", "safetensors": "0.4"}
"""What is imported -> its least version, as in pyproject.toml."""
PACKAGES = {"yaml": "pyyaml"}
"""Their names in an index, where they differ."""
LEAST = (3, 10)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100 - of an old Python too


def is_script() -> bool:
    """Whether one of launch/ or tools/ was started, or is as a command of an installation, and not imported."""
    began = getattr(sys.modules["__main__"], "__file__", None) or ""
    folder, name = os.path.split(os.path.abspath(began))  # noqa: PTH100
    return name.startswith("ddpm-") or f"{folder}/".startswith((f"{ROOT}/launch/", f"{ROOT}/tools/"))


if is_script() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until `run_script`, which has a word for it: no traceback


def speak_utf_8() -> None:
    """Start anew in Python's UTF-8 mode where the locale has another encoding, as en_US without .UTF-8: configs and
    runs are UTF-8, and so are the names of files on most systems. What is started here has that mode too, as have
    jobs."""
    if sys.version_info >= LEAST and not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def leave_other_pythons_out() -> None:
    """Take out of PYTHONPATH, for what is started here too, what is another Python's by its name, …/lib/python3.9/…:
    a module that was loaded for other work shows it to every Python, and none but its own can load it."""
    import re

    own = f"{sys.version_info[0]}.{sys.version_info[1]}"

    def is_anothers(path: str) -> bool:
        of = re.findall(r"/lib\d*/python(\d\.\d+)(?=/|$)", path)
        return bool(of) and own not in of

    shown = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in shown if is_anothers(path)]
    if others:
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in shown if path not in others)
        gone = [os.path.abspath(path) for path in others]  # noqa: PTH100 - as Python has written them
        sys.path[:] = [path for path in sys.path if path not in gone]


def lacking() -> str:
    """What this Python has not, in words; "" where it has all."""
    from importlib.util import find_spec

    if sys.version_info < LEAST:
        return f"Python {sys.version.split()[0]} is too old (3.10 to 3.14)"
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f"this Python ({sys.executable}) lacks {', '.join(missing)}"
    has = {name: _older(PACKAGES.get(name, name), least) for name, least in NEEDED.items()}
    old = [f"{name} {of} (pip install '{PACKAGES.get(name, name)}>={NEEDED[name]}')" for name, of in has.items() if of]
    return f"this Python ({sys.executable}) has too old {', '.join(old)}" if old else ""


def _older(package: str, least: str) -> str:
    """The version of a package that is older than `least`, of two numbers at most; "" if it is not, or says none."""
    import re
    from importlib.metadata import PackageNotFoundError, version

    try:
        has = version(package)
        numbers = [[int(n) for n in re.findall(r"\d+", text)[:2]] for text in (has, least)]
    except (PackageNotFoundError, TypeError):  # put there without its metadata, or with half of them
        return ""
    return has if numbers[0] and numbers[0] < numbers[1] else ""


def check() -> None:
    """Leave with exit code 3 and the line to type where something lacks."""
    told = lacking()
    if told:
        import shlex

        words = " ".join(shlex.quote(word) for word in ["python", *sys.argv])
        environment = shlex.quote(os.path.join(ROOT, "tools", "env.sh"))  # noqa: PTH118
        print(f"error: {told}: the environment is not there, or not active. Type:\n  . {environment} && {words}",
              file=sys.stderr)  # fmt: skip
        sys.exit(3)


if is_script():
    speak_utf_8()
    leave_other_pythons_out()
    check()
