"""Names and values that a terminal, rich, a shell or SLURM would obey: shown as they are, or refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.harness import Shell, png, write_zip
from tests.conftest import PROJECT

ESCAPE = "\x1b[31m"


def in_utf_8(name: str) -> str:
    """What a file has to be called here to have that name in UTF-8, whatever the locale of these tests is."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--sbatch", "comment=a\n#SBATCH --wrap=x"], r"sbatch.comment = 'a\n#SBATCH --wrap=x': must be one line"),
        (["--partition", f"gpu{ESCAPE}"], r"partition = 'gpu\x1b[31m'"),
        (["--root", "runs\n#SBATCH --wrap=x"], r"runs\n#SBATCH --wrap=x': has control characters"),
        (["data.path=\udcff", "data.name=images"], "data.path"),
        (
            ["--sweep", f"train.lr=1,$(touch CANARY){ESCAPE}\n"],
            r"--sweep train.lr=1,$(touch CANARY)\x1b[31m\n: not valid",
        ),
        (["--root", "runs%j"], "SLURM reads % and \\ in a path as a pattern"),
    ],
)
def test_what_would_be_a_second_line_of_a_script_is_refused(shell: Shell, args: list[str], told: str) -> None:
    shell.put("sbatch", "exit 9")
    said = shell.refused("submit", "tiny.yaml", "--dry-run", *args)
    assert told in said and said.replace("\n", "").isprintable()


def test_a_profile_whose_values_have_several_lines_is_refused_and_its_setup_may_have_them(shell: Shell) -> None:
    (shell.cwd / "site.yaml").write_text('scratch: "/a\\nb"\n')
    assert "scratch" in shell.refused("submit", "tiny.yaml", "--dry-run", "--profile", "site.yaml")
    (shell.cwd / "site.yaml").write_text('setup: ["module load a\\nmodule load b", "export C=1"]\n')
    done = shell("submit", "tiny.yaml", "--prepare", "--cluster", "local", "--profile", "site.yaml")
    assert done.returncode == 0, done.stderr
    assert (shell.root / "tiny" / "setup.sh").read_text() == "module load a\nmodule load b\nexport C=1\n"


def test_classes_with_control_characters_are_shown_without_them(shell: Shell) -> None:
    write_zip(shell.cwd / "images.zip", {f"{ESCAPE}{c}\n/x{i}.png": png(8, i) for i, c in enumerate("ab")})
    said = shell.refused(
        "submit", "tiny.yaml", "--cluster", "local", "data.name=images", "data.path=images.zip", "model.num_classes=3"
    )
    assert said.rstrip("\n").isprintable(), said


def test_a_run_whose_folder_has_an_odd_name_is_shown_with_it(again: Shell) -> None:
    odd = ["[red]x", f"a{ESCAPE}b", ":smile:", "c\nd", "é\udcff"]
    for name in odd:
        shutil.copytree(again.root / "tiny", again.root / in_utf_8(name))
    done = again("status")
    assert done.returncode == 0 and done.stdout.replace("\n", "").isprintable(), done.stderr
    shown = {line.split()[0] for line in done.stdout.splitlines() if "400/400" in line}
    assert shown == {"tiny", "[red]x", "a\\x1b[31mb", ":smile:", "c\\nd", "é\\udcff"}
    rows = json.loads(again("status", "--json").stdout)
    assert {row["name"] for row in rows} == {"tiny", *odd}


def test_a_run_whose_folder_has_a_space_is_submitted_after_the_command_that_the_refusal_says(again: Shell) -> None:
    (again.root / "tiny").rename(again.root / "my run")
    (again.root / "my-run").mkdir()
    said = again.refused("submit", "my run", "--cluster", "local")
    told = "run name 'my run' is not allowed: use 1 to 100 of A-Z a-z 0-9 . _ - and do not begin with a dot. "
    assert said.startswith(f"error: {told}While nothing of it is at work, rename it"), said
    subprocess.run(shlex.split(said.rpartition(": ")[2]), check=True)
    done = again("submit", "my-run-2", "--cluster", "local")
    assert done.returncode == 0 and "run my-run-2 is complete" in done.stdout, done.stdout + done.stderr


def test_the_commands_that_messages_say_work_where_the_folder_of_the_runs_has_a_space(again: Shell) -> None:
    again.root = again.root.rename(again.root.with_name("my runs"))
    run = again.root / "tiny"
    shutil.rmtree(run / "samples")
    (run / "checkpoints" / "step-000000400.json").unlink()
    (run / "checkpoints" / "step-000000200.json").unlink()
    for script in ("evaluate", "submit"):
        said = again.refused(script, str(run))
        commands = re.findall(rf"python (launch/\w+\.py \S*(?: \S+)?{run.name}\S*)", said)
        assert commands and all(shlex.split(command)[1] == str(run) for command in commands), said


def test_a_reason_with_control_characters_is_shown_without_them(again: Shell) -> None:
    event = {"event": "failed", "time": "2100-01-01T00:00:00.000Z", "job": f"9{ESCAPE}", "restart": 2}
    (again.root / "tiny" / "events" / "9.2.jsonl").write_text(json.dumps({**event, "reason": f"{ESCAPE}\r\nok"}))
    for args in ([], ["--events"]):
        done = again("status", *args)
        assert done.returncode == 0 and r"\x1b[31m\r\nok" in done.stdout
        assert done.stdout.replace("\n", "").isprintable()


def test_a_set_whose_name_is_an_option_is_refused(finished: Shell) -> None:
    assert "do not begin with a dash" in finished.refused("sample", "tiny", "--set=-png", "--cluster", "local")


@pytest.mark.parametrize("folder", ["a b'$(touch CANARY)\"", "ä;touch CANARY #"])
def test_the_project_may_lie_in_a_folder_with_an_odd_name(shell: Shell, folder: str, tmp_path: Path) -> None:
    project = tmp_path / in_utf_8(folder)
    for name in ("ddpm", "launch", "slurm", "configs"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    _, options = shell.command("submit")
    options["env"] |= {"PYTHONPATH": ""}
    argv = [sys.executable, str(project / "launch" / "submit.py"), "tiny.yaml", "--dry-run", "--verbose"]
    argv += ["--root", str(project / "runs")]  # beside which the code lies that jobs run
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stderr
    script = done.stdout[done.stdout.index("#!/bin/bash") :].split('. "$DDPM_HOME')[0] + 'printf %s "$DDPM_HOME"'
    checked = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert checked.stdout.startswith(f"{project}/runs/.cache/code/") and not list(tmp_path.rglob("CANARY"))


def test_in_a_locale_of_another_encoding_names_and_configs_are_utf_8_all_the_same(shell: Shell) -> None:
    """As with LANG=en_US, which is Latin-1; here ASCII, which every machine has."""
    (shell.cwd / "site.yaml").write_text("setup: ['echo → Größe']\n", encoding="utf-8")
    argv, options = shell.command("submit", "tiny.yaml", "--cluster", "local", "--profile", "site.yaml", "--dry-run")
    options["env"] |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*argv, "--root", str(shell.cwd / "Ärger")], capture_output=True, **options)
    assert done.returncode == 0 and "Ärger".encode() in done.stdout, done.stderr
