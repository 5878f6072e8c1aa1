"""Ctrl-C while a script loads what it needs, and a reader that has read enough: neither is a traceback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.cli.harness import Shell
from tests.conftest import PROJECT

SCRIPTS = [
    path.relative_to(PROJECT).as_posix()
    for folder in ("launch", "tools")
    for path in sorted((PROJECT / folder).glob("*.py"))
    if "\n    console.run_script(main)" in path.read_text()
]
MODULES = [
    "launch.jobs",
    "tools.bench",
    "tools.bench.commands",
    "tools.bench.interval",
    "tools.bench.sampler_orders",
    "tools.chaos",
    "tools.gpu",
    "tools.gpu.targets",
]


def command(shell: Shell, script: str, *words: str) -> tuple[list[str], dict[str, Any]]:
    options = shell.command("")[1]
    options["env"].pop("PYTHONUNBUFFERED", None)
    argv = ["-m", script] if script in MODULES else [str(PROJECT / script)]
    return [sys.executable, *argv, *words], {**options, "cwd": PROJECT, "stderr": subprocess.PIPE, "text": True}


def test_there_are_scripts_to_try_and_modules_end_as_they_do() -> None:
    assert {"launch/submit.py", "launch/status.py", "tools/prefetch.py", "tools/unpack_data.py"} <= set(SCRIPTS)
    for module in MODULES:
        path = PROJECT / module.replace(".", "/")
        text = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        assert re.search(r"\n    console\.run_script\((lambda: )?main", text), module


@pytest.mark.parametrize("script", ["launch/submit.py", "launch/status.py", "tools/unpack_data.py", *MODULES])
def test_ctrl_c_while_a_script_loads_what_it_needs_is_no_traceback(shell: Shell, script: str) -> None:
    for module in ("yaml", "torch", "numpy"):  # whichever of them it loads first
        text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
        (shell.cwd / f"{module}.py").write_text(text)
    argv, options = command(shell, script)
    options["env"]["PYTHONPATH"] = str(shell.cwd)
    done = subprocess.run(argv, stdout=subprocess.PIPE, **options)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("script", [*SCRIPTS, "launch.jobs", "tools.chaos"])
def test_a_reader_that_has_read_enough_ends_a_script_well(shell: Shell, script: str) -> None:
    read, write = os.pipe()
    os.close(read)
    asked = {"launch/submit.py": [["--help"], ["--list"]], "tools.chaos": [["--list"]]}
    for words in asked.get(script, [["--help"]]):
        argv, options = command(shell, script, *words)
        done = subprocess.run(argv, stdout=write, **options)
        assert (done.returncode, done.stderr) == (0, ""), (script, words)
    os.close(write)
