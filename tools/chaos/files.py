"""Faults under the checkpoint writer, without a scheduler: killed at each operation, power cuts, flipped bits, errors.

Each row drives the project's own Checkpointer on a small state and asks its own `newest_good` what a new life would
resume. A row returns a Result; what it counted is in its text, and `passed` compares with what the design promises.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddpm.errors import DoNotRetry
from ddpm.run import generations, saving
from ddpm.run.fence import Fence
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir
from ddpm.sampling.request import CheckpointRef, Request, publish_request
from tools.chaos.faults import Shim, crash_state, shimmed

REQUEST = Request(
    checkpoint=CheckpointRef(4, "ab" * 32), weights="ema", sampler="ddim", steps=2, eta=0.0, guidance=None, seed=0,
    num_samples=10, shards=2, batch=3, precision="fp32", class_plan=None,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    fault: str
    promised: str
    seen: str
    passed: bool


def silent(message: str = "", **fields: Any) -> None:
    """Where a row counts what happened, its log lines are noise."""


@contextmanager
def new_run(like: RunDir | None = None) -> Iterator[RunDir]:
    """like: what it is a copy of, since saves take most of a row's time."""
    with tempfile.TemporaryDirectory(prefix="ddpm-chaos-") as where:
        run = RunDir(Path(where))
        if like is None:
            run.checkpoints.mkdir()
        else:
            shutil.copytree(like.path, run.path, dirs_exist_ok=True)
        yield run


@contextmanager
def new_run_saved(*steps: int) -> Iterator[RunDir]:
    with new_run() as run:
        saves(run, *steps)
        yield run


