"""Training lives that end, start and go wrong in every way short of a scheduler: see `lives` for what a life is."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import math
import os
import pkgutil
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm.errors import EXIT_FATAL, EXIT_REQUEUE
from ddpm.run import generations, saving
from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from tools.chaos.faults import Operation, Shim, shimmed
from tools.chaos.files import Result, silent
from tools.chaos.lives import (
    Act,
    at_steps,
    curve,
    die,
    ended,
    final,
    life,
    log_of,
    new_root,
    prepare,
    ranks,
    remove,
    same_end,
    steps_of,
    stop,
)


def wait_until_it_trains(run: RunDir, pid: int) -> None:
    """Until a life on this machine has written its first event; at most 10 s."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not list(run.events.glob(f"local-{pid}.*")):
        time.sleep(0.01)


def killed_at_random_moments(count: int) -> Result:
    """Runs of 40 steps that save every other one, killed `count` times in all; each ends as the undisturbed one.

    Fails where a save is acknowledged before it is durable, or a half-written one is taken for a generation.
    """
    chosen = random.Random(2)
    options = ("train.total_steps=40", "checkpoint.every_steps=2")
    unreadable = lost = kills = trained = different = runs = 0
    with new_root() as root:
        calm = prepare(root, "calm", *options)
        if ended(life(calm)) != 0:
            return Result("kill -9 of the trainer", "", "the undisturbed run failed", False)
        while kills < count:
            runs += 1
            run = prepare(root, f"run{runs}", *options)
            while kills < count:
                pid = life(run)
                if chosen.random() < 0.8:  # the others are killed while starting, most of them
                    wait_until_it_trains(run, pid)
                time.sleep(chosen.uniform(0.02, 0.6))
                acknowledged = max(steps_of(run, "checkpoint"), default=0)
                os.kill(pid, signal.SIGKILL)
                if (code := ended(pid)) == 0:
                    break  # it was done before the kill
                unreadable += code != -signal.SIGKILL
                kills += 1
                lost += run.latest_step() < acknowledged
            code = ended(life(run))
            trained += len(steps_of(run, "started") + steps_of(run, "resumed")) - 1
            unreadable += code != 0
            different += code != 0 or not same_end(run, calm)
            remove(run)
    return Result(
        "kill -9 of the trainer at random moments",
        "0 unreadable resumes, 0 acknowledged steps lost, identical end",
        f"{kills} kills, {trained} of them in training, over {runs} runs: {unreadable} unreadable, {lost} lost, "
        f"{different} ends differ",
        unreadable == lost == different == 0 and kills >= count and trained > 0,
    )


