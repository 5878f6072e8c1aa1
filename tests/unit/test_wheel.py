"""A wheel built from the tree: every room is in it, and imports where the project's folder is not."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import PROJECT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
IMPORT = """
import importlib, json, sys
print(json.dumps([importlib.import_module(name).__file__ for name in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked: what an installation of it puts beside the packages that it needs."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("ddpm", "launch", "tools", "tests"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    built = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def test_it_holds_the_two_packages_with_all_their_files_and_nothing_else(wheel: Path) -> None:
    inside = {p.relative_to(wheel) for p in wheel.rglob("*.py")}
    assert inside == {p.relative_to(PROJECT) for top in ("ddpm", "launch") for p in (PROJECT / top).rglob("*.py")}
    assert {p.name.split("-")[0] for p in wheel.iterdir()} == {"ddpm", "launch", "ddpm_hpc"}


def test_every_package_and_module_of_it_imports(wheel: Path, tmp_path: Path) -> None:
    files = sorted(wheel.rglob("*.py"))
    modules = [".".join(p.relative_to(wheel).with_suffix("").parts).removesuffix(".__init__") for p in files]
    command, env = [sys.executable, "-c", IMPORT], {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(command, input=json.dumps(modules), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [str(p) for p in files]
