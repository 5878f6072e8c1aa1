"""Memory that lacks, and I/O that fails, at every line of the rooms that save and publish: counted, not sampled.

A tracing hook raises at the k-th line of these rooms that a save or a publication comes to, for k = 1, 2, … until there
is no k-th. So every allocation and every file operation of theirs fails once, reading ones too. A file operation inside
of what they call fails once by faults.Shim.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ddpm.diffusion.schedule import Schedule
from ddpm.run import files, generations
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling import generate
from ddpm.sampling.denoiser import Denoiser
from ddpm.sampling.request import publish_request
from tools.chaos.faults import Operation, Shim, shimmed
from tools.chaos.files import REQUEST, Result, new_run, new_run_saved, resumable, state, writing

ROOMS = {
    str(Path(files.__file__).parents[1] / room)
    for room in ("run/saving.py", "run/files.py", "run/fence.py", "run/generations.py",
                 "run/unfinished.py", "sampling/shards.py", "sampling/parts.py")
}  # fmt: skip
ERRORS: dict[str, Callable[[], Exception]] = {
    "no memory": MemoryError,
    "EIO": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
}


class Lines:
    """Counts the lines of ROOMS as `seen`, and raises once, at the k-th; `at` is where that was."""

    def __init__(self, k: int, error: Callable[[], Exception]) -> None:
        self.seen, self.at, self._k, self._error = 0, "", k, error

    def during(self, work: Callable[[], object]) -> bool:
        """Does `work`, in this thread and in those that it starts; gives whether that says that it is done."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            return attempted(work)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in ROOMS else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self._k:
                self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self._error()
        return self._line


def attempted(work: Callable[[], object]) -> bool:
    """Whether `work` says that it is done."""
    try:
        work()
    except Exception:  # torch.save makes a RuntimeError of what a write raises
        return False
    return True


Do = Callable[[Callable[[], object]], bool]
"""Does its argument with one thing in it failing; gives whether that says that it is done."""
Try = Callable[[Do], str]
"""Gives what is wrong, or ""."""


def at_each_line(try_once: Try, count: int) -> tuple[int, list[str]]:
    """`try_once` with another line failing each time, each of them once; with `count`, so many of them, as a seed says.

    Returns how often, and what is bad.
    """
    lines = Lines(0, MemoryError)  # counts alone
    assert not try_once(lambda work: lines.during(work)), "nothing fails yet"
    all_of_them = range(1, lines.seen + 1)
    cases, bad = 0, []
    for name, error in ERRORS.items():
        for k in random.Random(0).sample(all_of_them, min(count, lines.seen)) if count else all_of_them:
            failing = Lines(k, error)
            wrong = try_once(failing.during)
            cases += bool(failing.at)
            if wrong:
                bad.append(f"{name} at {failing.at}: {wrong}")
    return cases, bad


# ---------------------------------------------------------------- a save


def save_fails_anywhere(count: int) -> Result:
    """Four good generations, and what a killed save left; then a save with EMA weights and retention in which one line
    fails. What it acknowledges is there, else the last good one; the next save works and leaves nothing behind."""
    quiet, threading.excepthook = threading.excepthook, lambda args: None  # a thread that dies of it says so on stderr
    try:
        with new_run_saved(1, 2, 3, 4) as pristine:
            cases, bad = at_each_line(functools.partial(_try_save, pristine), count)
    finally:
        threading.excepthook = quiet
    return Result("no memory, EIO at each line of a save", "last good intact; the next save works; nothing stale",
                  _seen(cases, bad), not bad and cases >= (2 * count or 1000))  # fmt: skip


def _try_save(pristine: RunDir, do: Do) -> str:
    with new_run(pristine) as run:
        _half_a_save(run)
        with writing(run) as saver:
            done = do(lambda: saver.save(state(8), wait=True))
            try:
                if (resumable(run) or 0) < (8 if done else 4):
                    return f"resumes {resumable(run)}, said {'done' if done else 'failed'}"
                saver.save(state(12), wait=True)
            except Exception as e:
                return f"the next save: {type(e).__name__} {e}"
        if resumable(run) != 12:
            return "the next save is not resumed"
        return _stale(run)


