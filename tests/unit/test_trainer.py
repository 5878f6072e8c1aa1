"""ddpm/trainer.py: a run that was stopped anywhere, any number of times, is the run that never was."""

import contextlib
import errno
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm import checkpoint, distributed, grids, runtime, schedule
from ddpm.config import Config
from ddpm.data.batches import Batches
from ddpm.errors import DoNotRetry, RunBusy
from ddpm.optimizer import learning_rate
from ddpm.run.state import finished_step
from ddpm.rundir import EventLog, RunDir, read_events
from ddpm.trainer import Outcome, Trainer
from tests.training import (
    Killed,
    Life,
    assert_same_end,
    differences,
    events,
    lines,
    live,
    live_on_ranks,
    make_config,
    make_images,
    make_run,
    on_ranks,
    record,
)

TOTAL = 8
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train__amp": "bf16"},
    "accumulation": {"train__micro_batch": 2},
    "dropout": {"model__dropout": 0.3},
    "dropout-accumulation-classes": {"model__dropout": 0.3, "train__micro_batch": 1, "model__num_classes": 2},
    "cosine-no-clip": {"train__lr_schedule": "cosine", "train__grad_clip": None},
    "adamw-ema-options": {
        "train__optimizer": "adamw",
        "train__weight_decay": 0.1,
        "train__ema_start_step": 3,
        "train__ema_every_steps": 2,
        "train__ema_warmup": True,
    },
    "labels-dropped": {"model__num_classes": 2, "train__label_dropout": 0.5, "train__micro_batch": 2},
    "l1-dns": {"diffusion__loss": "l1", "diffusion__schedule": "dns"},
}


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_by_new_trainers_ends_bit_identical(tmp_path: Path, kind: str) -> None:
    config = make_config(**KINDS[kind])
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    # 1: inside the warm-up and a log window; 2: 8 of 10 images; 5: at the border of epoch 2; 6: at a log line
    live(config, other, stops=[1, 2, 5, 6])
    assert_same_end(one, other, TOTAL)
    assert [r["step"] for r in lines(other)] == [3, 6, 8]