def ended_inside_an_epoch(count: int) -> Result:
    """Lives that end inside epochs, by turns stopped and killed after a save; two micro-batches to a step.

    Fails where a new life begins its epoch, its log window, its noise or its optimizer anew, or where what follows
    depends on what a generator drew before.
    """
    chosen = random.Random(5)
    total = 12 + 4 * count
    options = (f"train.total_steps={total}", "train.global_batch=128", "train.micro_batch=64",
               "checkpoint.every_steps=2", "model.dropout=0.1")  # fmt: skip
    with new_root() as root:
        calm, run = prepare(root, "calm", *options), prepare(root, "run", *options)
        codes, expected = [ended(life(calm))], [0]
        at = sorted(chosen.sample(range(3, total), count))
        for i, step in enumerate(at):
            codes.append(ended(life(run, at_steps({step: (stop, die)[i % 2]}))))
            expected.append((EXIT_REQUEUE, -signal.SIGKILL)[i % 2])
        codes.append(ended(life(run)))
        expected.append(0)
        # a stop loses nothing; a kill after step k goes back to the last save before it, the one of k not being begun
        back_to = [step if i % 2 == 0 else max(at[i - 1], (step - 1) // 2 * 2) for i, step in enumerate(at)]
        resumed, identical = steps_of(run, "resumed"), same_end(run, calm)
    return Result(
        f"{count} lives ended inside an epoch, with accumulation", "resumed where saved; identical end",
        f"ended at {_few(at)}, resumed at {_few(resumed)}, identical: {identical}",
        codes == expected and resumed == back_to and identical,
    )  # fmt: skip


def _few(values: list[int]) -> str:
    return " ".join(map(str, values[:4])) + (" …" if len(values) > 4 else "")


# ---------------------------------------------------------------- fp16

FIRST_SCALE = 2.0**21
"""Some powers of two too large for this network: its first steps overflow."""
GROWTH_STEPS = 4


def half_precision() -> None:
    """For `life`: fp16, which the project leaves to GPUs, on the CPU; the loss scale soon overflows, then grows."""
    from ddpm.network import device

    device.resolve = lambda *_: device.Resolved("fp16", compile=False, deterministic=True, threads=1)
    scaler = functools.partial(torch.amp.GradScaler, init_scale=FIRST_SCALE, growth_interval=GROWTH_STEPS)
    torch.amp.GradScaler = scaler  # type: ignore[assignment,misc]


def growths(state: dict[str, Any]) -> int:
    """How often the loss scale has doubled: each skipped step has halved it."""
    return round(math.log2(state["scaler"]["scale"] / FIRST_SCALE)) + int(state["extra"]["skipped_steps"])


def overflowed(count: int) -> Result:
    """fp16 lives stopped after overflows and before the loss scale grows.

    Fails where the scale, its count of good steps, or the count of skipped steps is not restored: the scale starts at
    its first value or grows at another step, another step overflows, and the weights differ.
    """
    total = 12 + 3 * count
    options = (f"train.total_steps={total}", "checkpoint.every_steps=null", "log.every_steps=1")

    def stopped_at(step: int) -> Callable[[], None]:
        def before() -> None:
            half_precision()
            at_steps({step: stop})()

        return before

    with new_root() as root:
        calm, run = prepare(root, "calm", *options), prepare(root, "run", *options)
        codes, saved = [ended(life(calm, half_precision))], []
        for i in range(count):  # 3 steps a life, 4 to a growth: stops at each count of good steps
            codes.append(ended(life(run, stopped_at(4 + 3 * i))))
            saved.append(final(run))
        codes.append(ended(life(run, half_precision)))
        end, identical = final(run), same_end(run, calm)
    # the stops that this row is about
    between = [s["step"] for s in saved if s["extra"]["skipped_steps"] and s["scaler"]["_growth_tracker"]
               and growths(s) < growths(end)]  # fmt: skip
    return Result(
        f"{count} fp16 lives stopped after overflows", "identical loss scale, weights and skipped steps",
        f"{end['extra']['skipped_steps']} steps skipped, {growths(end)} growths, stopped in between at "
        f"{_few(between)}; identical: {identical}",
        codes == [0, *[EXIT_REQUEUE] * count, 0] and bool(between) and identical,
    )  # fmt: skip


# ---------------------------------------------------------------- world sizes

LOSS_TOLERANCE = 1e-6
"""Relative, of a logged loss at another number of ranks, where sums of the same float32 terms have another order.

Measured: 7e-8 over 63 steps, one unit in the last place (6e-8); allowed are sixteen, for other machines' kernels.
"""


def recording(run: RunDir, acts: dict[int, Act]) -> Callable[[], None]:
    """For `life`: `at_steps`, and digests of what each rank trains on (x_0, t, eps), by step and place in the batch."""

    def before() -> None:
        from ddpm.diffusion.forward import Diffusion
        from ddpm.training.step import Given, Step

        at_steps(acts)()
        gradients, q_sample = Step.gradients, Diffusion.q_sample
        place: list[int] = []  # empty in the warm-up, which trains nothing

        def note_step(step: Step, given: Given, *, warm_up: bool = False) -> torch.Tensor:
            place[:] = [] if warm_up else [step.state.at.step, step.world.rank * step.share]
            return gradients(step, given, warm_up=warm_up)

        def note_samples(self: Diffusion, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
            if place:
                with (run.logs / f"trained-on.{os.getpid()}").open("a") as f:
                    for sample in zip(x_0, t, eps, strict=True):
                        content = hashlib.sha256(b"".join(part.numpy().tobytes() for part in sample))
                        f.write(f"{place[0]}.{place[1]} {content.hexdigest()}\n")
                        place[1] += 1
            return q_sample(self, x_0, t, eps)

        Step.gradients = note_step  # type: ignore[method-assign,assignment]
        Diffusion.q_sample = note_samples  # type: ignore[method-assign]

    return before


def trained_on(run: RunDir) -> list[list[str]]:
    """[STEP.PLACE, digest] of each sample that any life trained on, sorted."""
    return sorted(line.split() for p in run.logs.glob("trained-on.*") for line in p.read_text().splitlines())


def world_sizes_change(count: int) -> Result:
    """Lives on 2, 1, 2, 1, … ranks, each stopped by a signal to its last rank, against one life on one rank.

    Fails where what a step trains on follows from the rank or from the life, where two ranks train on the same place
    of a batch, where ranks stop at different steps, and where gradients or logged losses are no means over ranks.
    """
    each = 7  # steps of a life: inside a log window
    options = (f"train.total_steps={each * count}", "model.dropout=0")
    sizes = [2 - i % 2 for i in range(count)]

    def stop_last_rank(trainer: Any) -> None:
        if trainer.world.rank == trainer.world.world_size - 1:
            stop(trainer)

    with new_root() as root:
        calm, run = prepare(root, "calm", *options), prepare(root, "run", *options)
        codes = [ended(life(calm, recording(calm, {})))]
        for i, size in enumerate(sizes):
            acts: dict[int, Act] = {each * (i + 1): stop_last_rank} if i < count - 1 else {}
            codes += [ended(pid) for pid in ranks(run, size, recording(run, acts))]
        expected = [0, *[EXIT_REQUEUE] * sum(sizes[:-1]), *[0] * sizes[-1]]
        alike = trained_on(run) == trained_on(calm) and len(trained_on(run)) == each * count * 8
        # several ranks hear of it one step later
        resumed = steps_of(run, "resumed") == [each * i + (sizes[i - 1] > 1) for i in range(1, count)]
        ours, theirs = curve(run), curve(calm)
        off = max((abs(a[1] / b[1] - 1) for a, b in zip(ours, theirs, strict=False)), default=math.inf)
    return Result(
        f"ranks {' '.join(map(str, sizes[:3]))}{' …' if count > 3 else ''}: {count} lives",
        f"the same images, t and noise; losses within {LOSS_TOLERANCE:.0e}",
        f"samples alike: {alike}, losses off by {off:.1e}",
        codes == expected and alike and resumed and off <= LOSS_TOLERANCE
        and [s for s, _ in ours] == [s for s, _ in theirs],
    )  # fmt: skip


# ---------------------------------------------------------------- non-finite numbers


def poisoned_batch(at: int, *, then: Act | None = None) -> Callable[[], None]:
    """For `life`: step `at` of attempt 0 trains on NaN; `then` is done as soon as the trainer has rolled back."""

    def before() -> None:
        from ddpm.data.batches import Batches
        from ddpm.training.trainer import Trainer

        init, images, roll_back = Batches.__init__, Batches.images, Trainer.roll_back
        attempts: list[int] = []  # of the batches in use

        def note_attempt(self: Batches, *args: Any, attempt: int, **options: Any) -> None:
            attempts[:] = [attempt]
            init(self, *args, attempt=attempt, **options)

        def poisoned(self: Batches, parts: Any, step: Any, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x_0, labels = images(self, parts, step, index)
            return (x_0 * math.nan if (attempts, step) == ([0], at) else x_0), labels

        def roll_back_then(trainer: Trainer) -> None:
            roll_back(trainer)
            if then:
                then(trainer)

        Batches.__init__, Batches.images = note_attempt, poisoned  # type: ignore[method-assign,assignment]
        Trainer.roll_back = roll_back_then  # type: ignore[method-assign,assignment]

    return before


def one_batch_is_not_finite(count: int) -> Result:
    """A batch of NaN at a random step, in one life and in one that is killed right after its rollback.

    Fails where NaN reaches weights or a save, where the rollback draws the same batch again, where the life after the
    kill forgets the attempt, and where the rollback leaves lines of the failed attempt.
    """
    chosen = random.Random(6)
    options = ("train.total_steps=20", "checkpoint.every_steps=4", "log.every_steps=1")
    bad: list[str] = []
    with new_root() as root:
        calm = prepare(root, "calm", *options)
        if ended(life(calm)) != 0:
            return Result("a batch of NaN", "", "the undisturbed run failed", False)
        for i in range(count):
            at = chosen.randrange(20)
            back_to = at // 4 * 4
            run, killed = prepare(root, f"run{i}", *options), prepare(root, f"killed{i}", *options)
            codes = [ended(life(run, poisoned_batch(at))), ended(life(killed, poisoned_batch(at, then=die))),
                     ended(life(killed, poisoned_batch(at)))]  # fmt: skip
            if codes != [0, -signal.SIGKILL, 0]:
                bad.append(f"step {at}: exit codes {codes}")
                continue
            # the life after the kill knows of the rollback: it does not come to the bad batch again
            attempts = [[e["attempt"] for e in read_events(r) if e["event"] == "rollback"] for r in (run, killed)]
            named = "non-finite loss or gradient" in log_of(run).read_text() and attempts == [[1], [1]]
            finite = all(torch.isfinite(v).all() for part in ("model", "ema") for v in final(run)[part].values())
            ours, theirs = curve(run), curve(calm)
            lines = [s for s, _ in ours] == [s for s, _ in theirs] and ours[:back_to] == theirs[:back_to]
            redrawn = all(a != b for a, b in zip(ours[back_to:], theirs[back_to:], strict=False))
            alike = same_end(killed, run)
            if not (named and finite and lines and redrawn and alike):
                bad.append(f"step {at}: attempts {attempts}, named {named}, finite {finite}, lines {lines}, "
                           f"other batches {redrawn}, the same after a kill {alike}")  # fmt: skip
    return Result(
        "a batch of NaN, and a kill after the rollback", "rolled back to other batches, named, completes",
        f"{count} steps, {len(bad)} bad" + (f": {bad[0]}" if bad else ""), not bad,
    )  # fmt: skip


def the_network_is_never_finite(_: int) -> Result:
    """A saved stop at step 6, then lives whose network returns NaN alone, then one with a network that works.

    Fails where the rollbacks have no end, where the exit code has the job put back, or where the good generation is
    replaced or removed.
    """
    options = ("train.total_steps=12", "train.max_rollbacks=2", "checkpoint.every_steps=1")

    def nan_alone() -> None:
        from ddpm.network.unet import UNet

        forward = UNet.forward
        UNet.forward = lambda self, *args: forward(self, *args) * math.nan  # type: ignore[method-assign]

    with new_root() as root:
        run = prepare(root, "run", *options)
        codes = [ended(life(run, at_steps({6: stop}))), ended(life(run, nan_alone))]
        good = generations.newest_good(run, silent)
        failed = [e for e in read_events(run) if e["event"] == "failed"]
        rollbacks = len(steps_of(run, "rollback"))
        codes += [ended(life(run)), run.latest_step()]
    said = [e["exit_code"] == EXIT_FATAL and "non-finite" in e["reason"] for e in failed]
    return Result(
        "a network that returns NaN alone", f"exit {EXIT_FATAL} after 2 rollbacks, with its reason; good save kept",
        f"exit {codes[1]} after {rollbacks} rollbacks, reason given: {said}, good save: {good and good.step}",
        codes == [EXIT_REQUEUE, EXIT_FATAL, 0, 12] and rollbacks == 2 and said == [True]
        and good is not None and good.step == 6,
    )  # fmt: skip


# ---------------------------------------------------------------- starting up

MOMENTS = (
    "ddpm.config.reading.load", "ddpm.run.fence.Fence.__init__", "ddpm.training.trainer.Trainer.resume",
    "launch.cluster.environment.set_defaults", "ddpm.training.ranks.join", "ddpm.data.packed.open_packed",
    "ddpm.network.device.resolve", "ddpm.training.trainer.Trainer.__init__", "ddpm.run.generations.newest_good",
)  # fmt: skip


def signalled_when(target: str) -> Callable[[], None]:
    """For `life`: SIGTERM as soon as `target`, a function that a starting life calls, is done."""

    def before() -> None:
        owner: Any = pkgutil.resolve_name(target.rpartition(".")[0])
        name = target.rpartition(".")[2]
        real = getattr(owner, name)

        @functools.wraps(real)
        def then_stop(*args: Any, **options: Any) -> Any:
            setattr(owner, name, real)
            result = real(*args, **options)
            stop(None)
            return result

        setattr(owner, name, then_stop)

    return before


def stopped_while_starting(count: int) -> Result:
    """A saved stop at step 7, then SIGTERM to one life after the other at another moment of its start each time.

    Fails where a start loses the signal (it then trains to its end), dies of it, counts as a failure, or spoils what
    the last life saved.
    """
    options = ("train.total_steps=16", "checkpoint.every_steps=1000")
    with new_root() as root:
        calm, run = prepare(root, "calm", *options), prepare(root, "run", *options)
        codes = [ended(life(calm)), ended(life(run, at_steps({7: stop})))]
        codes += [
            ended(life(run, signalled_when(moment))) for moment in itertools.islice(itertools.cycle(MOMENTS), count)
        ]
        reached = run.latest_step()
        codes.append(ended(life(run)))
        failures = len(steps_of(run, "failed"))
        identical = same_end(run, calm)
    return Result(
        f"SIGTERM × {count} before the first step", f"exit {EXIT_REQUEUE} each, no failure, identical end",
        f"exit codes {sorted(set(codes[2:-1]))}, {failures} failures, still at step {reached}, identical: {identical}",
        codes == [0, EXIT_REQUEUE, *[EXIT_REQUEUE] * count, 0] and failures == 0 and reached == 7 and identical,
    )  # fmt: skip


# ---------------------------------------------------------------- a full disk


class Disk:
    """A place for runs that can be filled up: a tmpfs where this user may mount one, else writes that are refused.

    What refuses writes sees the project's own alone: then job logs, which lie beside a run, find room.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._filler = root, root / "filler"
        size = f"size={saving.SPARE_BYTES + (32 << 20)}"
        mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(root)]
        self.is_real = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def before(self, acts: dict[int, Act]) -> Callable[[], None]:
        """For `life`: `at_steps` on this disk."""

        def patch() -> None:
            if not self.is_real:
                self._refusing = shimmed(_Refusing(self.root, marker=self._filler))  # undone when nobody holds it
                self._refusing.__enter__()
            at_steps(acts)()

        return patch

    def fill(self, trainer: Any) -> None:
        trainer.chronicle.saver.wait()  # the save under way still finds room
        self._filler.touch()
        if self.is_real:
            with self._filler.open("wb", buffering=0) as f, contextlib.suppress(OSError):
                while True:  # writes what fits, then raises
                    f.write(bytes(1 << 20))

    def free(self, _: Any = None) -> None:
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        if self.is_real:
            subprocess.run(["umount", "--lazy", str(self.root)], check=True)


@dataclass
class _Refusing(Shim):
    """Refuses to write, and nothing else, while `marker` exists."""

    marker: Path = Path()

    def note(self, operation: Operation) -> None:
        if operation.kind == "write" and self.marker.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)


def on_tensorboard(run: RunDir) -> list[int]:
    """Steps whose loss TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each later life
    return [e.step for e in EventAccumulator(str(run.tensorboard)).Reload().Scalars("train/loss")]


def disk_full(count: int) -> Result:
    """The disk with the run fills up in training: by turns still full at a stop, or free again in the same life.

    Fails where a refused write (of a save, an event, a metrics line, the job's log) ends training, where a failed save
    damages the last good one, where a stop that could not save claims that it did, and where a line of the curve is
    lost, or not on TensorBoard.
    """
    chosen = random.Random(7)
    options = ("train.total_steps=32", "checkpoint.every_steps=4", "log.every_steps=1")
    bad: list[str] = []
    with new_root() as root, new_root() as mounted:
        calm = prepare(root, "calm", *options)
        if ended(life(calm)) != 0:
            return Result("the disk fills up", "", "the undisturbed run failed", False)
        disk = Disk(mounted)
        try:
            for i in range(count):
                full_at = chosen.randrange(6, 16)
                until = full_at + chosen.randrange(9, 16)  # two saves or more are refused
                good = (full_at - 1) // 4 * 4
                run = prepare(disk.root, f"run{i}", *options)
                name = f"full at step {full_at} until {until}"
                if i % 2:
                    code = ended(life(run, disk.before({full_at: disk.fill, until: disk.free})))
                    if code != 0 or not same_end(run, calm):
                        bad.append(f"{name}: exit code {code} at step {run.latest_step()}")
                else:
                    log = root / f"log{i}"  # with room for what it says
                    code = ended(life(run, disk.before({full_at: disk.fill, until: stop}), log=log))
                    said = "checkpoint failed" in log.read_text() and f"step={until} saved=False" in log.read_text()
                    found = generations.newest_good(run, silent)
                    disk.free()
                    time.sleep(1)  # TensorBoard orders its files by second, then by pid, which starts again at times
                    after = ended(life(run))
                    if (code, said, found and found.step, after) != (1, True, good, 0) or not same_end(run, calm):
                        bad.append(f"{name}, stopped: exit code {code}, said so: {said}, good: {found and found.step}, "
                                   f"exit code {after} after it, identical: {same_end(run, calm)}")  # fmt: skip
                if (shown := on_tensorboard(run)) != [step for step, _ in curve(run)]:
                    bad.append(f"{name}: TensorBoard shows {shown}")
                remove(run)
                disk.free()
        finally:
            disk.unmount()
    return Result(
        f"the disk fills up × {count}", "training goes on; a failed stop says so; identical end",
        f"{'a tmpfs' if disk.is_real else 'refused writes'}: {len(bad)} bad" + (f": {bad[0]}" if bad else ""), not bad,
    )  # fmt: skip


ROWS = {
    # name: (row, full count, reduced count)
    "kill-9": (killed_at_random_moments, 200, 5),
    "resume-inside": (ended_inside_an_epoch, 20, 2),
    "fp16-overflow": (overflowed, 16, 3),
    "world-sizes": (world_sizes_change, 9, 3),
    "non-finite-batch": (one_batch_is_not_finite, 10, 1),
    "non-finite-always": (the_network_is_never_finite, 0, 0),
    "startup-stops": (stopped_while_starting, len(MOMENTS), 3),
    "disk-full-at-stop": (disk_full, 10, 2),
}
