"""Training on a GPU: every precision; overflows, stops and kills; nothing in a step waits for it. Compiled:
test_compiled.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.network.device import apply, resolve
from ddpm.run import generations
from ddpm.run.events import EventLog
from ddpm.run.fence import Fence
from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir
from ddpm.training.chronicle import MainChronicle
from ddpm.training.ranks import World
from ddpm.training.step import Step
from ddpm.training.trainer import Trainer
from tests.training import differences, make_config, make_images, make_run, on_ranks


class Life:
    """A Trainer on the GPU, from `resume` to where it stops."""

    def __init__(self, run: RunDir, device: torch.device, **changes: Any) -> None:
        config = make_config(**{"model__base_channels": 32, "data__image_size": 8, **changes})
        resolved = resolve(config, device, 2)
        apply(resolved)
        owner = {"job": "1", "restart": 0, "host": "here"}
        self.fence = Fence(run, owner, wait_s=0)
        images, events = make_images(50), EventLog(run, "1", 0, "here")
        chronicle = MainChronicle(config, run, self.fence, events, owner=owner, world_size=1, num_images=len(images))
        self.trainer = Trainer(config, run, World(0, 1, device), images, resolved, chronicle)

    def __enter__(self) -> Trainer:
        self.trainer.resume()
        self.trainer.warm_up(lambda: None)
        return self.trainer

    def __exit__(self, *_: object) -> None:
        self.fence.release()


def column(run: RunDir, name: str = "loss") -> list[float]:
    return [r[name] for r in read_jsonl(run.metrics)]


CALM = {"train__total_steps": 30, "train__lr": 1e-4}
"""At a high learning rate rounding grows into another path within ten steps, on any device."""


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_learns_what_it_learns_on_a_cpu(device: torch.device, tmp_path: Path, on_cpu: RunDir, amp: str) -> None:
    assert_learns(device, make_run(tmp_path), on_cpu, amp)


def assert_learns(device: torch.device, run: RunDir, on_cpu: RunDir, amp: str, *, compiled: bool = False) -> None:
    with Life(run, device, train__amp=amp, train__compile=compiled, **CALM) as trainer:
        assert trainer.train(lambda: None).finished
    assert generations.verify(run, 30).step == 30
    # same images, timesteps and noise: what differs is rounding, of TF32 or of 8 (bf16) or 11 (fp16) bits of mantissa
    assert column(run) == pytest.approx(column(on_cpu), rel=0.01)
    assert column(run, "grad_norm") == pytest.approx(column(on_cpu, "grad_norm"), rel=0.05)


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(device: torch.device, tmp_path: Path) -> None:
    assert_overflows(device, make_run(tmp_path))


def assert_overflows(device: torch.device, run: RunDir, *, compiled: bool = False) -> None:
    """From a loss times 2**60 on, no step of 15 comes back to where fp16 holds its gradients."""
    skipped_before: list[int] = []
    made_of: set[torch.dtype] = set()
    with Life(run, device, train__total_steps=20, train__amp="fp16", train__compile=compiled) as trainer:
        scaler, network = trainer.state.scaler, trainer.step.network

        def noted(*arguments: Any) -> torch.Tensor:
            eps: torch.Tensor = network(*arguments)
            made_of.add(eps.dtype)
            return eps

        def stop_requested() -> None:
            if trainer.at.step == 5:
                skipped_before.append(int(trainer.state.skipped))
                scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})

        trainer.step.network = noted
        assert trainer.train(stop_requested).finished
    assert made_of == {torch.float16}  # and not bf16, of whose compiled code torch may have made a cache
    state = generations.load(run, 20)
    assert state["extra"]["skipped_steps"] - skipped_before[0] == 15 and state["scaler"]["scale"] == 2.0**45
    assert all(torch.isfinite(w).all() for w in state["model"].values())
    assert all(math.isfinite(loss) for loss in column(run))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_never_waits_for_the_device(device: torch.device, tmp_path: Path, amp: str) -> None:
    with Life(make_run(tmp_path), device, train__total_steps=20, train__amp=amp, log__every_steps=100) as trainer:

        def stop_requested() -> None:
            watched = 5 <= trainer.at.step < 15  # before and after come the first step and the end
            torch.cuda.set_sync_debug_mode("error" if watched else "default")

        try:
            assert trainer.train(stop_requested).finished
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_deterministic_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    device: torch.device, tmp_path: Path, amp: str
) -> None:
    assert_goes_on(device, tmp_path, amp)


def assert_goes_on(device: torch.device, tmp_path: Path, amp: str, *, compiled: bool = False) -> None:
    changes = {
        "train__total_steps": 12,
        "train__amp": amp,
        "train__compile": compiled,
        "train__deterministic": True,
        "model__dropout": 0.1,
    }
    calm, stopped = make_run(tmp_path / "calm"), make_run(tmp_path / "stopped")
    with Life(calm, device, **changes) as trainer:
        trainer.train(lambda: None)
    with Life(stopped, device, **changes) as trainer:
        trainer.train(lambda: "preempted" if trainer.at.step == 5 else None)
    with Life(stopped, device, **changes) as trainer:
        assert trainer.at.step == 5
        trainer.train(lambda: None)
    assert differences(generations.load(calm, 12), generations.load(stopped, 12)) == []
    assert column(calm) == column(stopped)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_replayed_steps_have_the_bits_of_those_taken_kernel_by_kernel(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    average = {"train__ema_every_steps": 2, "train__ema_start_step": 5, "train__ema_warmup": True}
    changes = {**CALM, **average, "train__amp": amp, "train__deterministic": True, "model__dropout": 0.1}
    runs = []
    for replays in (True, False):
        if not replays:
            monkeypatch.setattr(Step, "replays", False)
        runs.append(make_run(tmp_path / str(replays)))
        with Life(runs[-1], device, **changes) as trainer:
            trainer.train(lambda: None)
            assert (trainer.step._replay is not None) is replays
            assert trainer.resolved.kernels == "own" and trainer.step.own is not None
    assert differences(*(generations.load(run, 30) for run in runs)) == []
    assert column(runs[0]) == column(runs[1]) and column(runs[0], "grad_norm") == column(runs[1], "grad_norm")


def live_unrecorded(world: World, path: Path) -> None:
    move = Step.move

    def waiting(self: Step, given: Any, loss: torch.Tensor, *more: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            loss.item()  # may not be recorded, and spoils what was
        return move(self, given, loss, *more)

    Step.move = waiting  # type: ignore[method-assign]
    with Life(make_run(path), world.device, **CALM, train__deterministic=True) as trainer:
        trainer.train(lambda: None)
        assert trainer.step._replay is None and torch.cuda.current_stream() == torch.cuda.default_stream()


def test_steps_after_a_recording_that_failed_stay_on_their_stream_and_have_the_same_bits(
    device: torch.device, tmp_path: Path
) -> None:
    """In a process of its own, since torch forgets no such recording."""
    on_ranks(1, live_unrecorded, tmp_path / "unrecorded", start="spawn")
    with Life(make_run(tmp_path / "replayed"), device, **CALM, train__deterministic=True) as trainer:
        trainer.train(lambda: None)
        assert trainer.step._replay is not None
    runs = [make_run(tmp_path / name) for name in ("unrecorded", "replayed")]
    assert differences(*(generations.load(run, 30) for run in runs)) == []
