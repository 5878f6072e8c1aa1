"""Imports flow tools → launch → ddpm, never back; and what a login node loads."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
DDPM = sorted((PROJECT / "ddpm").glob("*.py"))
LAUNCH = sorted((PROJECT / "launch").glob("*.py"))
SCRIPTS = ["submit", "sample", "evaluate", "status", "board"]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").split(".")[0])
    return found


def names(path: Path) -> set[str]:
    """Attributes and names that a file uses: os.environ, getenv …"""
    tree = ast.parse(path.read_text())
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return attributes | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


def test_there_is_something_to_check() -> None:
    assert len(DDPM) > 15 and len(LAUNCH) > 10


@pytest.mark.parametrize("path", DDPM, ids=lambda p: p.stem)
def test_the_library_knows_no_launcher_no_scheduler_and_no_environment(path: Path) -> None:
    assert not imported(path) & {"launch", "tools", "tests", "submitit", "."}
    assert not names(path) & {"environ", "getenv", "environb", "putenv"}
    assert not {"signal", "argparse"} & imported(path)
    code = ast.unparse(ast.parse(path.read_text()))
    assert "SLURM_" not in code and "squeue" not in code and "scontrol" not in code


@pytest.mark.parametrize("path", LAUNCH, ids=lambda p: p.stem)
def test_the_launcher_knows_no_tools(path: Path) -> None:
    assert not imported(path) & {"tools", "tests", "."}


def test_slurm_and_configs_are_data() -> None:
    assert not [p for d in ("slurm", "configs") for p in (PROJECT / d).rglob("*.py")]


def loads(code: str) -> set[str]:
    """Which of the heavy packages `code` loads in a new Python."""
    watched = ["torch", "torchvision", "sklearn", "scipy", "submitit", "tensorboard", "PIL"]
    probe = f"import sys, json\n{code}\nprint('#' + json.dumps([m for m in {watched} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=PROJECT, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rsplit("#", 1)[1]))


def test_importing_the_package_and_what_reads_runs_loads_no_torch() -> None:
    modules = "ddpm, ddpm.config, ddpm.rundir, ddpm.errors, ddpm.fence, ddpm.data"
    assert not loads(f"import {modules}") & {"torch", "torchvision", "sklearn", "scipy"}


def test_importing_every_script_loads_no_torch() -> None:
    modules = ", ".join(f"launch.{p.stem}" for p in LAUNCH if p.stem != "__init__")
    assert not loads(f"import {modules}") & {"torch", "torchvision", "sklearn", "scipy"}


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["submit", "--dry-run"]], ids=" ".join)
def test_help_status_and_dry_run_load_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    calls = {
        "--help": [[s, "--help"] for s in SCRIPTS],
        "status": [["status", "--root", str(tmp_path)]],
        "submit": [["submit", "--dry-run", "--cluster", "local", "--root", str(tmp_path)]],
    }[arguments[0]]
    code = "import runpy\n"
    for script, *rest in calls:
        code += f"sys.argv = {[script, *rest]!r}\ntry: runpy.run_path('launch/{script}.py', run_name='__main__')\n"
        code += "except SystemExit as e: assert not e.code, e.code\n"
    assert not loads(code) & {"torch", "torchvision", "sklearn", "scipy"}
