"""tools/env.sh, as far as it goes without an installation."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PROJECT, requires


def test_an_extra_that_there_is_not_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(PROJECT / "tools" / "env.sh", tmp_path / "tools")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        ["bash", str(tmp_path / "tools" / "env.sh"), "digits,nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "no extra 'nonsense'; there are digits, " in done.stderr, done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose .venv has a Python that only notes how it was called, and whose last installation is old."""
    here = tmp_path / "a project"
    (here / "tools").mkdir(parents=True)
    (here / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(PROJECT / "tools" / "env.sh", here / "tools")
    shutil.copy(PROJECT / "pyproject.toml", here)
    python = here / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@ PYTHONPATH=$PYTHONPATH" >>"{tmp_path}/called"\n')
    python.chmod(0o755)
    (here / ".venv" / ".ddpm-stamp").write_text("old\n")
    (here / ".venv" / "install.log").write_text("of the last one\n")
    return here


SHELLS = {
    "as it is": "",
    "errexit and nounset": "set -eu",
    "noclobber": "set -o noclobber",
    "a glob that must match": "shopt -s failglob nullglob",
    "aliases": "shopt -s expand_aliases; alias mv='false' cd='false' bash='false' sed='false'",
    "a cd of its own": 'cd() { builtin cd "$@" && ls; }',
    "a CDPATH": "export CDPATH=/:.; mkdir -p ../elsewhere/tools; CDPATH=../elsewhere:.",
    "other separators": "IFS=/.",
    "a noisy BASH_ENV": "echo 'echo welcome; cd /' >../noisy; export BASH_ENV=$PWD/../noisy",
}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("how", SHELLS)
def test_sourced_it_installs_and_puts_its_python_first_whatever_the_shell_is_set_to(
    project: Path, shell: str, how: str
) -> None:
    requires(shutil.which(shell), f"no {shell}", f"install {shell}")
    words = SHELLS[how]
    if shell == "zsh":
        words = words.replace("shopt -s failglob nullglob", "setopt nomatch").replace("shopt -s expand_aliases; ", "")
    script = f'{words}\n. tools/env.sh\nprintf "%s\\n" "$VIRTUAL_ENV" "${{PATH%%:*}}"\n'
    done = subprocess.run([shell, "-c", script], cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == [f"{project}/.venv", f"{project}/.venv/bin"], done.stdout
    digest = hashlib.sha256((project / "pyproject.toml").read_bytes()).hexdigest()
    assert (project / ".venv" / ".ddpm-stamp").read_text().split() == [digest]


def test_what_a_module_shows_another_python_is_neither_taken_for_installed_nor_left_in_the_way(project: Path) -> None:
    env = {**os.environ, "PYTHONPATH": "/apps/python/3.9/site-packages", "PYTHONHOME": "/apps/python"}
    script = '. tools/env.sh; echo "home=${PYTHONHOME-none} path=$PYTHONPATH"'
    done = subprocess.run(["bash", "-c", script], cwd=project, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("home=none path=/apps/python/3.9/site-packages\n"), done.stdout + done.stderr
    (installed,) = [line for line in (project.parent / "called").read_text().splitlines() if "pip install" in line]
    assert installed.endswith(" PYTHONPATH=")


@pytest.mark.parametrize("script", ["tools/quickstart.sh", "tools/test.sh", ".ci/run"])
def test_a_script_finds_its_own_project_though_the_user_has_a_cdpath(tmp_path: Path, script: str) -> None:
    here = tmp_path / "project"
    (here / ".venv" / "bin").mkdir(parents=True)
    for name in ("tools", ".ci"):
        (here / name).mkdir()
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
    shutil.copy(PROJECT / script, here / script)
    for stub in {"tools/env.sh", "tools/test.sh", ".venv/bin/python"} - {script}:
        (here / stub).write_text("#!/bin/sh\npwd\nexit 7\n")
        (here / stub).chmod(0o755)
    env = {**os.environ, "CDPATH": str(tmp_path / "elsewhere")}
    done = subprocess.run(["bash", script], cwd=here, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{here}\n", done.stdout + done.stderr
