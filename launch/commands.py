"""The scripts as commands of an installation: `ddpm-submit` is launch/submit.py, and so on."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import launch.first  # noqa: F401 - before all that takes time
from launch.terminal import console

SCRIPTS = (
    "board",
    "cancel",
    "doctor",
    "evaluate",
    "export",
    "logs",
    "recover",
    "remove",
    "report",
    "sample",
    "status",
    "submit",
)
"""The scripts that are commands, as pyproject.toml lists them."""


def __getattr__(name: str) -> Callable[[], None]:
    if name not in SCRIPTS:
        raise AttributeError(name)
    main = importlib.import_module(f"launch.{name}").main
    return lambda: console.run_script(main)
