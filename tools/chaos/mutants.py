"""Safeties taken away on purpose: each must make a named row fail, or the row proves nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


def _unsigned(path: Path) -> dict[str, Any]:
    """read_signed without its check."""
    from ddpm.rundir import DamagedFile

    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as e:
        raise DamagedFile(str(e)) from None


@contextmanager
def _patched(target: str, replacement: Callable[..., Any]) -> Iterator[None]:
    with mock.patch(target, replacement):
        yield


MUTANTS: dict[str, tuple[str, Callable[[], Any]]] = {
    # name: (the row that must fail, how to break the code)
    "no-fsync-of-the-directory": ("power-cut", lambda: _patched("ddpm.rundir.fsync_dir", lambda path: None)),
    "no-manifest-digest": ("flipped-bits", lambda: _patched("ddpm.checkpoint.read_signed", _unsigned)),
    "no-checkpoint-digest": ("flipped-bits", lambda: _patched("ddpm.checkpoint.sha256_file", lambda path: _said(path))),
}


def _said(path: Path) -> str:
    """The digest that the manifest claims."""
    return str(json.loads(path.with_suffix(".json").read_bytes())["sha256"])


class Edit(NamedTuple):
    """A change of one place in one file of the project."""

    row: str
    """The SLURM row that must fail."""
    file: str
    old: str
    new: str


SLURM_MUTANTS = {
    "no-running-guard": Edit(
        "scancel", "launch/life/decision.py", 'shown is None or shown.state != "RUNNING"', "shown is None",
    ),
    "half-a-kernel-is-trusted": Edit(
        "signal-in-compile", "launch/life/training.py", "        unproven.touch()\n", "",
    ),
    "python-is-not-waited-for": Edit(
        "startup-pre-emptions", "slurm/rank.sh", "env --block-signal=TERM true", "false",
    ),
    "bare-array-id": Edit(
        "array-task-requeued", "launch/cluster/environment.py", 'job = "_".join(a for a in array if a) or job_id',
        "job = array[0] or job_id",
    ),
    "leaves-in-the-grace-period": Edit(
        "pre-emptions", "launch/life/preemption.py",
        'if env.scheduler != "slurm" or reason == "time_limit":\n        return EXIT_REQUEUE',
        'if env.scheduler != "slurm" or reason == "time_limit":\n        return EXIT_REQUEUE\n    return 0',
    ),
    "handler-that-saves": Edit(
        "one-rank-signalled", "ddpm/trainer.py",
        '        self._beginning = "resumed"\n',
        '        self._beginning = "resumed"\n'
        "        import os, signal\n\n"
        "        signal.signal(signal.SIGUSR2, lambda *_: (self._save(wait=True), os._exit(75)))\n",
    ),
    "stops-without-agreement": Edit(
        "one-rank-signalled", "ddpm/trainer.py",
        "code, bad, save_due = self.world.agree([self._reason_code(stop_requested), bad, self._save_due()])",
        "code, bad, save_due = self._reason_code(stop_requested), bad, self._save_due()",
    ),
}  # fmt: skip


@contextmanager
def edited(project: Path, edit: Edit) -> Iterator[Path]:
    """A copy of the project with the edit in it, where ordinary users can read it. Raises ValueError if it misses."""
    tree = Path(tempfile.mkdtemp(prefix="ddpm-mutant-", dir="/tmp"))
    try:
        tree.chmod(0o755)
        for name in ("configs", "ddpm", "launch", "slurm", "tools"):
            shutil.copytree(project / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(project / "pyproject.toml", tree)
        text = (tree / edit.file).read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times: mend the mutant")
        (tree / edit.file).write_text(text.replace(edit.old, edit.new))
        yield tree
    finally:
        shutil.rmtree(tree, ignore_errors=True)
