"""`submit.py --list`: every recipe on one line, from the config files alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.errors import RequestError
from launch.terminal import recipes
from tests.cli.harness import PROJECT, Shell
from tests.cli.test_dry_run import imports

RECIPES = sorted((PROJECT / "configs").glob("*.yaml"))


def rows(text: str) -> dict[str, str]:
    """The table's lines by their first word, up to the empty line before the footnote."""
    return {line.split()[0]: line for line in text.partition("\n\n")[0].splitlines()}


# measured on an idle 2-core machine: 0.42 s for ten recipes
def test_the_list_loads_no_torch_needs_no_slurm_and_writes_nothing(shell: Shell) -> None:
    text, loaded = imports(shell, "submit", "--list")
    assert loaded.isdisjoint({"torch", "torchvision", "numpy", "sklearn", "PIL"})
    assert not shell.root.exists()
    assert rows(text).keys() == {"recipe", *(p.stem for p in RECIPES)}


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_no_column_is_cropped_in_a_terminal_of_any_width(shell: Shell, columns: int) -> None:
    argv, options = shell.command("submit", "--list")
    command = f"import pty, sys; sys.exit(pty.spawn({argv}))"
    options["env"] |= {"COLUMNS": str(columns), "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0 and "…" not in done.stdout
    table = done.stdout.replace("\r", "").partition("\n\n")[0].splitlines()
    assert max(map(len, table)) <= max(columns, 80)
    first_words = [line.split()[0] for line in table if not line.startswith(" ")]
    assert first_words == ["recipe", *sorted(p.stem for p in RECIPES)]
    text = " ".join(word for line in table for word in line.split())
    for cell in ("celeba 128x128", "171.3 M", "800,000 steps", "3.17 for"):
        assert cell in text
    if columns >= 100:
        assert "3.17 for 50,000 samples" in text and "A published project" not in text


def test_a_pipe_gets_plain_lines_that_are_not_wrapped(shell: Shell) -> None:
    text = shell("submit", "--list").stdout
    assert "\x1b" not in text
    (cifar10,) = [line for line in text.splitlines() if line.startswith("cifar10 ")]
    assert " ".join(cifar10.split()).startswith("cifar10 cifar10 32x32 35.7 M 128 800,000 steps ")
    assert " ".join(cifar10.split()).endswith(" 3.17 for 50,000 samples")
    assert "600 epochs" in rows(text)["cifar10-accumulate"] and "50.45 for 5,000 samples" in text
    assert "memory: an estimate" in text and "python tools/inspect_config.py" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_header_is_understood(path: Path) -> None:
    recipe = recipes.read(path)
    assert f"Network: {recipe.config.network.num_parameters:,} parameters" in recipes.header(path.read_text())
    if path.stem != "quickstart":  # made here, not reported by anyone
        assert recipe.fid


def test_reported_scores_are_those_of_the_headers() -> None:
    reported = {p.stem: recipes.read(p).fid for p in RECIPES}
    assert {name: fid for name, fid in reported.items() if fid not in ("", "none")} == {
        "cifar10": "3.17 for 50,000 samples",
        "cifar10-64-standard": "114.8",
        "cifar10-64-attention": "100.2 at epoch 180",
        "cifar10-accumulate": "50.45 for 5,000 samples",
    }


def test_what_a_header_does_not_say_is_a_dash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("# My own network.\ntrain: {total_images: 1000000}\n")
    (tmp_path / "bare.yaml").write_text("seed: 1\n")
    recipes.print_table(tmp_path)
    table = rows(capsys.readouterr().out)
    assert table["mine"].split() == ["mine", "cifar10", "32x32", "35.7", "M", "128", "1,000,000", "images", "-", "-"]
    assert table["bare"].split() == ["bare", "cifar10", "32x32", "35.7", "M", "128", "800,000", "steps", "-", "-"]


def test_numbers_in_a_header_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "told.yaml").write_text(
        '# Doe, Roe 2031, "A [bold] title": a network.\n#\n# They report\n'
        "# FID 4.2. Memory: 3.5 GiB.\nname: told\nmodel: {base_channels: 64}\n# Memory: 9 GiB: no header any more\n"
    )
    recipes.print_table(tmp_path)
    told = rows(capsys.readouterr().out)["told"]
    wanted = "told cifar10 32x32 9.0 M 128 800,000 steps 3.5 4.2"
    assert " ".join(told.split()) == wanted


def test_a_recipe_that_is_no_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: {lerning_rate: 1}\n")
    with pytest.raises(RequestError, match=r"bad\.yaml: .*train\.lerning_rate"):
        recipes.print_table(tmp_path)
