"""A wheel built from the tree: every room is in it, and imports where the project's folder is not."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest

from launch.commands import SCRIPTS
from tests.cli.harness import TINY
from tests.conftest import PROJECT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
IMPORT = """
import importlib, json, sys
print(json.dumps([importlib.import_module(name).__file__ for name in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("ddpm", "launch", "tools", "tests", "slurm", "configs"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel, unpacked: what an installation of it puts beside the packages that it needs."""
    with zipfile.ZipFile(built) as archive:
        archive.extractall(built.with_name("unpacked"))
    return built.with_name("unpacked")


def test_it_holds_the_two_packages_with_all_their_files_and_nothing_else(wheel: Path) -> None:
    inside = {p.relative_to(wheel) for p in wheel.rglob("*.py")}
    assert inside == {p.relative_to(PROJECT) for top in ("ddpm", "launch") for p in (PROJECT / top).rglob("*.py")}
    assert {p.name.split("-")[0] for p in wheel.iterdir()} == {"ddpm", "launch", "ddpm_hpc"}
    (shared,) = wheel.glob("*.data/data/share/ddpm-hpc")
    there = {p.relative_to(shared) for p in shared.rglob("*") if p.is_file()}
    meant = {p for top in ("slurm", "configs") for p in (PROJECT / top).rglob("*") if p.suffix != ".md" and p.is_file()}
    assert {p for p in there if p.suffix != ".md"} == {p.relative_to(PROJECT) for p in meant}


def test_every_package_and_module_of_it_imports(wheel: Path, tmp_path: Path) -> None:
    files = sorted(wheel.rglob("*.py"))
    modules = [".".join(p.relative_to(wheel).with_suffix("").parts).removesuffix(".__init__") for p in files]
    command, env = [sys.executable, "-c", IMPORT], {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(command, input=json.dumps(modules), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [str(p) for p in files]


@pytest.mark.long
def test_an_installation_needs_no_checkout(built: Path, tmp_path: Path) -> None:
    """Its commands train a run, whose jobs run the installed code and its templates."""
    options = ["--no-deps", "--no-index", "--ignore-installed"]  # else pip removes the project from this environment
    install = [sys.executable, "-m", "pip", "install", *options, "--prefix", str(tmp_path), str(built)]
    assert subprocess.run(install, capture_output=True).returncode == 0
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    (packages / "numpy").symlink_to(Path(numpy.__file__).parent)  # as others lie beside it
    where = tmp_path / "elsewhere"
    where.mkdir()
    (where / "tiny.yaml").write_text(TINY)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "DDPM", "PYTHON"))}
    env = {**kept, "PYTHONPATH": str(packages), "DDPM_CPUS": "1"}

    def command(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(tmp_path / "bin" / f"ddpm-{name}"), *words]
        return subprocess.run(argv, cwd=where, env=env, capture_output=True, text=True, timeout=240)

    done = command("submit", "tiny.yaml", "train.total_steps=3", "--cluster", "local", "--wait")
    run = where / "runs" / "tiny"
    assert done.returncode == 0 and (run / "checkpoints" / "step-000000003.pt").is_file(), done.stderr
    assert "complete" in command("status", "tiny").stdout
    recipe = command("submit", "--cluster", "slurm", "--via", "sbatch", "--dry-run", "--verbose")
    assert "slurm/train.sbatch" in recipe.stdout and "#SBATCH" in recipe.stdout, recipe.stderr
    assert command("submit", "--list").stdout.count("cifar10") > 3


def test_each_script_is_a_command_of_an_installation() -> None:
    lines = re.findall(r'^(ddpm-\w+) = "(launch\.commands:\w+)"$', (PROJECT / "pyproject.toml").read_text(), re.M)
    scripts = {p.stem for p in (PROJECT / "launch").glob("*.py") if p.read_text().startswith("#!")}
    assert dict(lines) == {f"ddpm-{name}": f"launch.commands:{name}" for name in scripts} and set(SCRIPTS) == scripts
