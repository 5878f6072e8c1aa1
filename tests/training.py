"""Tiny runs that tests train: one life after another in this process, or several gloo ranks in processes of their own.

A life is one Trainer from `resume` to where it stops. Nothing here needs a download, and a step takes milliseconds.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm.config import schema
from ddpm.config import section as sections
from ddpm.data import packed as data
from ddpm.network.device import apply, resolve
from ddpm.run import generations
from ddpm.run.events import EventLog, read_events
from ddpm.run.fence import Fence
from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir
from ddpm.training import ranks
from ddpm.training.chronicle import Chronicle, MainChronicle
from ddpm.training.trainer import Outcome, Trainer

CPU = torch.device("cpu")
ALONE = ranks.World(0, 1, CPU)
TINY: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 8},
    "model": {
        "base_channels": 8,
        "channel_mults": [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [4],
        "dropout": 0.0,
    },
    "diffusion": {"timesteps": 8, "beta_end": 0.002},
    "train": {"total_steps": 8, "global_batch": 4, "lr": 0.01, "warmup_steps": 3, "ema_decay": 0.9},
    "checkpoint": {"every_min": None, "milestone_every_steps": None},
    "log": {"every_steps": 3, "grid_every_steps": None, "grid_images": 1},
    "sample": {"steps": 4, "num_samples": 4, "shards": 1, "batch": 4},
}


def make_config(**changes: Any) -> schema.Config:
    """The tiny config with changes as SECTION__KEY=value."""
    tree = {k: dict(v) for k, v in TINY.items()}
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        if section:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[leaf] = value
    made = sections.build(schema.Config, tree, "test")
    assert isinstance(made, schema.Config)
    return made


def make_images(num: int = 10, *, size: int = 8, classes: int = 2) -> data.PackedImages:
    """Noise: every image different, so that a wrong index changes the loss."""
    images = np.random.default_rng(7).integers(0, 256, size=(num, size, size, 3), dtype=np.uint8)
    return data.PackedImages(images, np.arange(num) % classes, "noise", "train", data.images_digest(images))


def make_run(path: Path) -> RunDir:
    path.mkdir(parents=True, exist_ok=True)
    return RunDir(path)


class Killed(BaseException):
    """What SIGKILL would do, where a test wants to go on."""


class Life:
    """One Trainer on a run with everything it holds, on the device of `world`; use as a context manager."""

    def __init__(
        self,
        config: schema.Config,
        run: RunDir,
        *,
        images: data.PackedImages | None = None,
        world: ranks.World = ALONE,
        restart: int = 0,
        warm_up: bool = True,
        start: dict[str, Any] | None = None,
        held_out: data.PackedImages | None = None,
        before_resume: Callable[[Trainer], None] = lambda trainer: None,
    ) -> None:
        torch.set_num_threads(1)
        resolved = resolve(config, world.device, 1)
        apply(resolved)
        owner = {"job": "1", "restart": restart, "host": "here"}
        self.fence = Fence(run, owner, wait_s=0) if world.is_main else None
        images = images or make_images()
        chronicle = Chronicle()
        if self.fence is not None:
            events = EventLog(run, "1", restart, "here")
            chronicle = MainChronicle(
                config, run, self.fence, events, owner=owner, world_size=world.world_size, num_images=len(images)
            )
        self.trainer = Trainer(config, run, world, images, resolved, chronicle, start=start, held_out=held_out)
        self._warm_up = warm_up
        before_resume(self.trainer)

    def __enter__(self) -> Life:
        self.trainer.resume()
        if self._warm_up:
            self.trainer.warm_up(lambda: None)
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.chronicle.settle()
        if self.fence is not None:
            self.fence.release()

    def train(self, *, stop_at: Iterable[int] = (), kill_at: int | None = None) -> Outcome:
        stops = set(stop_at)

        def stop_requested() -> str | None:
            if self.trainer.at.step == kill_at:
                raise Killed
            return "preempted" if self.trainer.at.step in stops else None

        return self.trainer.train(stop_requested)


def live(config: schema.Config, run: RunDir, *, stops: Iterable[int] = (), **options: Any) -> Outcome:
    """Lives in a row, each a new Trainer: one that stops at each of `stops`, and a last one that finishes."""
    for restart, step in enumerate(stops):
        with Life(config, run, restart=restart, **options) as life:
            outcome = life.train(stop_at=[step])
        assert outcome == Outcome(False, step, "preempted", True)
    with Life(config, run, restart=99, **options) as life:
        outcome = life.train()
    assert outcome.finished and outcome.saved
    return outcome


def fill_zeros(network: torch.nn.Module, std: float) -> None:
    """As if trained: what begins at zero (last layers, biases) becomes normals, the same on every device."""
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.copy_(std * torch.randn(p.shape, generator=drawn))


def first_gradients(
    config: schema.Config, run: RunDir, device: torch.device = CPU, more: Callable[[Trainer], None] = lambda _: None
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first step with weights as if trained, by a life of which `more` is asked first."""
    with Life(config, run, world=ranks.World(0, 1, device), images=make_images(50)) as life:
        step = life.trainer.step
        fill_zeros(step.state.model, 0.1)
        more(life.trainer)
        loss = float(step.gradients(step.given()))
        return loss, [p.grad.double().cpu() for p in step.state.model.parameters() if p.grad is not None]


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The length of the difference of all gradients together, by the length of theirs."""
    a, b = (torch.cat([g.flatten() for g in of]) for of in (ours, theirs))
    return float((a - b).norm() / b.norm())


def assert_micro_batches_agree(
    path: Path,
    device: torch.device,
    amp: str,
    loss_to: float,
    gradients_to: float,
    more: Callable[[Trainer], None] = lambda _: None,
) -> None:
    """With dropout a batch of 16, whole, by halves and by quarters, has one loss and one gradient, to relative
    differences of `loss_to` and `gradients_to`; other masks change ten times as much."""
    options = {"train__global_batch": 16, "train__amp": amp, "model__base_channels": 32, "model__dropout": 0.1}

    def found(name: str, **changes: Any) -> tuple[float, list[torch.Tensor]]:
        return first_gradients(make_config(**{**options, **changes}), make_run(path / name), device, more)

    loss, gradients = found("whole")
    for micro in (8, 4):
        of_parts = found(f"by-{micro}", train__micro_batch=micro)
        assert abs(of_parts[0] - loss) <= loss_to * loss, (micro, of_parts[0], loss)
        assert (found_apart := apart(of_parts[1], gradients)) <= gradients_to, (micro, found_apart)
    without = found("without", model__dropout=0.0)
    assert apart(without[1], gradients) > 10 * gradients_to


# ---------------------------------------------------------------- meddling


def poison(trainer: Trainer, when: Any, *, how: str = "loss") -> list[dict[str, Any]]:
    """Make the loss NaN, or add an infinity that leaves finite gradients, where `when(trainer)`.

    Returns a list that collects the model's parameters after each poisoned step.
    """
    after: list[dict[str, Any]] = []
    loss, update = trainer.step.diffusion.loss, trainer.state.ema.update
    hit = False

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal hit
        hit = when(trainer)
        value = loss(*args)
        if not hit:
            return value
        return value * math.nan if how == "gradient" else value + math.inf

    def updated(model: torch.nn.Module, step: int) -> None:
        update(model, step)
        if hit:
            after.append({k: v.clone() for k, v in model.state_dict().items()})

    trainer.step.diffusion.loss = poisoned  # type: ignore[method-assign,assignment]
    trainer.state.ema.update = updated  # type: ignore[method-assign]
    return after


# ---------------------------------------------------------------- comparing


def lines(run: RunDir) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in r.items() if k not in ("time", "images_per_s")} for r in read_jsonl(run.metrics)]


def events(run: RunDir) -> list[str]:
    return [e["event"] for e in read_events(run)]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places at which two state trees are not bit for bit the same."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [where]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [f"{where}: keys {set(a) ^ set(b)}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a!r} {b!r}"]


def assert_same_end(one: RunDir, other: RunDir, step: int) -> None:
    """Final state (model, EMA, optimizer, window, counters) and every metrics line, bit for bit."""
    for run in (one, other):
        generations.verify(run, step)
    assert differences(generations.load(one, step), generations.load(other, step)) == []
    assert lines(one) == lines(other)


# ---------------------------------------------------------------- several ranks


def joined(rank: int, world_size: int, port: int, timeout_s: float, work: Callable[..., None], *args: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    world = ranks.join(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        master_addr="127.0.0.1",
        master_port=port,
        timeout_s=timeout_s,
    )
    work(world, *args)
    ranks.leave()


def _rank(world: ranks.World, config: schema.Config, run: RunDir, stop_at: list[int], seen: Path | None) -> None:
    recorded: dict[tuple[int, int], Any] = {}
    with Life(config, run, world=world) as life:
        if seen:
            record(life.trainer, recorded)
        life.train(stop_at=stop_at)
    if seen:
        torch.save(recorded, seen / f"{world.world_size}-{world.rank}-{life.trainer.at.step}.pt")


def record(trainer: Trainer, into: dict[tuple[int, int], Any]) -> None:
    """Put what the network is trained on into `into`: (step, index in the global batch) -> x_0, t, eps."""
    q_sample = trainer.step.diffusion.q_sample

    def spy(x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        step, rank = trainer.at.step, trainer.world.rank
        known = sum(s == step for s, _ in into)
        for i in range(len(t)):
            into[step, rank * trainer.step.share + known + i] = (x_0[i].clone(), t[i].clone(), eps[i].clone())
        return q_sample(x_0, t, eps)

    trainer.step.diffusion.q_sample = spy  # type: ignore[method-assign]


def live_on_ranks(
    world_size: int, config: schema.Config, run: RunDir, *, stop_at: Iterable[int] = (), seen: Path | None = None
) -> None:
    """One life on `world_size` gloo ranks, until it stops or is done."""
    on_ranks(world_size, _rank, config, run, list(stop_at), seen)


def _together(ready: Any, join: Callable[..., None], *args: Any) -> None:
    """Once all processes are there: on a busy machine one may be loaded long after the others would give it up."""
    ready.wait(120)
    join(*args)


def on_ranks(
    world_size: int,
    work: Callable[..., None],
    *args: Any,
    timeout_s: float = 600,
    join: Callable[..., None] = joined,
    start: str = "forkserver",
) -> None:
    """work(world, *args) on `world_size` ranks, each a process of its own, which `join` brings together.

    start: forkserver imports torch once, and never forks it with threads; spawn forks nothing, for a GPU.
    """
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(["tests.training", "torch.utils.tensorboard", "torch._dynamo"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ready = context.Barrier(world_size)
    processes = [
        context.Process(target=_together, args=(ready, join, rank, world_size, port, timeout_s, work, *args))
        for rank in range(world_size)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
    assert codes == [0] * world_size
