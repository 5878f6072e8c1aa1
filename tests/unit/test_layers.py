"""The rooms: imports go one way and in no circle, each file is in README's tree; and what a login node loads."""

import ast
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT

ROOMS = {
    "ddpm": ("errors", "run", "config", "diffusion", "network", "data", "sampling", "training", "scoring", "api"),
    "launch": ("cluster", "checkup", "queue", "terminal", "page", "prepare", "life", "scripts"),
}
"""From the ground up: a file imports from its own room, or from one before it. `scripts`: what lies in launch/ itself.
And tools imports from launch, launch from ddpm, never back."""
TOPS = ("ddpm", "launch", "tools")
FOREIGN = ("SLURM", "srun", "squeue", "scontrol", "scancel", "sbatch", "DDPM_", "launch/")
"""What ddpm/ has no word of, in comments and messages either: whoever starts it says these."""
COMMANDS = ("sbatch", "scontrol", "squeue", "scancel", "sinfo", "sacct", "sacctmgr", "srun")
WHO_COMMANDS = ("launch/cluster/",)
"""The only place in launch/ where a command of the scheduler's is put together."""
BEHIND = tuple(f"launch.cluster.{name}" for name in ("slurm", "by_", "reasons", "partitions"))
"""How the names of the modules begin that stand behind launch/cluster/scheduler.py, by which alone others come in."""
SCHEDULERS = ("slurm",)
"""Names that only launch/cluster/ compares anything with: the others ask whether a job is scheduled."""


# ---------------------------------------------------------------- the checks


def python_files(root: Path, *tops: str) -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for path in (p for top in tops for p in sorted((root / top).rglob("*.py"))):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """What a file imports when it is run, inside functions too; for the checker of types alone does not count."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        only_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        todo += node.orelse if only_typing else ast.iter_child_nodes(node)


def imported(path: Path) -> set[str]:
    """`a.b` of `import a.b` and `a.b.c` of `from a.b import c`; `.` of a relative import."""
    found = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            found |= {"." if node.level else f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages_of(path: Path) -> set[str]:
    """The first words of what a file imports; `.` of a relative import."""
    return {name.split(".")[0] or "." for name in imported(path)}


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the project's modules that it imports; the packages around a module do not count."""
    modules = python_files(root, *TOPS)
    edges = {}
    for module, path in modules.items():
        found = {name if name in modules else name.rpartition(".")[0] for name in imported(path)}
        edges[module] = (found & modules.keys()) - {module}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A path of imports that comes back to where it began; [] where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges[module]):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := walk(module, []))), [])


def place(module: str) -> tuple[int, int]:
    """Where a module stands: its top's place, then its room's. A package of a top itself stands above its rooms."""
    top, *rest = module.split(".")
    rooms = ROOMS.get(top, ())
    if not rest or not rooms:
        return TOPS.index(top), len(rooms)
    room = rest[0] if rest[0] in rooms or len(rest) > 1 or "scripts" not in rooms else "scripts"
    return TOPS.index(top), rooms.index(room)


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a room above, or from a top that is: `a -> b`."""
    return [f"{m} -> {n}" for m in sorted(edges) for n in sorted(edges[m]) if place(n) > place(m) and n not in TOPS]


def names(path: Path) -> set[str]:
    """Attributes and names that a file uses: os.environ, getenv …"""
    tree = ast.parse(path.read_text())
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return attributes | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


def foreign(path: Path) -> set[str]:
    """What a file of ddpm/ must know nothing of, and does."""
    text = path.read_text()
    packages = packages_of(path) & {"submitit", "signal", "argparse", "."}
    variables = names(path) & {"environ", "getenv", "environb", "putenv"}
    return packages | variables | {word for word in FOREIGN if word in text}


def commands_elsewhere(root: Path) -> list[str]:
    """Lists in launch/, but for WHO_COMMANDS, that begin with a command of the scheduler's: `file: command`."""
    told = []
    for path in python_files(root, "launch").values():
        where = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            first = node.elts[0] if isinstance(node, ast.List | ast.Tuple) and node.elts else None
            if isinstance(first, ast.Constant) and first.value in COMMANDS and not where.startswith(WHO_COMMANDS):
                told.append(f"{where}: {first.value}")
    return told


def past_the_door(edges: dict[str, set[str]]) -> list[str]:
    """Imports of what is BEHIND from outside its room: `a -> b`."""
    outside = [module for module in sorted(edges) if not module.startswith("launch.cluster.")]
    return [f"{m} -> {n}" for m in outside for n in sorted(edges[m]) if n.startswith(BEHIND)]