def _half_a_save(run: RunDir) -> None:
    """A disk that can only be read from the moment at which the .pt of step 7 has its name."""
    shim = _ReadOnlyAfter(run.checkpoints, error=errno.EROFS, keep_failing=True)
    with writing(run) as saver, shimmed(shim):
        attempted(lambda: saver.save(state(7), wait=True))
    assert run.checkpoint(7).exists() and not run.manifest(7).exists()


class _ReadOnlyAfter(Shim):
    def note(self, operation: Operation) -> None:
        super().note(operation)
        if operation.other.endswith(".pt"):
            self.fault_at = len(self.operations)


def _stale(run: RunDir) -> str:
    """What lies in checkpoints/ and is no part of a generation."""
    left = {p.name for p in run.checkpoints.iterdir()}
    for step in run.steps_saved():
        generations.verify(run, step)
        left -= {run.manifest(step).name, run.checkpoint(step).name, run.ema_weights(step).name}
    return f"left behind: {', '.join(sorted(left))}" if left else ""


# ---------------------------------------------------------------- a publication


def shard(sample_set: SampleSet, index: int) -> None:
    """Made by a network that is one line of arithmetic."""
    denoiser = Denoiser(
        eps=lambda x_t, t, labels: 0.1 * x_t,
        schedule=Schedule.from_beta(torch.tensor([0.1, 0.3], dtype=torch.float64)),
        image_shape=(3, 4, 4), variance="fixed_large", num_classes=0, device=torch.device("cpu"),
    )  # fmt: skip
    generate.generate_shard(sample_set, REQUEST, index, denoiser)


def whole(sample_set: SampleSet) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(sample_set.path.rglob("*")) if p.is_file()}


def publication_fails_anywhere(count: int) -> Result:
    """A shard of two finished batches and its set's request, in which one line or one file operation fails; made again,
    the set is that of an undisturbed life to the byte, with nothing beside it."""
    with new_run() as run:
        calm = run.sample_set("set")
        publish_request(calm, REQUEST)
        for index in range(REQUEST.shards):
            shard(calm, index)
        expected = whole(calm)

    def try_once(do: Do) -> str:
        with new_run() as run:
            sample_set = run.sample_set("set")
            done = do(lambda: (publish_request(sample_set, REQUEST), shard(sample_set, 0)))
            if done and any(whole(sample_set).get(k) != v for k, v in expected.items() if "-00001-" not in k):
                return "it says that it is done, and is not"
            try:
                publish_request(sample_set, REQUEST)
                for index in range(REQUEST.shards):
                    shard(sample_set, index)
            except Exception as e:
                return f"the next attempt: {type(e).__name__} {e}"
            ours = whole(sample_set)
            return "" if ours == expected else f"differs: {sorted(k for k in ours if ours[k] != expected.get(k))}"

    cases, bad = at_each_line(try_once, count)
    more, worse = _at_each_operation(try_once)
    return Result(
        "no memory, EIO at each line of a publication, and EIO, ENOSPC at each file operation",
        "the next attempt publishes the same bytes; nothing stale", _seen(cases + more, bad + worse),
        not bad + worse and cases >= (2 * count or 500) and more > 20,
    )  # fmt: skip


def _at_each_operation(try_once: Try) -> tuple[int, list[str]]:
    cases, bad = 0, []
    for error in (errno.ENOSPC, errno.EIO):
        at = 0
        while True:
            shim = Shim(Path(tempfile.gettempdir()), fault_at=at, error=error)

            def do(work: Callable[[], object], shim: Shim = shim) -> bool:
                with shimmed(shim):
                    return attempted(work)

            wrong = try_once(do)
            if len(shim.operations) <= at:
                break
            at, cases = at + 1, cases + 1
            if wrong:
                bad.append(f"{errno.errorcode[error]} at operation {at - 1}: {wrong}")
    return cases, bad


def _seen(cases: int, bad: list[str]) -> str:
    return f"{cases} cases, {len(bad)} bad" + (f": {'; '.join(bad[:5])}" if bad else "")


ROWS = {
    # name: (row, full count, reduced count)
    "save-fails-anywhere": (save_fails_anywhere, 0, 100),
    "publication-fails-anywhere": (publication_fails_anywhere, 0, 50),
}
