"""ddpm/training: a loss or gradient that is not finite reaches no weight and no save, and is not drawn again."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.errors import DoNotRetry
from ddpm.run import generations
from ddpm.run.events import EventLog, read_events
from ddpm.training import step as training_step
from ddpm.training.trainer import Outcome
from tests.saves import flip_bit
from tests.training import (
    Killed,
    Life,
    assert_same_end,
    differences,
    events,
    lines,
    live,
    make_config,
    make_run,
    poison,
)

TOTAL = 8


@pytest.mark.parametrize("how", ["gradient", "loss"])
@pytest.mark.parametrize("step", [0, 4, TOTAL - 1])
def test_a_non_finite_step_never_reaches_the_weights_and_is_rolled_back(tmp_path: Path, how: str, step: int) -> None:
    config, run = make_config(checkpoint__every_steps=3), make_run(tmp_path)
    with Life(config, run) as life:
        before: dict[int, Any] = {}
        after = poison(life.trainer, lambda t: t.at.step == step and t.at.attempt == 0, how=how)

        def note_weights() -> None:
            before.setdefault(
                life.trainer.at.step, {k: v.clone() for k, v in life.trainer.state.model.state_dict().items()}
            )

        outcome = life.trainer.train(note_weights)
        assert outcome.finished and life.trainer.at.attempt == 1 and life.trainer.at.rollbacks == 1
    assert len(after) == 1 and differences(after[0], before[step]) == [], "the masked update changed the weights"
    rollbacks = [e for e in read_events(run) if e["event"] == "rollback"]
    assert [e["attempt"] for e in rollbacks] == [1]
    assert [r["step"] for r in lines(run)] == [3, 6, 8]
    assert all(math.isfinite(r["loss"]) for r in lines(run))
    assert all(torch.isfinite(v).all() for v in generations.load(run, TOTAL)["model"].values())


def test_after_a_rollback_other_samples_are_drawn_and_a_restart_keeps_to_them(tmp_path: Path) -> None:
    config = make_config(checkpoint__every_steps=2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    for run, stops in ((one, []), (other, [5, 7])):
        for stop in [*stops, None]:
            with Life(config, run) as life:
                poison(life.trainer, lambda t: t.at.step == 3 and t.at.attempt == 0)
                life.train(stop_at=[stop] if stop else [])
    assert_same_end(one, other, TOTAL)
    assert generations.load(other, TOTAL)["extra"]["attempt"] == 1
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
        begin = life.trainer.chronicle.begin

        def spy(step: int, logged_step: int) -> None:
            gone_back_to.append(step)
            begin(step, logged_step)

        life.trainer.chronicle.begin = spy  # type: ignore[method-assign]
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
    assert generations.load(run, 4)["extra"]["attempt"] == 1


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
        with pytest.raises(DoNotRetry, match=r"3 times .*train\.max_rollbacks = 2; the checkpoint of step 3 is good"):
            life.train()
    assert events(run).count("rollback") == 2
    good = generations.newest_good(run, print)
    assert good is not None and good.step == 3
    assert all(torch.isfinite(v).all() for v in generations.load(run, 3)["model"].values())


def test_rollbacks_used_up_before_any_save_say_that_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    with Life(make_config(train__max_rollbacks=0), make_run(tmp_path)) as life:
        poison(life.trainer, lambda t: t.at.step == 1)
        with pytest.raises(DoNotRetry, match=r"max_rollbacks = 0; nothing was ever saved\. Lower train\.lr"):
            life.train()


def test_rollbacks_used_up_say_that_what_was_saved_is_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(checkpoint__every_steps=3, train__max_rollbacks=0), run) as life:
        poison(life.trainer, lambda t: t.at.step == 4)
        life.train(stop_at=[3])
        flip_bit(run.checkpoint(3), 5000)
        with pytest.raises(DoNotRetry, match=r"max_rollbacks = 0; every checkpoint in .* is damaged"):
            life.train()


def test_an_fp16_run_whose_every_step_is_skipped_says_so_and_ends_in_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients overflow from step 3 on, by a loss that is finite."""
    monkeypatch.setattr(training_step, "MOST_SKIPPED", 4)
    run = make_run(tmp_path)
    config = make_config(train__amp="bf16", checkpoint__every_steps=2, train__total_steps=30, train__max_rollbacks=1)
    with Life(config, run) as life:
        trainer = life.trainer
        trainer.step.resolved = replace(trainer.resolved, amp="fp16")  # else it needs a GPU
        trainer.state.amp, trainer.state.scaler = "fp16", torch.amp.GradScaler("cpu")
        overflows = [0, 2, 3, 4, 5, 6, 7]  # one alone is nothing
        trainer.state.model.conv_out.weight.register_hook(lambda g: g * math.inf if trainer.at.step in overflows else g)
        with pytest.raises(DoNotRetry, match=r"train\.amp=off in a new run"):
            life.train()
    told = [e for e in read_events(run) if e["event"] == "rollback"]
    assert len(told) == 1 and told[0]["step"] < 10
    assert max(r["skipped_steps"] for r in lines(run)) >= 2 and all(math.isfinite(r["loss"]) for r in lines(run))


def test_a_rollback_before_any_save_forgets_skipped_steps_and_the_scale_of_losses(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(train__amp="bf16"), run) as life:
        trainer = life.trainer
        trainer.step.resolved = replace(trainer.resolved, amp="fp16")  # else it needs a GPU
        trainer.state.amp, trainer.state.scaler = "fp16", torch.amp.GradScaler("cpu")
        fresh = trainer.state.scaler.state_dict()
        poison(trainer, lambda t: t.at.step == 2 and t.at.attempt == 0, how="gradient")
        assert life.train().finished and trainer.at.rollbacks == 1
    end = generations.load(run, TOTAL)
    assert end["extra"]["skipped_steps"] == 0
    assert end["scaler"]["scale"] == fresh["scale"] and end["scaler"]["_growth_tracker"] == TOTAL