def compared_elsewhere(root: Path) -> list[str]:
    """Comparisons with a scheduler's name in launch/ and tools/, but for launch/cluster/: `file: comparison`."""
    told = []
    for path in python_files(root, "launch", "tools").values():
        where = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue) and not where.startswith("launch/cluster/"):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                told += [f"{where}: {ast.unparse(node)}"] if words & set(SCHEDULERS) else []
    return told


def listed(readme: str) -> list[str]:
    """The files in the tree of README's "Where things are": two spaces deeper is one folder deeper."""
    section = readme.split("## Where things are", 1)[1].split("\n## ", 1)[0]
    block = next(b for b in re.findall(r"^```\n(.*?)^```", section, re.M | re.S) if b.startswith("ddpm/"))
    found, folders = [], [""]
    for line in block.splitlines():
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2 + 1]
        if name.endswith("/"):
            folders.append(folders[-1] + name)
        elif name.endswith(".py"):
            found.append(folders[-1] + name)
    return found


# ---------------------------------------------------------------- of this project

FILES = python_files(PROJECT, *TOPS)
DDPM = {module: path for module, path in FILES.items() if module.split(".")[0] == "ddpm"}
HEAVY = ("ddpm.run.saving", "ddpm.run.images")  # for who has tensors and pictures
SCRIPTS = [
    *("submit", "sample", "evaluate", "status", "board", "logs", "cancel", "remove", "export", "report", "doctor"),
    "recover",
]


def test_there_is_something_to_check() -> None:
    assert len(DDPM) > 40 and len(python_files(PROJECT, "launch")) > 25 and len(graph(PROJECT)["launch.jobs"]) > 0


def test_no_imports_go_in_a_circle() -> None:
    assert circle(graph(PROJECT)) == []


def test_imports_go_down_or_stay_in_their_room() -> None:
    assert upward(graph(PROJECT)) == []
    assert not [module for module, path in FILES.items() if packages_of(path) & {"tests", "."}]


@pytest.mark.parametrize("module", DDPM)
def test_the_library_knows_no_launcher_no_scheduler_and_no_environment(module: str) -> None:
    assert foreign(DDPM[module]) == set()


def test_the_schedulers_commands_are_put_together_in_one_place() -> None:
    assert commands_elsewhere(PROJECT) == []


def test_whoever_asks_the_scheduler_comes_in_by_one_door() -> None:
    edges = graph(PROJECT)
    assert past_the_door(edges) == [] and any(n.startswith(BEHIND) for n in edges["launch.cluster.scheduler"])


def test_nobody_else_asks_which_scheduler_it_is() -> None:
    assert compared_elsewhere(PROJECT) == []


def test_slurm_and_configs_are_data() -> None:
    assert not [p for d in ("slurm", "configs") for p in (PROJECT / d).rglob("*.py")]


TYPED = [p for room in ("launch", "tools") for p in sorted((PROJECT / room).glob("*.py")) if p.read_text()[:2] == "#!"]
"""The scripts that a user types."""


@pytest.mark.parametrize("path", [PROJECT / "launch" / "first.py", *TYPED], ids=lambda path: path.stem)
def test_pythons_that_are_too_old_read_what_is_typed_and_so_come_to_say_that_they_are(path: Path) -> None:
    """As the python3 of RHEL 8, 3.6, for which an import of annotations is a syntax error."""
    tree = ast.parse(path.read_text(), feature_version=(3, 6))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    assert len(TYPED) > 15


def test_every_file_stands_in_the_readmes_tree_once_and_is_there() -> None:
    there = {p.relative_to(PROJECT).as_posix() for top in ("ddpm", "launch") for p in (PROJECT / top).rglob("*.py")}
    there = {path for path in there if not path.endswith("/__init__.py")}
    in_readme = listed((PROJECT / "README.md").read_text())
    assert sorted(there - set(in_readme)) == [] and sorted(set(in_readme) - there) == []
    assert [path for path, num in Counter(in_readme).items() if num > 1] == []


# ---------------------------------------------------------------- that they notice


