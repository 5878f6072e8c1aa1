"""What the bench and the GPU's stages start does not outlive them, however they end."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import PROJECT

SLEEPER = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(100)"
WITH_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPER!r}, sys.argv[1]])"
ONE = "sys.executable, '-c', sleeper, there"
STARTS = {
    "a command of the bench": f"from tools.bench import commands; commands._said([{ONE}], {{}})",
    "a rank of the bench": "import multiprocessing; from tools.bench import ranks\n"
    "p = multiprocessing.get_context('fork').Process(target=ranks._rank, args=(there,)); p.start(); p.join()",
    "a stage on a GPU": "import pathlib; from tools.gpu.__main__ import bounded\n"
    f"bounded({{pathlib.Path(there + '.log'): [{ONE}]}}, 99)",
    "a run on a GPU": "import os, pathlib; from tools.gpu import trial; from ddpm.run.events import EventLog\n"
    "from launch.cluster import environment\n"
    "def lives(where, *_):\n"
    "    where.events.mkdir(parents=True)\n"
    f"    job = subprocess.Popen([{ONE}], env={{'DDPM_JOB': 'job'}}, start_new_session=True)\n"
    "    EventLog(where, 'job', 0, environment.host()).append('submitted', stage='train', via='local', pid=job.pid,\n"
    "        run=str(where.path))\n"
    "    time.sleep(99)\n"
    "trial.lives = lives; trial.run(pathlib.Path(there).parent, 99, pathlib.Path())",
}


@pytest.mark.parametrize("what", STARTS)
def test_what_is_started_dies_with_who_started_it(tmp_path: Path, what: str) -> None:
    there = tmp_path / "there"
    program = f"import subprocess, sys, time\nthere, sleeper = sys.argv[1:]\n{STARTS[what]}"
    if "rank" in what:  # does this in place of measuring
        program = program.replace("p = ", "ranks._measure = lambda there: exec(sleeper)\np = ")
    sleeper = WITH_A_CHILD if "stage" in what else SLEEPER
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program, str(there), sleeper], cwd=PROJECT, env=env)
    try:
        _until(there.exists, "it is started")
        _until(lambda: len(_of(there)) >= 2, "its words are there to be read")
        time.sleep(0.5)  # until what is started after it is
    finally:
        parent.kill()
        parent.wait()
    try:
        _until(lambda: not _of(there), "it is dead")
        _until(lambda: not list(tmp_path.glob("ddpm-trial-*")), "its run is removed")
    finally:
        for pid in _of(there):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_all_that_the_bench_starts_is_bound_to_it() -> None:
    calls = [
        (path.name, ast.unparse(node))
        for path in (PROJECT / "tools" / "bench").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("subprocess.run", "subprocess.Popen")
    ]
    assert calls and [call for call in calls if "preexec_fn=die_with_parent" not in call[1]] == []


def _of(word: Path) -> list[int]:
    """Processes that have this word in their command, or for a fork in their parent's."""
    found = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [int(words.parent.name)] if str(word).encode() in words.read_bytes().split(b"\0") else []
    return found


def _until(holds: object, what: str) -> None:
    ends = time.monotonic() + 60
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < ends, f"never: {what}"
        time.sleep(0.05)
