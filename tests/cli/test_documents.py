"""Every command in the documents runs, as far as it can without a cluster; or it is named here, with the test that runs
it, or why none does.

Scripts run in this process, on runs that nobody trained, and dry where they can be.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ddpm.api import build_model
from ddpm.config import reading
from ddpm.run.fence import Fence
from ddpm.run.files import sign
from ddpm.run.generations import verify
from ddpm.run.paths import RunDir
from ddpm.sampling.request import publish_request
from launch.queue.sets import request_for
from tests.cli.harness import TINY, png
from tests.conftest import PROJECT
from tests.saves import saver
from tools import config_docs

DOCUMENTS = [
    *(PROJECT / name for name in ("README.md", "configs/README.md", "slurm/README.md", "tests/README.md")),
    *(PROJECT / "tools" / name for name in ("CONTRIBUTING.md", "slurm_testbed/README.md")),
    *sorted((PROJECT / "configs").glob("*.yaml")),
]
HEADS = r"python3? |\.venv/bin/pip |… |sbatch |pip |git |tools/[\w/-]+\.sh|\. DIR|sinfo|scancel |touch |rm |conda "
COMMAND = re.compile(rf"(?:sudo |\. |[A-Z]+=\S+ )?(?:{HEADS})")
"""How what is typed begins: in a line of a block of code, or as `code` in a sentence."""
DRY = ("submit", "sample", "evaluate", "board")
PLACES = {"DIR": "there", "/shared/runs/": "runs/", "~/": "home/"}
"""What stands in a document -> what it is here."""

ELSEWHERE = {
    "python launch/doctor.py": "tests/cli/test_doctor.py",
    "python launch/evaluate.py --images": "tests/cli/test_evaluate_images.py",
    "python launch/evaluate.py cifar10 --compare": "tests/cli/test_many_scores.py",
    "python launch/evaluate.py cifar10 --all-milestones": "tests/cli/test_many_scores.py",
    "python launch/evaluate.py cifar10 --bits-per-dim": "tests/cli/test_many_scores.py",
    "python launch/logs.py": "tests/cli/test_commands.py",
    "python launch/recover.py": "tests/cli/test_recover.py",
    "python launch/submit.py --from runs/ho": "tests/cli/test_from.py",
    "python launch/status.py --watch": "tests/cli/test_status.py",
    "python tools/convert_diffusers.py": "tests/unit/scripts/test_convert_diffusers.py",
    "python tools/inspect_config.py": "tests/cli/test_inspect_config.py",
    "python tools/prefetch.py": "tests/cli/test_prefetch.py",
    "python tools/unpack_data.py": "tests/cli/test_unpack_data.py",
    "python -m launch.jobs": "tests/cli/test_jobs_by_hand.py",
    "python -m tests.compat.text": "tests/compat/test_text.py",
    "python -m tools.bench": "tests/unit/test_bench.py",
    "python -m tools.bench.interval": "tests/unit/scoring/test_interval.py",
    "python -m tools.bench.sampler_orders": "tests/unit/diffusion/test_samplers.py",
    "python -m tools.chaos": "tests/chaos/test_files.py",
    "python -m tools.config_docs": "tests/cli/test_documents.py",
    "python -m tools.gpu": "tests/unit/test_stages.py",
    "python -m tools.gpu.targets": "tests/unit/test_targets.py",
    "pip install .": "tests/unit/test_wheel.py",
    "sbatch": "tests/slurm/test_life.py",
    "scancel": "tests/slurm/test_chaos.py",
    "sinfo; sbatch": "tests/slurm/test_testbed.py",
    "sudo tools/slurm_testbed/start.sh": "tests/slurm/conftest.py",
    "sudo tools/slurm_testbed/stop.sh": "tests/slurm/conftest.py",
    "touch": "tests/slurm/test_chaos.py",
}
"""How a command begins -> the file of tests that runs it."""
NOBODY = {
    ". DIR/env.sh": "sets variables of the shell",
    ".venv/bin/pip install torch": "needs PyTorch's index",
    "PYTHON=": "makes an environment of gigabytes; tools/test.sh begins with it",
    "TORCH=": "makes an environment of gigabytes; tools/test.sh begins with it",
    "conda create": "needs conda",
    "pip download": "needs a package index",
    "pip install --no-index": "needs what the command before it has brought",
    "pip install 'ddpm-hpc": "needs a package index that has it",
    "python3 -m venv": "is Python's own",
    "python -m coverage": "tools/test.sh runs it",
    "python -m mypy": "tools/test.sh runs it",
    "python -m pytest": "runs these tests",
    "python -m ruff": "tools/test.sh runs it",
    "rm -rf /var/tmp": "removes what another command made",
    "tools/env.sh": "makes an environment of gigabytes; tools/test.sh begins with it",
    ". tools/env.sh": "makes an environment of gigabytes; tools/test.sh begins with it",
    "tools/quickstart.sh": "makes an environment, then is a command that tests/cli/test_local.py runs in small",
    "tools/test.sh": "runs these tests",
    "sudo tools/slurm_testbed/nfs.sh": "tests/nfs runs it",
    "tools/slurm_testbed/debian.sh": "makes another Debian of 6 GB",
    "sudo tools/slurm_testbed/debian.sh": "makes another Debian of 6 GB",
}
"""How a command begins -> why no test runs it."""

OTHERS_OPTIONS = {
    *(
        "--against",
        "--count",
        "--data",
        "--install",
        "--largest",
        "--minutes",
        "--mutants",
        "--out",
        "--reduced",
        "--stages",
    ),
    *("--array", "--exclusive", "--gres", "--kill-on-bad-exit", "--ntasks-per-node", "--open-mode", "--requeue"),
    *("--signal", "--samples-find-deep", "--wrap", "--index-url", "--no-index", "--find-links"),
    *("--resume", "--resume_checkpoint", "--resume_from_checkpoint", "--sandbox"),
}
"""Of the modules and shell scripts in tools/, of SLURM, and of programs beside ours."""


# ---------------------------------------------------------------- what stands there


def typed(path: Path) -> list[str]:
    """What a document has its reader type, in order, without remarks. `…` stands for the last script before that has
    these options, and for its run."""
    text = path.read_text()
    if path.suffix == ".yaml":
        lines = re.findall(r"^#   (\S.*)$", text, re.M)
    else:
        lines = []
        for language, block, code in re.findall(r"^```(\w*)\n(.*?)^```|`([^`\n]+)`", text, re.M | re.S):
            lines += [code] if code else [] if language else block.splitlines()
    found: list[str] = []
    for line in (line.strip() for line in lines):
        if not COMMAND.match(line):
            continue
        for command in re.split(r" {2,}| #", line)[0].strip().split(" && "):
            found.append(_with_its_script(command, found) if command.startswith("…") else command)
    return found


def _with_its_script(command: str, before: list[str]) -> str:
    needed = {*OPTION.findall(command)}
    for line in reversed(before):
        script = re.match(r"python launch/(\w+)\.py( [\w./-]+(?= |$))?", line)
        if script and needed <= OPTIONS[script[1]]:
            run = "" if script[1] == "submit" or (script[2] or " -").startswith(" -") else script[2]
            return f"python launch/{script[1]}.py{run}{command[1:]}"
    return command


OPTION = re.compile(r"(?<!\S)--[a-z][\w-]*")


def _options() -> dict[str, set[str]]:
    """Of each script, by its help."""
    found = {}
    for path in [*(PROJECT / "launch").glob("*.py"), *(PROJECT / "tools").glob("*.py")]:
        module, said = importlib.import_module(f"{path.parent.name}.{path.stem}"), io.StringIO()
        if path.stem != "jobs" and hasattr(module, "parse"):
            with patch("sys.argv", [path.name, "--help"]), redirect_stdout(said), suppress(SystemExit):
                module.parse()
        found[path.stem] = {*re.findall(r"--[a-z][\w-]*", said.getvalue())}
    return found


OPTIONS = _options()


COMMANDS = list(dict.fromkeys(command for path in DOCUMENTS for command in typed(path)))


def listed(command: str) -> str | None:
    """The longest beginning of it that ELSEWHERE or NOBODY has."""
    there = [begin for begin in (*ELSEWHERE, *NOBODY) if command.startswith(begin)]
    return max(there, key=len, default=None)


# ---------------------------------------------------------------- what it does here


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has checkpoints, as if trained, and a set that is asked for."""
    root = tmp_path_factory.mktemp("documents") / "runs"
    run = RunDir(root / "cifar10")
    run.path.mkdir(parents=True)
    words = ["model.num_classes=10", "train.label_dropout=0.1", "diffusion.timesteps=1000", "sample.shards=1"]
    (root / "tiny.yaml").write_text(TINY)
    config = reading.load(root / "tiny.yaml", [*words, "train.total_steps=400000", "model.norm_groups=4"])
    run.config.write_text(config.to_yaml())
    classes = dict.fromkeys(["airplane", "automobile", "bird", "cat", *"efghij"], 7)
    record = {"resolved": {"amp": "off"}, "labels": {"digest": "", "classes": classes}, "data": {"cache": ""}}
    run.run_json.write_text(json.dumps(sign(record)))
    weights = build_model(config, torch.device("cpu")).state_dict()
    fence = Fence(run, {}, wait_s=0)
    saving = saver(run, fence, is_milestone=lambda step: True)
    for step in (3907, 11719, 100_000, 400_000):
        state = {"step": step, "images": 0, "config_digest": config.digest(), "extra": {}}
        saving.save({**state, "ema": weights, "model": weights}, wait=True, final=step == 400_000)
    fence.release()
    publish_request(run.sample_set("paper"), request_for(run, config, verify(run, 400_000)))
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in a working directory that looks like the project's."""
    shutil.copytree(made, tmp_path / "runs")
    for name in ("configs", "slurm", "tools"):
        (tmp_path / name).symlink_to(PROJECT / name)
    for kind in "abc":  # images of one's own
        (tmp_path / "FOLDER" / kind).mkdir(parents=True)
        (tmp_path / "FOLDER" / kind / "0.png").write_bytes(png(32, ord(kind)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no scheduler
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("command", [command for command in COMMANDS if not listed(command)])
def test_a_command_of_the_documents_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for there, is_here in {**PLACES, " …": ""}.items():
        command = command.replace(there, is_here)
    python, script, *words = shlex.split(command.replace("CONFIG", "runs/cifar10/config.yaml"))
    name = re.fullmatch(r"launch/(\w+)\.py", script)
    assert python == "python" and name, f"no test runs this: see {Path(__file__).name}, ELSEWHERE and NOBODY"
    dry = ["--dry-run"] if name[1] in DRY and not {"--dry-run", "--list"} & {*words} else []
    monkeypatch.setattr(sys, "argv", [script, *words, *dry])
    if name[1] == "submit" and not {"--from", "runs/cifar10"} & {*words}:
        shutil.rmtree("runs")  # as yet
    for word in words:  # runs and sets that documents have under other names
        if re.fullmatch(r"cifar10-[\w-]+|runs/ho", word) and name[1] != "submit":
            shutil.copytree("runs/cifar10", Path("runs", Path(word).name))
        if re.fullmatch(r"epoch\d+", word):
            for path in Path("runs").glob("*/samples/paper"):
                path.rename(path.with_name(word))
    code = importlib.import_module(f"launch.{name[1]}").main()
    assert code == 0, capsys.readouterr()


def test_what_is_run_elsewhere_is_named_there_and_still_stands_in_a_document() -> None:
    begins = {listed(command) for command in COMMANDS}
    assert sorted({*ELSEWHERE, *NOBODY} - begins) == []
    for begin, where in ELSEWHERE.items():
        assert (PROJECT / where).is_file(), f"{begin}: {where}"


def test_commands_are_found_in_blocks_and_in_sentences_and_go_on_from_those_before(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "Type `python launch/sample.py cifar10 --png`, or `… --steps 20`; not `--steps`.\n```\n"
        "python launch/submit.py configs/a.yaml --list    # a remark\n. tools/env.sh && … --time 2h\nruns/\n```\n"
        "`python launch/status.py` and `… --nodes 2`, `… --png`\n"
        "```python\npython launch/nothing.py\n```\n"
    )
    assert typed(tmp_path / "a.md") == [
        "python launch/sample.py cifar10 --png",
        "python launch/sample.py cifar10 --steps 20",
        "python launch/submit.py configs/a.yaml --list",
        ". tools/env.sh",
        "python launch/submit.py --time 2h",
        "python launch/status.py",
        "python launch/submit.py --nodes 2",
        "python launch/sample.py cifar10 --png",
    ]


def test_every_option_in_the_documents_is_one_of_a_script() -> None:
    known = set.union(OTHERS_OPTIONS, *OPTIONS.values())
    told = {
        option: path.name
        for path in DOCUMENTS
        for code in re.findall(r"`([^`\n]+)`", path.read_text())
        for option in OPTION.findall(code)
    }
    assert {option: where for option, where in told.items() if option not in known} == {}


# ---------------------------------------------------------------- what is written by a tool


def test_the_documents_of_the_config_are_up_to_date() -> None:
    told = "write it anew: python -m tools.config_docs"
    assert (PROJECT / "configs" / "README.md").read_text() == config_docs.configs_readme(), told
    readme = (PROJECT / "README.md").read_text()
    assert config_docs.recipe_table() in readme, told