def state(step: int) -> dict[str, Any]:
    """A state like a checkpoint's, whose tensors tell its step."""
    weights = {"w": torch.full((64, 17), float(step)), "b": torch.arange(5.0) + step}
    return {
        "model": weights,
        "ema": {k: v + 0.5 for k, v in weights.items()},
        "optimizer": {"state": {0: {"exp_avg": weights["w"] * 2}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "scaler": {},
        "step": step,
        "images": step * 8,
        "config_digest": "0" * 64,
        "extra": {},
    }


@contextmanager
def writing(run: RunDir) -> Iterator[saving.Checkpointer]:
    """A life that may write the run: it holds the lock and takes the next fencing token."""
    fence = Fence(run, {"job": "1", "restart": 0, "host": "here"}, wait_s=0, log=silent)
    try:
        yield saving.Checkpointer(
            run, fence, keep_last=3, is_milestone=lambda step: step % 4 == 0, world_size=1, log=silent,
            on_saved=lambda step, sha256: None,
        )  # fmt: skip
    finally:
        fence.release()


def resumable(run: RunDir) -> int | None:
    """The step that a new life would resume, its content checked too; None where it would start at 0.

    Raises AssertionError if what is chosen is not what was saved: an invalid generation.
    """
    found = generations.newest_good(run, silent)
    if found is None:
        return None
    loaded = generations.load(run, found.step)
    assert loaded["step"] == found.step and torch.equal(loaded["model"]["w"], state(found.step)["model"]["w"])
    return found.step


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns its wait status' signal, 0 if it ended by itself."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def saves(run: RunDir, *steps: int) -> None:
    with writing(run) as saver:
        for step in steps:
            saver.save(state(step), wait=True)


# ---------------------------------------------------------------- rows


def killed_at_each_operation(_: int) -> Result:
    """Four good generations; then a life that saves twice, retention included, is killed at operation 0, 1, 2, …"""
    promised = "a valid generation after each, none acknowledged lost; the next save works"
    bad: list[str] = []
    at = 0
    with new_run_saved(1, 2, 3, 4) as pristine:
        while _killed_at(at, pristine, bad):
            at += 1
    return Result("killed at every file operation of a save and of retention", promised,
                  f"{at} operations, {len(bad)} bad" + (f": {bad[0]}" if bad else ""), not bad and at > 20)  # fmt: skip


def _killed_at(at: int, pristine: RunDir, bad: list[str]) -> bool:
    """Whether there is such an operation."""
    with new_run(pristine) as run:
        done = run.path / "acknowledged"  # written outside the watched directory

        def life() -> None:
            with shimmed(Shim(run.checkpoints, fault_at=at)), writing(run) as saver:
                for step in (5, 6):
                    saver.save(state(step), wait=True)
                    done.write_text(str(step))

        killed = in_child(life)
        acknowledged = int(done.read_text()) if done.exists() else 4
        try:
            step = resumable(run)
            if step is None or step < acknowledged:
                bad.append(f"operation {at}: resumes {step}, {acknowledged} was acknowledged")
            saves(run, 7)
            if resumable(run) != 7:
                bad.append(f"operation {at}: the next save is not resumed")
        except (AssertionError, DoNotRetry, OSError) as e:
            bad.append(f"operation {at}: {e}")
    return bool(killed)


def unsynced_writes_lost_or_reordered(count: int) -> Result:
    """Power cuts at random moments of six saves, with any subset of what was not synced."""
    chosen = random.Random(0)
    with new_run() as run:
        shim = Shim(run.checkpoints)
        acknowledged: list[tuple[int, int]] = []  # (operations so far, step)
        with shimmed(shim), writing(run) as saver:
            for step in range(1, 7):
                saver.save(state(step), wait=True)
                acknowledged.append((len(shim.operations), step))
    invalid = lost = 0
    for _ in range(count):
        cut = chosen.randrange(1, len(shim.operations) + 1)
        keep = chosen.random()
        promised_step = max((s for at, s in acknowledged if at <= cut), default=0)
        with new_run() as run:
            crash_state(shim.operations, cut, lambda keep=keep: chosen.random() < keep, run.checkpoints)
            try:
                lost += (resumable(run) or 0) < promised_step
            except DoNotRetry:
                lost += promised_step > 0
            except Exception:
                invalid += 1
    return Result("unsynced writes dropped or reordered", "0 invalid generations chosen, 0 acknowledged lost",
                  f"{count} states: {invalid} invalid, {lost} lost", invalid == lost == 0)  # fmt: skip


def flipped_bits_and_truncations(count: int) -> Result:
    """Single bits flipped in .pt and manifest (three in four), and truncations: noticed, named, fallen back from."""
    chosen = random.Random(1)
    missed: list[str] = []
    with new_run_saved(1, 2) as pristine:
        for i in range(count):
            with new_run(pristine) as run:
                path = (run.checkpoint(2), run.manifest(2))[i % 2]
                raw = bytearray(path.read_bytes())
                if i % 4 == 3:
                    del raw[chosen.randrange(len(raw)) :]
                else:
                    raw[chosen.randrange(len(raw))] ^= 1 << chosen.randrange(8)
                path.write_bytes(bytes(raw))
                said: list[str] = []
                found = generations.newest_good(run, said.append)
                if found is None or found.step != 1 or not any("step=2" in line for line in said):
                    missed.append(f"{path.name} #{i}")
    seen = f"{count - len(missed)} noticed" + (f", missed {missed[0]}" if missed else "")
    return Result("single-bit flips and truncations", f"{count} noticed, named, fallen back from", seen, not missed)


def flipped_requests(count: int) -> Result:
    """Single bits flipped in the request of a set that is made of the oldest checkpoint, half of them where it says so;
    then saves, and retention. What cannot be verified keeps, and never frees."""
    chosen = random.Random(3)
    lost: list[str] = []
    with new_run_saved(1) as pristine:
        sha256 = generations.verify(pristine, 1).sha256
        publish_request(pristine.sample_set("set"), replace(REQUEST, checkpoint=CheckpointRef(1, sha256)))
        saves(pristine, 2, 3)
        raw = pristine.sample_set("set").request.read_bytes()
        says = raw.index(b'"checkpoint"'), raw.index(b'"sha256"')
        for i in range(count):
            with new_run(pristine) as run:
                at, bit = chosen.randrange(*says) if i % 2 else chosen.randrange(len(raw)), chosen.randrange(8)
                flipped = raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
                run.sample_set("set").request.write_bytes(flipped)
                saves(run, 5, 6, 7)
                if not run.checkpoint(1).exists() or not run.manifest(1).exists():
                    lost.append(f"bit {bit} of byte {at}")
    seen = f"{len(lost)} lost" + (f", the first by {lost[0]}" if lost else "")
    return Result("single-bit flips in a set's request", f"{count} flips, 0 checkpoints lost", seen, not lost)


def failing_operations(_: int) -> Result:
    """Disk full, I/O error and read-only at each operation of a save: the last good one stays, the next save works."""
    bad: list[str] = []
    cases = 0
    with new_run_saved(1, 2) as pristine:
        for error in (errno.ENOSPC, errno.EIO, errno.EROFS):
            at, there_are = 0, True
            while there_are:
                there_are = _fails_at(at, error, pristine, bad)
                at += 1
            cases += at
    seen = f"{cases} cases, {len(bad)} bad" + (f": {bad[0]}" if bad else "")
    promised = "last good intact, reported, the next save works"
    return Result("disk full, EIO, read-only at each operation", promised, seen, not bad and cases > 20)


def _fails_at(at: int, error: int, pristine: RunDir, bad: list[str]) -> bool:
    """Whether there is such an operation."""
    with new_run(pristine) as run, writing(run) as saver:
        shim = Shim(run.checkpoints, fault_at=at, error=error)
        with shimmed(shim):
            try:
                saver.save(state(3), wait=True)
                reported = 3 in run.steps_saved()
            except OSError as e:
                reported = bool(str(e))
        name = f"{errno.errorcode[error]} at operation {at}"
        try:
            if not reported or (resumable(run) or 0) < 2:
                bad.append(name)
            saver.save(state(4), wait=True)
            if resumable(run) != 4:
                bad.append(f"{name}: the next save is not resumed")
        except (AssertionError, DoNotRetry, OSError) as e:
            bad.append(f"{name}: {e}")
    return len(shim.operations) > at


def all_generations_damaged(_: int) -> Result:
    """Nothing good left: exit 78, no step run, nothing removed."""
    with new_run_saved(1, 2, 3) as run:
        for step in run.steps_saved():
            with run.checkpoint(step).open("r+b") as f:
                f.truncate(10)
        try:
            generations.newest_good(run, silent)
            seen, passed = "started as if there were none", False
        except DoNotRetry as e:
            seen = f"exit {e.exit_code}: {e}"
            passed = e.exit_code == 78 and all(run.checkpoint(step).exists() for step in (1, 2, 3))
        except DamagedFile as e:
            seen, passed = str(e), False
    return Result("all generations damaged", "exit 78, nothing removed", seen[:70], passed)


ROWS: dict[str, tuple[Callable[[int], Result], int, int]] = {
    # name: (row, full count, reduced count)
    "kill-each-operation": (killed_at_each_operation, 0, 0),
    "power-cut": (unsynced_writes_lost_or_reordered, 1000, 100),
    "flipped-bits": (flipped_bits_and_truncations, 400, 40),
    "request-flipped": (flipped_requests, 400, 40),
    "failing-operations": (failing_operations, 0, 0),
    "all-damaged": (all_generations_damaged, 0, 0),
}
