"""Where a user may have results written: never over what is not theirs to replace, nor into a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.cli.harness import Shell, png, snapshot
from tests.conftest import PROJECT

INTO_A_RUN = {
    "evaluate.py --keep": ("launch/evaluate.py", "--images", "{images}", "--reference", "{images}", "--keep", "{run}"),
    "evaluate.py --keep, deeper": (
        *("launch/evaluate.py", "--images", "{images}", "--reference", "{images}", "--keep", "{run}/samples"),
    ),
    "evaluate.py --images --save-stats": (
        *("launch/evaluate.py", "--images", "{images}", "--save-stats", "{run}/eval/x.npz", "--extractor", "pixels"),
    ),
    "evaluate.py --save-stats": ("launch/evaluate.py", "{run}", "--save-stats", "{run}/x.npz"),
    "export.py": ("launch/export.py", "{run}", "{run}/exported"),
    "report.py --out": ("launch/report.py", "{run}", "--out", "{run}/logs/x.html"),
    "unpack_data.py": ("tools/unpack_data.py", "configs/quickstart.yaml", "{run}/samples/x"),
    "convert_diffusers.py OUT": ("tools/convert_diffusers.py", "{images}", "{run}/start.safetensors"),
    "convert_diffusers.py --run": ("tools/convert_diffusers.py", "{images}", "x.safetensors", "--run", "{run}/x"),
    "inspect_config.py --plot": ("tools/inspect_config.py", "configs/quickstart.yaml", "--plot", "{run}/x.svg"),
    "bench --json": ("-m", "tools.bench", "--minutes", "0", "--json", "{run}/x.json"),
    "chaos --json": ("-m", "tools.chaos", "--list", "--json", "{run}/x.json"),
    "gpu --out": ("-m", "tools.gpu", "--stages", "bench", "--minutes", "0.001", "--out", "{run}"),
}


@pytest.fixture
def places(shell: Shell) -> dict[str, Path]:
    run, images = shell.root / "tiny", shell.cwd / "images"
    for folder in (run / "checkpoints", run / "samples", run / "eval", run / "logs", images):
        folder.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text((shell.cwd / "tiny.yaml").read_text())
    for i in range(3):
        (images / f"{i}.png").write_bytes(png(seed=i))
    return {"run": run, "images": images}


def refused(shell: Shell, places: dict[str, Path], *words: str) -> str:
    before = snapshot(shell.cwd), snapshot(shell.root)
    argv = [sys.executable, *(word.format(**places) for word in words)]
    done = forked.run(argv, PROJECT, shell.command("")[1]["env"], timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert (snapshot(shell.cwd), snapshot(shell.root)) == before
    return done.stderr


@pytest.mark.parametrize("what", INTO_A_RUN)
def test_results_that_a_user_names_go_into_no_run(shell: Shell, places: dict[str, Path], what: str) -> None:
    assert "lies in run tiny; name a place outside of runs" in refused(shell, places, *INTO_A_RUN[what])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("launch/report.py", "{run}", "--out"), "index.html"),
        (("-m", "tools.bench", "--minutes", "0", "--json"), "mine.json"),
        (("-m", "tools.chaos", "--list", "--json"), "mine.json"),
    ],
)
def test_what_another_program_has_written_is_not_replaced(
    shell: Shell, places: dict[str, Path], words: tuple[str, ...], name: str
) -> None:
    (shell.cwd / name).write_text(json.dumps({"rows": "mine"}))
    assert "exists, and is no" in refused(shell, places, *words, str(shell.cwd / name))
