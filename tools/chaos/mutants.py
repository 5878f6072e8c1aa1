"""Safeties taken away on purpose: each must make a named row fail, or the row proves nothing.

A mutant puts something else in the place of one public function, named by its module and its name in it; MUTANTS is the
one table of these names. Rows that run here see it in this process. Rows on SLURM run a copy of the project in which
the module's file ends with the replacement, so that every process of every job has it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pkgutil
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

Function = Callable[..., Any]


def _unsigned(real: Function) -> Function:
    """read_signed without its check."""

    def read(path: Path) -> dict[str, Any]:
        from ddpm.run.files import DamagedFile

        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as e:
            raise DamagedFile(str(e)) from None

    return read


def _as_claimed(real: Function) -> Function:
    """The digest that the manifest claims."""
    return lambda path: str(json.loads(path.with_suffix(".json").read_bytes())["sha256"])


def _as_the_request_says(real: Function) -> Function:
    """A digest that equals whatever it is compared with."""
    return lambda record: mock.ANY


def _one_for_all(real: Function) -> Function:
    return lambda labels, classes: "0" * 64


def _mapped_unread(real: Function) -> Function:
    """open_verified that looks at the sizes alone."""

    def open_verified(cache: Path, key: str, **_: Any) -> Any:
        from ddpm.data.whole import open_packed

        return open_packed(cache, key)

    return open_verified


def _always_running(real: Function) -> Function:
    def show(*args: Any, **options: Any) -> Any:
        shown = real(*args, **options)
        return shown and dataclasses.replace(shown, state="RUNNING")

    return show


def _array_alone(real: Function) -> Function:
    def current() -> Any:
        env = real()
        return dataclasses.replace(env, job=env.job.partition("_")[0])

    return current


def _leaves_at_once(real: Function) -> Function:
    """after_stop that does not wait for SLURM, which requeues a pre-empted job and ends a cancelled one."""

    def after_stop(stop: Any, reason: str, env: Any, *args: Any) -> Any:
        waits = env.is_scheduled and reason not in ("time_limit", "STOP")
        return 0 if waits else real(stop, reason, env, *args)

    return after_stop


def _saves_in_the_handler(real: Function) -> Function:
    def train(trainer: Any, stop_requested: Any) -> Any:
        signal.signal(signal.SIGUSR2, lambda *_: (trainer.save(wait=True), os._exit(75)))
        return real(trainer, stop_requested)

    return train


def _each_for_itself(real: Function) -> Function:
    return lambda world, values: values


def _begins_again(real: Function) -> Function:
    """refuse_start that refuses nothing."""
    return lambda run: None


class Mutant(NamedTuple):
    row: str
    """The row that must fail."""
    module: str
    name: str
    """Of the function, in the module's own words: f, Class.f, or f of what the module imports."""
    change: Callable[[Function], Function]
    """The function -> what takes its place."""


MUTANTS = {
    "no-fsync-of-the-directory": Mutant("power-cut", "ddpm.run.files", "fsync_dir", lambda real: lambda path: None),
    "no-manifest-digest": Mutant("flipped-bits", "ddpm.run.generations", "read_signed", _unsigned),
    "no-checkpoint-digest": Mutant("flipped-bits", "ddpm.run.generations", "sha256_file", _as_claimed),
    "manifest-not-needed": Mutant("manifests-gone", "ddpm.run.evidence", "refuse_start", _begins_again),
    "request-not-verified": Mutant("request-flipped", "ddpm.run.saving", "sha256_json", _as_the_request_says),
    "labels-not-in-the-digest": Mutant("label-changed", "ddpm.data.labels", "labels_digest", _one_for_all),
    "cache-not-verified": Mutant("cache-damaged", "ddpm.data.packed", "open_verified", _mapped_unread),
    "no-running-guard": Mutant("scancel", "launch.life.supervisor", "scheduler.show", _always_running),
    "bare-array-id": Mutant("array-task-requeued", "launch.cluster.environment", "current", _array_alone),
    "leaves-in-the-grace-period": Mutant("pre-emptions", "launch.life.preemption", "after_stop", _leaves_at_once),
    "handler-that-saves": Mutant("one-rank-signalled", "ddpm.training.trainer", "Trainer.train", _saves_in_the_handler),
    "stops-without-agreement": Mutant("one-rank-signalled", "ddpm.training.ranks", "World.agree", _each_for_itself),
}
SHELL_MUTANTS = {
    # name: (the row that must fail, a file of the project, what takes its place)
    "python-is-not-waited-for": ("startup-pre-emptions", "slurm/rank.sh", 'exec "$@"\n'),
}


def _replace(owner: Any, mutant: Mutant) -> Any:
    """A context in which the function that `owner`, the module or its names, knows as mutant.name is replaced."""
    *path, leaf = mutant.name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, leaf)
    return mock.patch.object(owner, leaf, functools.wraps(real)(mutant.change(real)))


def replaced(mutant: Mutant) -> Any:
    """A context: this process has the mutant."""
    return _replace(pkgutil.resolve_name(mutant.module), mutant)


def apply(name: str, module: Any) -> None:
    """For good, in a module that is just being loaded: called by the last line of its file in a mutated copy."""
    _replace(module, MUTANTS[name]).start()


@contextmanager
def tree_with(project: Path, name: str) -> Iterator[Path]:
    """A copy of the project with the mutant in it, where ordinary users can read it."""
    tree = Path(tempfile.mkdtemp(prefix="ddpm-mutant-", dir="/tmp"))
    try:
        tree.chmod(0o755)
        for part in ("configs", "ddpm", "launch", "slurm", "tools"):
            shutil.copytree(project / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(project / "pyproject.toml", tree)
        if name in SHELL_MUTANTS:
            _, file, text = SHELL_MUTANTS[name]
            (tree / file).write_text(text)
        else:
            _end_with_mutant(tree / f"{MUTANTS[name].module.replace('.', '/')}.py", name)
        yield tree
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def _end_with_mutant(file: Path, name: str) -> None:
    """Before the module's part as a script, if it has one, which may end the process."""
    definitions, main, script = file.read_text().partition('\nif __name__ == "__main__":')
    load = "\nimport sys as _sys\n\nfrom tools.chaos import mutants as _mutants\n\n"
    call = f"_mutants.apply({name!r}, _sys.modules[__name__])\n"
    file.write_text(definitions + load + call + main + script)