def tree(root: Path, **files: str) -> Path:
    """A project of these files: ddpm__run__files="import os"."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
    return root


def test_a_circle_is_noticed_also_inside_functions_and_not_for_types_alone(tmp_path: Path) -> None:
    hidden = "def f():\n    from ddpm.run import paths\n"
    there = tree(tmp_path / "a", ddpm__run__files=hidden, ddpm__run__paths="from ddpm.run.files import f")
    assert circle(graph(there)) == ["ddpm.run.files", "ddpm.run.paths", "ddpm.run.files"]
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ddpm.run import paths\n"
    assert circle(graph(tree(tmp_path / "b", ddpm__run__files=types, ddpm__run__paths="import ddpm.run.files"))) == []


def test_an_import_from_above_is_noticed(tmp_path: Path) -> None:
    there = tree(
        tmp_path,
        ddpm__run__state="from ddpm.config.schema import Config",
        ddpm__config__schema="from ddpm.run import files",
        ddpm__run__files="import launch.status",
        launch__status="from ddpm import api",
        launch__queue__chain="from launch import status",
        launch__cluster__slurm="import tools.unpack_data",
        tools__unpack_data="from launch import status",
        ddpm__api="import ddpm",
    )
    assert upward(graph(there)) == [
        "ddpm.run.files -> launch.status",
        "ddpm.run.state -> ddpm.config.schema",
        "launch.cluster.slurm -> tools.unpack_data",
        "launch.queue.chain -> launch.status",
    ]


@pytest.mark.parametrize(
    "text, word",
    [
        ("# under SLURM\n", "SLURM"),
        ('"""See launch/status.py."""\n', "launch/"),
        ('print("scancel 17")\n', "scancel"),
        ("ROOT = 'DDPM_RUNS'\n", "DDPM_"),
        ("import os\nos.environ\n", "environ"),
        ("def f():\n    import signal\n", "signal"),
        ("from . import paths\n", "."),
    ],
)
def test_a_word_of_the_launchers_is_noticed(tmp_path: Path, text: str, word: str) -> None:
    assert foreign(tree(tmp_path, ddpm__x=text) / "ddpm/x.py") == {word}


@pytest.mark.parametrize("text", ['["scancel", job]', '["sbatch", *words]', 'run(("srun", "-n1"))'])
def test_a_command_of_the_schedulers_is_noticed(tmp_path: Path, text: str) -> None:
    there = tree(tmp_path, launch__queue__chain=text, launch__cluster__by_template=text, launch__cluster__slurm=text)
    assert [line.split(":")[0] for line in commands_elsewhere(there)] == ["launch/queue/chain.py"]


def test_a_way_around_the_door_is_noticed(tmp_path: Path) -> None:
    there = tree(
        tmp_path,
        launch__status="from launch.cluster import scheduler, slurm",
        launch__queue__chain="def f():\n    from launch.cluster.by_template import submit\n",
        launch__cluster__scheduler="from launch.cluster import slurm, by_template",
        launch__cluster__slurm="",
        launch__cluster__by_template="",
        tools__chaos="from launch.cluster.slurm_orders import cancel",
        launch__cluster__slurm_orders="",
    )
    assert past_the_door(graph(there)) == [
        "launch.queue.chain -> launch.cluster.by_template",
        "launch.status -> launch.cluster.slurm",
        "tools.chaos -> launch.cluster.slurm_orders",
    ]


@pytest.mark.parametrize(
    "text",
    ['x == "slurm"', 'x.scheduler != "slurm"', 'x in ("local", "slurm")', 'match x:\n    case "slurm":\n        pass'],
)
def test_a_comparison_with_a_schedulers_name_is_noticed(tmp_path: Path, text: str) -> None:
    there = tree(tmp_path, launch__life=text, launch__cluster__environment=text, tools__a='X = "slurm"')
    assert [line.split(":")[0] for line in compared_elsewhere(there)] == ["launch/life.py"]


def test_the_tree_in_the_readme_is_read_by_its_folders() -> None:
    block = "ddpm/\n  api.py   load\n  run/\n    files.py   x\nlaunch/\n  jobs.py  y\n"
    text = f"# A\n## Where things are\n\n```\n{block}```\n\n## Next\n"
    assert listed(text) == ["ddpm/api.py", "ddpm/run/files.py", "launch/jobs.py"]


# ---------------------------------------------------------------- what a login node loads


def loads(code: str) -> set[str]:
    """Which of the heavy packages `code` loads in a new Python."""
    watched = ["torch", "torchvision", "sklearn", "scipy", "submitit", "tensorboard", "PIL"]
    probe = f"import sys, json\n{code}\nprint('#' + json.dumps([m for m in {watched} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=PROJECT, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rsplit("#", 1)[1]))


def test_importing_the_package_and_what_reads_runs_loads_no_torch() -> None:
    light = [m for m in DDPM if m.split(".")[1:2] in ([], ["config"], ["run"], ["errors"]) and m not in HEAVY]
    modules = ", ".join([*light, "ddpm.data.packed", "ddpm.sampling.request", "ddpm.sampling.shards"])
    assert not loads(f"import {modules}") & {"torch", "torchvision", "sklearn", "scipy"}


def test_importing_every_script_loads_no_torch() -> None:
    modules = ", ".join(f"launch.{s}" for s in (*SCRIPTS, "jobs", "prepare"))
    assert not loads(f"import {modules}") & {"torch", "torchvision", "sklearn", "scipy"}