def test_stopped_after_every_step_ends_bit_identical(tmp_path: Path) -> None:
    config = make_config(model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    live(config, other, stops=range(1, TOTAL))
    assert_same_end(one, other, TOTAL)


def test_train_called_again_after_a_stop_goes_on_bit_identical(tmp_path: Path) -> None:
    config = make_config(model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    with Life(config, other) as life:
        for step in (2, 3, 7):
            assert life.train(stop_at=[step]) == Outcome(False, step, "preempted", True)
        assert life.train().finished
    assert_same_end(one, other, TOTAL)


def test_killed_without_a_word_resumes_from_the_last_save_bit_identical(tmp_path: Path) -> None:
    config = make_config(checkpoint__every_steps=2, log__every_steps=1)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "killed")
    live(config, one)
    for step in (1, 3, 5):  # before any save; one step past a save; again
        with pytest.raises(Killed), Life(config, other) as life:
            life.train(kill_at=step)
    assert [r["step"] for r in lines(other)] == [1, 2, 3, 4]
    live(config, other)
    assert_same_end(one, other, TOTAL)
    assert [r["step"] for r in lines(other)] == list(range(1, TOTAL + 1))


def test_tensorboard_shows_every_logged_step_once_whatever_died_in_between(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, run = make_config(checkpoint__every_steps=3, log__every_steps=1), make_run(tmp_path)
    for step in (2, 5, 7):  # before any save; two steps past a save; one
        with pytest.raises(Killed), Life(config, run) as life:
            try:
                life.train(kill_at=step)
            finally:
                life.trainer.telemetry.board.flush()  # type: ignore[union-attr]  # what was logged got to the disk
    live(config, run)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    shown = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert shown == [(r["step"], pytest.approx(r["loss"])) for r in lines(run)]
    assert [step for step, _ in shown] == list(range(1, TOTAL + 1))


def test_labels_are_dropped_as_often_as_asked_and_by_step_and_sample_alone(tmp_path: Path) -> None:
    def labels_seen(name: str, micro: int | None) -> list[list[int]]:
        config = make_config(
            model__num_classes=2, train__label_dropout=0.25, train__global_batch=64, train__micro_batch=micro
        )
        seen: list[list[int]] = []
        with Life(config, make_run(tmp_path / name), images=make_images(64)) as life:
            network = life.trainer.network

            def spy(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                step = life.trainer.at.step
                seen[step:] = [[*(seen[step] if step < len(seen) else []), *labels.tolist()]]
                return network(x_t, t, labels)  # type: ignore[no-any-return]

            life.trainer.network = spy
            life.train()
        return seen

    whole = labels_seen("whole", None)
    assert labels_seen("parts", 16) == whole
    dropped = [label == 2 for step in whole for label in step]
    assert len(dropped) == 8 * 64 and 90 <= sum(dropped) <= 166  # 128 on average; 4 standard deviations are 39
    assert whole[0] != whole[1] and {label for step in whole for label in step} == {0, 1, 2}


def test_training_ends_early_where_the_logged_losses_have_settled(tmp_path: Path) -> None:
    options = {"train__early_stop_below": 100.0, "train__early_stop_window": 3, "log__every_steps": 2}
    config, run = make_config(**options), make_run(tmp_path / "settled")
    live(config, run, stops=[3])  # lines at 2, 4, 6: the window survives the stop
    assert [r["step"] for r in lines(run)] == [2, 4, 6]
    assert events(run)[-1] == "finished" and checkpoint.verify(run, 6).manifest["early_stopped"]
    assert run.ema_weights(6).exists() and run.grid(6).exists()
    assert finished_step(run, config) is not None
    unbounded = make_config(**{**options, "train__early_stop_below": None})
    assert finished_step(run, unbounded) is None  # who wants more has it
    unsettled = make_run(tmp_path / "unsettled")
    assert live(make_config(**{**options, "train__early_stop_below": 1e-9}), unsettled).step == TOTAL
    assert "early_stopped" not in checkpoint.verify(unsettled, TOTAL).manifest
    assert checkpoint.load(unsettled, TOTAL)["extra"]["early_stopped"] is None


def test_a_run_that_ended_early_keeps_by_how_much_its_losses_changed_and_goes_on_under_a_tighter_bound(
    tmp_path: Path,
) -> None:
    options = {"train__early_stop_window": 3, "log__every_steps": 2}
    run = make_run(tmp_path / "run")
    live(make_config(**options, train__early_stop_below=100.0), run)
    losses = [r["loss"] for r in lines(run)]
    change = checkpoint.load(run, 6)["extra"]["early_stopped"]
    assert len(losses) == 3 and change == (abs(losses[1] - losses[0]) + abs(losses[2] - losses[1])) / 2
    assert live(make_config(**options, train__early_stop_below=change / 100), run).step == TOTAL


def test_a_run_that_ended_early_is_left_as_it_is_by_a_life_that_comes_later(tmp_path: Path) -> None:
    config = make_config(train__early_stop_below=100.0, train__early_stop_window=3, log__every_steps=2)
    run = make_run(tmp_path)
    live(config, run)
    saved, told = run.steps_saved(), lines(run)
    live(config, run)
    assert (run.steps_saved(), lines(run)) == (saved, told)


def test_a_run_cut_short_at_a_step_that_was_saved_ends_as_if_planned_so(tmp_path: Path) -> None:
    """Stopped at step 5 and submitted again with that many steps: its end is still to be made."""
    planned, cut = make_run(tmp_path / "planned"), make_run(tmp_path / "cut")
    config = make_config(train__total_steps=5)
    live(config, planned)
    with Life(make_config(), cut) as life:
        life.train(stop_at=[5])
    assert finished_step(planned, config) is not None and finished_step(cut, config) is None
    live(config, cut)
    assert finished_step(cut, config) is not None and events(cut)[-1] == "finished"
    assert lines(cut) == lines(planned) and [r["step"] for r in lines(cut)] == [3, 5]
    assert cut.ema_weights(5).read_bytes() == planned.ema_weights(5).read_bytes()
    assert cut.grid(5).read_bytes() == planned.grid(5).read_bytes()


def test_an_average_that_starts_late_is_the_weights_until_then(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    config = make_config(train__ema_start_step=6)
    with Life(config, run) as life:
        life.train(stop_at=[5])
        early = checkpoint.load(run, 5)
        life.train()
    late = checkpoint.load(run, TOTAL)
    assert differences(early["model"], early["ema"]) == [] and differences(late["model"], late["ema"])


def test_adam_moments_lie_in_memory_as_their_weights_after_a_resume(tmp_path: Path) -> None:
    config, run = make_config(), make_run(tmp_path)
    with Life(config, run) as life:
        life.train(stop_at=[3])
        before = [{k: v.stride() for k, v in s.items()} for s in life.trainer.optimizer.state.values()]
        assert any(p.stride() != p.contiguous().stride() for p in life.trainer.model.parameters())  # channels-last
    with Life(config, run) as life:
        after = [{k: v.stride() for k, v in s.items()} for s in life.trainer.optimizer.state.values()]
    assert after == before


def test_events_tell_the_lives_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    live(make_config(), run, stops=[3])
    assert events(run) == ["started", "stop_requested", "checkpoint", "resumed", "checkpoint", "finished"]
    assert [e["step"] for e in read_events(run)] == [0, 3, 3, 3, 8, 8]
    assert all(e["world_size"] == 1 for e in read_events(run))


def test_a_stop_at_the_last_step_is_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(), run) as life:
        assert life.train(stop_at=[TOTAL]) == Outcome(True, TOTAL, "", True)


def test_fp16_needs_a_gpu_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"train\.amp=fp16 needs a GPU.*--gpus-per-node 1"):
        Life(make_config(train__amp="fp16"), make_run(tmp_path))


def test_more_steps_with_a_constant_rate_continue_the_finished_run(tmp_path: Path) -> None:
    long, short = make_config(log__every_steps=2), make_config(train__total_steps=6, log__every_steps=2)
    one, other = make_run(tmp_path / "at-once"), make_run(tmp_path / "extended")
    live(long, one)
    live(short, other)
    assert short.digest() == long.digest()
    live(long, other)
    assert_same_end(one, other, TOTAL)


def test_the_learning_rate_warms_up_then_stays_or_falls_to_zero() -> None:
    constant = make_config(train__lr=0.5, train__warmup_steps=4, train__total_steps=12)
    assert [learning_rate(constant, k) for k in (0, 1, 3, 4, 11)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    cosine = make_config(train__lr=0.5, train__warmup_steps=4, train__total_steps=12, train__lr_schedule="cosine")
    assert [learning_rate(cosine, k) for k in (0, 3, 4)] == [0.125, 0.5, 0.5]
    assert learning_rate(cosine, 8) == pytest.approx(0.25) and learning_rate(cosine, 12) == pytest.approx(0)


# ---------------------------------------------------------------- what a step computes


def first_gradients(config: Config, run: RunDir) -> tuple[float, list[torch.Tensor]]:
    with Life(config, run) as life:
        trainer = life.trainer
        with torch.no_grad():
            for p in trainer.model.parameters():  # as if trained: its last layer begins at zero
                p.add_(0.01)
        loss = float(trainer._forward_backward(0))
        return loss, [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def test_accumulation_changes_loss_and_gradients_by_rounding_alone(tmp_path: Path) -> None:
    whole = first_gradients(make_config(), make_run(tmp_path / "whole"))
    parts = first_gradients(make_config(train__micro_batch=1), make_run(tmp_path / "parts"))
    # float32 sums of the same 4 terms in another order: a few units in the last place (6e-8) of the largest term
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert len(whole[1]) == len(parts[1]) > 10
    for a, b in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, float(a.abs().max())))


def test_a_stop_save_and_resume_change_no_generator_of_the_process(tmp_path: Path) -> None:
    """What follows from (seed, step) must not hang on how often anything was drawn before."""
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    config = make_config(model__dropout=0.3)
    live(config, one)
    torch.manual_seed(12345)
    torch.randn(77)
    live(config, other)
    assert_same_end(one, other, TOTAL)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    live(make_config(), one)
    live(make_config(seed=1), other)
    assert differences(lines(one), lines(other))


# ---------------------------------------------------------------- several ranks


def joined(seen: Path) -> dict[tuple[int, int], Any]:
    out: dict[tuple[int, int], Any] = {}
    for path in sorted(seen.glob("*.pt")):
        part = torch.load(path, weights_only=True)
        assert not set(part) & set(out), "two ranks, or two lives, trained on the same place of a batch"
        out.update(part)
    return out


def test_ranks_that_come_and_go_see_the_samples_of_one_rank(tmp_path: Path) -> None:
    """2, then 1, then 2 ranks: the same images, flips, t and noise, and the same loss to rounding."""
    config = make_config(log__every_steps=2)
    alone, run, seen = make_run(tmp_path / "alone"), make_run(tmp_path / "ranks"), tmp_path / "seen"
    expected: dict[tuple[int, int], Any] = {}
    with Life(config, alone) as life:
        record(life.trainer, expected)
        life.train()
    assert len(expected) == TOTAL * 4

    seen.mkdir()
    live_on_ranks(2, config, run, stop_at=[3], seen=seen)
    part: dict[tuple[int, int], Any] = {}
    with Life(config, run) as life:
        record(life.trainer, part)
        life.train(stop_at=[5])
    torch.save(part, seen / "1-0.pt")
    live_on_ranks(2, config, run, seen=seen)

    assert differences(joined(seen), expected) == []
    assert [r["step"] for r in lines(run)] == [2, 4, 6, 8]
    for ours, theirs in zip(lines(run), lines(alone), strict=True):
        # sums of gradients in another order: 1e-7 a step, which 8 steps of Adam at lr 0.01 carry into the weights
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert {**ours, "loss": 0, "grad_norm": 0} == {**theirs, "loss": 0, "grad_norm": 0}
    assert [e["world_size"] for e in read_events(run) if e["event"] in ("started", "resumed")] == [2, 1, 2]


def test_three_ranks_stopped_and_resumed_end_bit_identical(tmp_path: Path) -> None:
    """Three terms have an order of summation: DDP's buckets must be grouped alike in every life."""
    config = make_config(train__global_batch=6, model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live_on_ranks(3, config, one)
    live_on_ranks(3, config, other, stop_at=[4])
    live_on_ranks(3, config, other)
    assert_same_end(one, other, TOTAL)


def go_on_after_a_stop_while_starting(world: distributed.World, config: Config, run: RunDir) -> None:
    with Life(config, run, world=world, warm_up=False) as life:
        for asked in ("preempted", None):  # by hand, and nobody came to kill it
            life.trainer.warm_up(lambda asked=asked: asked)
            outcome = life.trainer.train(lambda asked=asked: asked)
        assert outcome.finished


def test_three_ranks_asked_to_stop_while_starting_go_on_bit_identical(tmp_path: Path) -> None:
    config = make_config(train__global_batch=6, model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "asked")
    live_on_ranks(3, config, one)
    on_ranks(3, go_on_after_a_stop_while_starting, config, other)
    assert_same_end(one, other, TOTAL)


# ---------------------------------------------------------------- poison


def poison(trainer: Trainer, when: Any, *, how: str = "loss") -> list[dict[str, Any]]:
    """Make the loss NaN, or add an infinity that leaves finite gradients, where `when(trainer)`.

    Returns a list that collects the model's parameters after each poisoned step.
    """
    after: list[dict[str, Any]] = []
    loss, update = trainer.diffusion.loss, trainer.ema.update
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

    trainer.diffusion.loss = poisoned  # type: ignore[method-assign,assignment]
    trainer.ema.update = updated  # type: ignore[method-assign]
    return after


@pytest.mark.parametrize("how", ["gradient", "loss"])
@pytest.mark.parametrize("step", [0, 4, TOTAL - 1])
def test_a_non_finite_step_never_reaches_the_weights_and_is_rolled_back(tmp_path: Path, how: str, step: int) -> None:
    config, run = make_config(checkpoint__every_steps=3), make_run(tmp_path)
    with Life(config, run) as life:
        before: dict[int, Any] = {}
        after = poison(life.trainer, lambda t: t.at.step == step and t.at.attempt == 0, how=how)
        inner = life.trainer._forward_backward

        def spy(at: int, **kw: Any) -> torch.Tensor:
            before.setdefault(at, {k: v.clone() for k, v in life.trainer.model.state_dict().items()})
            return inner(at, **kw)

        life.trainer._forward_backward = spy  # type: ignore[method-assign,assignment]
        outcome = life.train()
        assert outcome.finished and life.trainer.at.attempt == 1 and life.trainer.at.rollbacks == 1
    assert len(after) == 1 and differences(after[0], before[step]) == [], "the masked update changed the weights"
    rollbacks = [e for e in read_events(run) if e["event"] == "rollback"]
    assert [e["attempt"] for e in rollbacks] == [1]
    assert [r["step"] for r in lines(run)] == [3, 6, 8]
    assert all(math.isfinite(r["loss"]) for r in lines(run))
    assert all(torch.isfinite(v).all() for v in checkpoint.load(run, TOTAL)["model"].values())


def test_after_a_rollback_other_samples_are_drawn_and_a_restart_keeps_to_them(tmp_path: Path) -> None:
    config = make_config(checkpoint__every_steps=2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    for run, stops in ((one, []), (other, [5, 7])):
        for stop in [*stops, None]:
            with Life(config, run) as life:
                poison(life.trainer, lambda t: t.at.step == 3 and t.at.attempt == 0)
                life.train(stop_at=[stop] if stop else [])
    assert_same_end(one, other, TOTAL)
    assert checkpoint.load(other, TOTAL)["extra"]["attempt"] == 1
    clean = make_run(tmp_path / "clean")
    live(config, clean)
    assert differences(lines(clean), lines(one))


def test_a_rollback_before_any_save_starts_over_as_the_seed_says(tmp_path: Path) -> None:
    """Nothing of the failed attempt is left: it does not matter how far that came."""
    runs = [make_run(tmp_path / name) for name in ("early", "late")]
    for run, step in zip(runs, (0, 5), strict=True):
        with Life(make_config(), run) as life:
            poison(life.trainer, lambda t, step=step: t.at.step == step and t.at.attempt == 0)
            assert life.train().finished
    assert_same_end(runs[0], runs[1], TOTAL)


def test_a_rollback_waits_for_the_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = make_config(checkpoint__every_steps=3), make_run(tmp_path)
    write, gone_back_to = torch.save, []

    def slow(*args: Any) -> None:
        time.sleep(0.3)
        write(*args)

    with Life(config, run) as life:
        poison(life.trainer, lambda t: t.at.step == 3 and t.at.attempt == 0)
        batches = life.trainer._batches

        def spy() -> Batches:
            gone_back_to.append(life.trainer.at.step)
            return batches()

        life.trainer._batches = spy  # type: ignore[method-assign]
        monkeypatch.setattr(torch, "save", slow)
        assert life.train().finished
    assert gone_back_to == [3]


def test_no_save_holds_a_step_that_is_not_known_to_be_good(tmp_path: Path) -> None:
    """A save or a stop due right after the poisoned step, whose value would be read a step later."""
    config, run = make_config(checkpoint__every_steps=4), make_run(tmp_path)
    with Life(config, run) as life:
        poison(life.trainer, lambda t: t.at.step == 3 and t.at.attempt == 0)
        assert life.train(stop_at=[4]) == Outcome(False, 4, "preempted", True)
        assert life.trainer.at.attempt == 1
    assert checkpoint.load(run, 4)["extra"]["attempt"] == 1


def test_a_stop_within_a_grid_saves_no_step_that_is_not_known_to_be_good(tmp_path: Path) -> None:
    config, run = make_config(checkpoint__every_steps=3, log__grid_every_steps=4), make_run(tmp_path)
    with Life(config, run) as life:
        poison(life.trainer, lambda t: t.at.step == 3 and t.at.attempt == 0)
        asked = 0

        def stop_requested() -> str | None:
            nonlocal asked
            asked += life.trainer.at.step == 4
            return "preempted" if asked >= 2 else None

        assert life.trainer.train(stop_requested) == Outcome(False, 4, "preempted", True)
        assert life.trainer.at.attempt == 1
    live(config, run)
    assert all(math.isfinite(r["loss"]) for r in lines(run))


def test_a_rollback_that_an_orphan_told_of_too_counts_once(tmp_path: Path) -> None:
    config, run = make_config(checkpoint__every_steps=2), make_run(tmp_path)
    with pytest.raises(Killed), Life(config, run) as life:
        poison(life.trainer, lambda t: t.at.step == 3 and t.at.attempt == 0)
        life.train(kill_at=6)
    EventLog(run, "1", 77, "there").append("rollback", attempt=1)
    with Life(config, run) as life:
        assert (life.trainer.at.attempt, life.trainer.at.rollbacks) == (1, 1)


def test_poison_that_always_comes_back_ends_with_do_not_retry_and_keeps_the_last_good(tmp_path: Path) -> None:
    config, run = make_config(checkpoint__every_steps=3, train__max_rollbacks=2), make_run(tmp_path)
    with Life(config, run) as life:
        poison(life.trainer, lambda t: t.at.step == 4)
        with pytest.raises(DoNotRetry, match=r"non-finite 3 times .*train\.max_rollbacks = 2"):
            life.train()
    assert events(run).count("rollback") == 2
    good = checkpoint.newest_good(run, print)
    assert good is not None and good.step == 3
    assert all(torch.isfinite(v).all() for v in checkpoint.load(run, 3)["model"].values())


# ---------------------------------------------------------------- failing disks, other holders


def full_disk(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    """Writes of checkpoint data fail with ENOSPC while full() is true: beneath torch.save, where a disk would."""
    from ddpm.rundir import HashingFile

    init = HashingFile.__init__

    class Raw:
        def __init__(self, raw: Any) -> None:
            self.raw = raw

        def write(self, data: Any) -> int:
            if ".pt." in self.raw.name and full() and self.raw.tell() > 4096:  # torch.save has begun its archive
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.raw.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.raw, name)

    monkeypatch.setattr(HashingFile, "__init__", lambda self, raw: init(self, cast(BinaryIO, Raw(raw))))


def test_a_full_disk_costs_one_save_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = make_config(checkpoint__every_steps=2), make_run(tmp_path)
    saved: list[int] = []
    with Life(config, run) as life:
        full_disk(monkeypatch, lambda: 4 <= life.trainer.at.step < 6 and not saved)
        trainer = life.trainer
        save = trainer._save

        def spy(**kw: Any) -> bool:
            if trainer.at.step == 6:
                trainer.saver.wait(raising=False)  # type: ignore[union-attr]
                saved.extend(run.steps_saved())  # while full: the one of step 2 alone
            return save(**kw)

        trainer._save = spy  # type: ignore[method-assign]
        assert life.train().finished
    assert saved == [2]
    assert run.steps_saved() == [8, 6, 2]
    assert "checkpoint failed: step=4" in capsys.readouterr().out
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_a_stop_whose_save_failed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = make_config(checkpoint__every_steps=2), make_run(tmp_path)
    with Life(config, run) as life:
        full_disk(monkeypatch, lambda: life.trainer.at.step == 5 and run.latest_step() == 4)
        assert life.train(stop_at=[5]) == Outcome(False, 5, "preempted", False)
        assert run.steps_saved() == [4, 2]
        assert life.train().finished  # nobody killed us, and there is room again


def test_a_disk_full_for_everything_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeat, events and grids meet ENOSPC as checkpoints do."""
    from ddpm import rundir, telemetry

    config, run = make_config(), make_run(tmp_path)
    monkeypatch.setattr(telemetry, "HEARTBEAT_EVERY_S", 0)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Life(config, run) as life:
        with monkeypatch.context() as m:
            m.setattr(telemetry, "write_json", refuse)
            m.setattr(rundir.EventLog, "append", refuse)
            m.setattr(telemetry, "write_png", refuse)
            life.train(stop_at=[4])
        assert life.train().finished


def test_a_run_taken_over_stops_and_publishes_nothing(tmp_path: Path) -> None:
    config, run = make_config(checkpoint__every_steps=3), make_run(tmp_path)
    with Life(config, run) as life:
        life.train(stop_at=[3])
        run.fence.write_text("99\n")
        with pytest.raises(RunBusy, match="taken over by a later job"):
            life.train(stop_at=[5])
    assert run.steps_saved() == [3]


def test_a_rollback_before_any_save_forgets_skipped_steps_and_the_scale_of_losses(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(train__amp="bf16"), run) as life:
        trainer = life.trainer
        trainer.resolved = replace(trainer.resolved, amp="fp16")  # else it needs a GPU
        trainer.scaler = trainer._new_scaler()
        fresh = trainer.scaler.state_dict()
        poison(trainer, lambda t: t.at.step == 2 and t.at.attempt == 0, how="gradient")
        assert life.train().finished and trainer.at.rollbacks == 1
    end = checkpoint.load(run, TOTAL)
    assert end["extra"]["skipped_steps"] == 0
    assert end["scaler"]["scale"] == fresh["scale"] and end["scaler"]["_growth_tracker"] == TOTAL


# ---------------------------------------------------------------- grids


def grid_of(run: RunDir, step: int) -> np.ndarray:
    with Image.open(run.grid(step)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_grid_shows_the_weights_that_the_config_samples_and_changes_no_step(tmp_path: Path, weights: str) -> None:
    plain, run = make_run(tmp_path / "plain"), make_run(tmp_path / "grids")
    options: dict[str, Any] = {"model__dropout": 0.5, "train__lr": 0.1, "checkpoint__every_steps": 1}
    live(make_config(**options), plain)
    config = make_config(**options, sample__weights=weights, log__grid_every_steps=3)
    live(config, run)
    assert_same_end(plain, run, TOTAL)
    network = runtime.build_model(config, torch.device("cpu"), "off")
    network.load_state_dict(checkpoint.load(run, TOTAL)[weights])
    drawn = grids.draw(config, network.eval(), schedule.build(config.diffusion), "off", lambda: None)
    assert np.array_equal(grid_of(run, TOTAL), drawn) and run.grid(3).exists()


def stop_rank_1_within_a_grid(world: distributed.World, config: Config, run: RunDir) -> None:
    with Life(config, run, world=world) as life:
        asked = 0

        def stop_requested() -> str | None:
            nonlocal asked
            asked += life.trainer.at.step == 4  # once after the step, then in its grid
            return "preempted" if world.rank == 1 and asked >= 4 else None

        assert life.trainer.train(stop_requested) == Outcome(False, 4, "preempted", True)
        assert asked == 4, "the grid went on"


def test_a_stop_asked_of_another_rank_ends_the_grid_that_rank_0_draws(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    on_ranks(2, stop_rank_1_within_a_grid, make_config(log__grid_every_steps=4), run)
    assert not run.grid(4).exists() and run.steps_saved() == [4]


# ---------------------------------------------------------------- what it reports


def test_a_metrics_line_holds_the_public_keys_and_the_mean_of_its_window(tmp_path: Path) -> None:
    config, run, every = make_config(log__every_steps=4), make_run(tmp_path / "4"), make_run(tmp_path / "1")
    live(config, run)
    live(make_config(log__every_steps=1), every)
    first = json.loads(run.metrics.read_text().splitlines()[0])
    assert list(first) == [
        *("step", "images", "epoch", "loss", "grad_norm", "lr", "images_per_s", "gpu_memory_gib", "time")
    ]
    assert (first["step"], first["images"], first["epoch"]) == (4, 16, 1.6)
    # the same four float32 losses, summed in float32 here and in float64 there
    assert first["loss"] == pytest.approx(sum(r["loss"] for r in lines(every)[:4]) / 4, rel=1e-6)


def test_milestones_by_epoch_are_the_first_steps_past_each(tmp_path: Path) -> None:
    config = make_config(checkpoint__milestone_every_epochs=1, checkpoint__keep_last=1)
    run = make_run(tmp_path)
    live(config, run)  # 10 images, 4 a step: epochs end inside steps 3, 5 (exactly), 8
    assert run.steps_saved() == [8, 5, 3]
    assert sorted(p.name for p in run.checkpoints.glob("ema-*")) == [
        *("ema-000000003.safetensors", "ema-000000005.safetensors", "ema-000000008.safetensors")
    ]


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_run_draws_the_same_grids_wherever_it_was_stopped(tmp_path: Path, step: int) -> None:
    config = make_config(log__grid_every_steps=4)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    live(config, other, stops=[step])
    assert sorted(p.name for p in one.grids.iterdir()) == ["step-000000004.png", "step-000000008.png"]
    for step in (4, TOTAL):
        assert one.grid(step).read_bytes() == other.grid(step).read_bytes()


def test_after_a_rollback_a_grid_is_of_the_weights_that_were_kept_and_is_shown_once(tmp_path: Path) -> None:
    config, run = make_config(log__grid_every_steps=4, checkpoint__every_steps=4), make_run(tmp_path)
    for kill_at in (5, 5, None):
        with contextlib.suppress(Killed), Life(config, run) as life:
            poison(life.trainer, lambda t: t.at.step == 2 and t.at.attempt == 0)
            life.train(kill_at=kill_at)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [e.step for e in board.Images("samples")] == [4, 8]


@pytest.mark.parametrize("damage", ["torn", "of no kind", "bad chunk", "bad header"])
def test_a_damaged_picture_ends_no_life(tmp_path: Path, damage: str) -> None:
    config, run = make_config(log__grid_every_steps=2, checkpoint__every_steps=3), make_run(tmp_path)
    with pytest.raises(Killed), Life(config, run) as life:
        life.train(kill_at=5)
    good = run.grid(4).read_bytes()
    after = good[:8] + b"\0\0\0\5IHDR\0\0\0\1\0" + bytes(40)
    damaged = {"torn": good[:-20], "of no kind": b"", "bad chunk": good[:37] + b"\xff" + good[38:], "bad header": after}
    run.grid(4).write_bytes(damaged[damage])
    assert live(config, run).step == TOTAL


@pytest.mark.parametrize("save_every", [3, 4])
def test_tensorboard_shows_each_grid_once_though_a_life_died_after_it_drew_one(tmp_path: Path, save_every: int) -> None:
    config, run = make_config(log__grid_every_steps=2, checkpoint__every_steps=save_every), make_run(tmp_path)
    with pytest.raises(Killed), Life(config, run) as life:
        life.train(kill_at=5)
    assert run.grid(4).exists()
    live(config, run)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [e.step for e in board.Images("samples")] == [2, 4, 6, 8]


def test_a_batch_on_a_rank_is_its_slice_of_the_global_batch() -> None:
    batches = Batches(make_images(), seed=3, attempt=0, global_batch=6, flip=True)
    cpu = torch.device("cpu")
    for step in range(8):
        x_0, labels = batches.rows(step, 0, 6, cpu)
        parts = [batches.rows(step, first, 2, cpu) for first in (0, 2, 4)]
        assert torch.equal(torch.cat([p[0] for p in parts]), x_0)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)
