"""Sampling and scoring of a run that can only be read: another user's, or on a read-only or full file system.

Results go to a directory of the run's name in the user's own root. It contains what is made (sets, scores, logs,
events) and links to what is read: checkpoints, metrics and pictures; `reads` in its run.json names their run. It cannot
be trained, since two directories with two locks would write one set of checkpoints.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ddpm.config import reading
from ddpm.errors import RequestError
from ddpm.run.files import publishing_folder, sign, write_bytes, write_json
from ddpm.run.owners import not_ours
from ddpm.run.paths import RunDir
from ddpm.run.records import has_foreign_weights, read_run

MADE = ("events", "logs", "samples", "eval")
READ = ("checkpoints", "metrics.jsonl", "tb", "grids")


def can_write(run: RunDir) -> bool:
    """Whether samples, scores, events and logs can be written into the run."""
    return all(map(_is_open, [run.path, *(run.path / name for name in MADE)]))


def _is_open(path: Path) -> bool:
    return not path.is_dir() or os.access(path, os.W_OK | os.X_OK)


def reads(run: RunDir) -> str | None:
    """The path of the run whose checkpoints this one reads; None if they are its own. Raises DamagedFile."""
    return read_run(run).get("reads")


def check_trainable(run: RunDir) -> None:
    """Raise RequestError if the run cannot be trained: it can only be read, or something is in the way."""
    if other := reads(run):
        raise RequestError(
            f"{run.path} has the checkpoints of {other}: it can be sampled and scored, not trained. Train that one, or "
            f"begin a new run with its weights: --from {shlex.quote(str(other))}, with another --name"
        )
    if has_foreign_weights(read_run(run)):
        raise RequestError(
            f"{run.path} holds weights that were trained elsewhere: it can be sampled and scored, not trained. Begin a "
            f"new run with them: --from {run.quoted}, with another --name"
        )
    if not (can_write(run) and _is_open(run.checkpoints)):
        why = not_ours(run.path)
        raise RequestError(
            f"{run.path} cannot be written here: it can be sampled and scored into another --root, not trained; but a "
            f"copy of your own goes on from its last step (cp -r {run.quoted} NEW), and a new run may begin with its "
            f"weights (--from {run.quoted}, with another --name)" + (f". {why}" if why else "")
        )
    for path in (run.metrics, run.lock, run.fence):
        if path.is_dir():
            raise RequestError(f"{path} is a directory, where training has a file: move it away")
    if run.metrics.exists() and not os.access(run.metrics, os.R_OK):
        raise RequestError(
            f"{run.metrics} cannot be read, and training would go on from it: make it readable (chmod u+r)"
        )


def own(run: RunDir, root: Path, *, dry_run: bool) -> RunDir:
    """The run itself if it can be written, else the directory in `root` for its results, made unless `dry_run`.

    Raises RequestError if that cannot be made.
    """
    if can_write(run):
        if other := reads(run):
            _check_same(run, RunDir(Path(other)))
        return run
    mine = RunDir(root / run.name)
    if mine.path == run.path:
        raise RequestError(
            f"{run.path} cannot be written: give its path, and with --root a place of your own for what is made of it"
        )
    if mine.path.exists():
        if reads(mine) != str(run.path):
            raise RequestError(
                f"{mine.path} is another run than {run.path}, which cannot be written: give another --root"
            )
        _check_same(mine, run)
        return mine
    print(f"{run.path} cannot be written: what is made of it goes to {mine.path}", flush=True)
    if dry_run:
        return run
    try:
        root.mkdir(parents=True, exist_ok=True)
        there = os.access(root, os.W_OK)
    except OSError:
        there = False
    if not there:
        raise RequestError(f"{root} cannot be written either: choose another place with --root or DDPM_RUNS")
    reading.of_run(run)
    _make(mine, run)
    return mine


def _check_same(mine: RunDir, run: RunDir) -> None:
    """Raise RequestError if the run that `mine` reads is another one now than when `mine` was made. If it is gone,
    existing samples can still be scored."""
    if not run.run_json.is_file():
        return
    here, there = (read_run(r).get("config_digest") for r in (mine, run))
    if here and there and here != there:
        raise RequestError(
            f"{mine.path} was made of {run.path} when its mathematics had the digest {here[:12]}; now {run.path} has "
            f"{there[:12]}: give another --root for what is made of it now, or move {mine.path} away"
        )


def _make(mine: RunDir, run: RunDir) -> None:
    """Make the directory `mine` for `run`, whole or not at all."""
    with publishing_folder(mine.path) as folder:
        for name in MADE:
            (folder / name).mkdir()
        for name in READ:
            (folder / name).symlink_to(run.path / name)
        write_bytes(RunDir(folder).config, run.config.read_bytes())
        for there in (run.path / "setup.sh", run.code):
            if there.exists():
                write_bytes(folder / there.name, there.read_bytes())
        write_json(RunDir(folder).run_json, sign({**read_run(run), "reads": str(run.path)}))
