"""What the scripts say, kept in text/: python -m tests.compat.text writes it anew, for where a change is meant.

One function, `plain`, takes out what may differ from machine to machine: paths, and how argparse words its help.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.compat.harness import HERE, RUNS, Machine

TEXT = HERE / "text"
SCRIPTS = ("board", "cancel", "evaluate", "export", "logs", "remove", "report", "sample", "status", "submit")
TOOLS = ("convert_diffusers", "inspect_config", "unpack_data")
SHELLS = ("env", "quickstart", "test")
DRY = ["launch/submit.py", "--dry-run"]
WHOLE = [*DRY, "--verbose"]
AS_SHOWN = ["--partition", "gpu"]

CASES: dict[str, list[str]] = {
    **{f"help-{name}": [f"launch/{name}.py", "--help"] for name in SCRIPTS},
    **{f"help-tools-{name}": [f"tools/{name}.py", "--help"] for name in TOOLS},
    "help-jobs": ["-m", "launch.jobs", "--help"],
    "list": ["launch/submit.py", "--list"],
    "dry-run": [*DRY, *AS_SHOWN],
    "dry-run-verbose": [*WHOLE, *AS_SHOWN],
    "dry-run-many-gpus": [*WHOLE, *AS_SHOWN, "--nodes", "2", "--gpus-per-node", "4", "--time", "4h", "--mem", "32G"],
    "dry-run-then": [*WHOLE, *AS_SHOWN, "--then", "sample,evaluate", "--account", "a", "--qos", "q"],
    "dry-run-sbatch": [*WHOLE, *AS_SHOWN, "--via", "sbatch", "--then", "sample,evaluate", "--sbatch", "reservation=r"],
    "dry-run-local": [*WHOLE, "configs/quickstart.yaml", "--cluster", "local", "--then", "sample,evaluate"],
    "dry-run-changed": [*WHOLE, *AS_SHOWN, "configs/cifar10-cosine.yaml", "train.lr=1e-4", "--name", "low-lr"],
    "dry-run-epochs": [*WHOLE, *AS_SHOWN, "train.total_epochs=30", "--then", "sample"],
    "dry-run-no-partition": WHOLE,
    "bad-value": [*DRY, *AS_SHOWN, "train.lr=fast"],
    "bad-key": [*DRY, *AS_SHOWN, "train.learning_rate=1e-4"],
    "bad-combination": [*DRY, *AS_SHOWN, "--nodes", "3"],
    "bad-option": [*DRY, "--partitoin", "gpu"],
    "bad-run": ["launch/sample.py", "nothing"],
    "bad-mathematics": [*DRY, "configs/quickstart.yaml", "--name", "sampled", "--cluster", "local"],
    "no-scheduler": ["launch/submit.py", *AS_SHOWN, "configs/quickstart.yaml"],
    "status": ["launch/status.py"],
    "status-one": ["launch/status.py", "killed"],
    "status-events": ["launch/status.py", "--events"],
    "status-json": ["launch/status.py", "--json"],
    "sample-dry-run": ["launch/sample.py", "sampled", "--dry-run", "--sampler", "dpmpp_2m", "--num-samples", "100"],
    "evaluate-dry-run": ["launch/evaluate.py", "sampled", "--set", "small", "--reference", "test", "--dry-run"],
    "board-dry-run": ["launch/board.py", "--port", "6006", "--dry-run"],
}
"""Name of the text -> what is typed after `python`, in the project, with the fixture's runs as the only ones."""


SHELL_CASES = {f"help-tools-{name}.sh": f"tools/{name}.sh" for name in SHELLS}
NAMES = [*CASES, *SHELL_CASES]


def said(machine: Machine, name: str) -> str:
    """What a case prints, and its exit code, as it is kept."""
    if name in SHELL_CASES:
        words = ["/bin/bash", SHELL_CASES[name], "--help"]
        return plain(machine, words, machine.run(words, PATH="/usr/bin:/bin"))
    return plain(machine, ["python", *CASES[name]], machine(*CASES[name], check=False))


def with_runs(home: Path) -> Machine:
    machine = Machine(home)
    for name in RUNS:
        machine.bring(name)
    return machine


def plain(machine: Machine, words: list[str], done: subprocess.CompletedProcess[str]) -> str:
    """A finished command as text, without what is this machine's or this Python's."""
    text = f"$ {' '.join(words)}\n{_plain_help(done.stdout)}"
    text += f"--- on stderr\n{done.stderr}" if done.stderr else ""
    text += f"--- exit code {done.returncode}\n"
    python = Path(sys.executable)
    places = {machine.project: "PROJECT", machine.root: "RUNS", machine.home: "HOME", python.parent: "BIN"}
    places[python] = "PYTHON"
    for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(str(place), f"<{name}>")
    text = re.sub(r'(?<="heartbeat_age_s": )[\d.]+', "<AGE>", text)
    text = re.sub(r"(ssh .*) \S+@\S+", r"\1 <USER>@<HOST>", text)
    text = re.sub(r"\S+/ddpm-hpc-\d+/", "<TMP>/", text)
    text = re.sub(r"(?<=\.cache/code/)[0-9a-f]{16}", "<CODE>", text)
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def _plain_help(text: str) -> str:
    """argparse's part of a help text with a line for each option: where lines are wrapped depends on Python's version,
    and before 3.13 the name of a value was told twice for `-s SET, --set SET`."""
    if not text.startswith("usage: "):
        return text
    generated, mark, ours = text.partition("\nexamples:")
    generated = re.sub(r"\n(?: {4,}| (?=\S))", " ", generated)  # a new entry is indented by two spaces
    generated = re.sub(r"(?<=\S) +", " ", generated).replace("optional arguments:", "options:")
    return re.sub(r"(--?\w[\w-]*) ([A-Z_=]+), (--[\w-]+) \2", r"\1, \3 \2", generated) + mark + ours


def main() -> None:
    TEXT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ddpm-") as directory:
        machine = with_runs(Path(directory) / "machine")
        for name in NAMES:
            (TEXT / f"{name}.txt").write_text(said(machine, name))
        for path in TEXT.glob("*.txt"):
            if path.stem not in NAMES:
                path.unlink()


if __name__ == "__main__":
    main()
