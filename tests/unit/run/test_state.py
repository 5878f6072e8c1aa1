"""ddpm/run/state.py, ddpm/training/state.py: when training is finished, and who is told."""

from pathlib import Path
from typing import Any

import pytest

from ddpm.run import generations
from ddpm.run.paths import RunDir
from ddpm.run.state import finished_step, settled
from tests.saves import Unreadable
from tests.training import Life, events, lines, live, make_config, make_run

TOTAL = 8
EARLY: dict[str, Any] = {"train__early_stop_window": 3, "log__every_steps": 2}


def stopped_at(run: RunDir, step: int, **options: Any) -> None:
    with Life(make_config(**options), run) as life:
        life.train(stop_at=[step])


# ---------------------------------------------------------------- a bound that comes later


def test_a_finished_run_whose_losses_meet_a_bound_that_came_later_is_finished_where_it_is(run: RunDir) -> None:
    """Submitted again with more steps and a bound: nothing is left to do, and the manifest says so."""
    live(make_config(**EARLY), run)
    bounded = make_config(**EARLY, train__early_stop_below=100.0, train__total_steps=16)
    told, weights = lines(run), run.checkpoint(TOTAL).read_bytes()
    assert finished_step(run, bounded) is None
    live(bounded, run)
    assert finished_step(run, bounded) == TOTAL
    assert (lines(run), run.checkpoint(TOTAL).read_bytes()) == (told, weights)
    assert generations.verify(run, TOTAL).manifest["early_stopped"] > 0
    assert finished_step(run, make_config(**EARLY)) == TOTAL


def test_a_run_saved_at_a_log_line_ends_there_by_a_bound_that_came_later(run: RunDir) -> None:
    stopped_at(run, 6, **EARLY)
    bounded = make_config(**EARLY, train__early_stop_below=100.0)
    assert live(bounded, run).step == 6
    assert finished_step(run, bounded) == 6 and events(run)[-1] == "finished"
    assert run.ema_weights(6).exists() and generations.verify(run, 6).step == 6


def test_a_run_saved_between_two_log_lines_ends_at_the_next_by_a_bound_that_came_later(run: RunDir) -> None:
    stopped_at(run, 5, **{**EARLY, "train__early_stop_window": 2})
    bounded = make_config(log__every_steps=2, train__early_stop_window=2, train__early_stop_below=100.0)
    assert live(bounded, run).step == 6
    assert finished_step(run, bounded) == 6
    assert [r["step"] for r in lines(run)] == [2, 4, 6]


def test_a_shorter_window_counts_at_once_and_not_from_the_next_log_line(run: RunDir) -> None:
    stopped_at(run, 6, **EARLY)
    one, two, three = (r["loss"] for r in lines(run))
    long, short = (abs(two - one) + abs(three - two)) / 2, abs(three - two)
    between = make_config(log__every_steps=2, train__early_stop_window=2, train__early_stop_below=(long + short) / 2)
    assert long != short
    assert (live(between, run).step == 6) == (short < long)


@pytest.mark.parametrize(
    ("losses", "window", "change"),
    [
        ([1.0, 1.0], 3, None),
        ([1.0, 1.0, 1.5], 3, 0.25),
        ([9.0, 1.0, 1.0, 1.5], 3, 0.25),
        ([9.0, 1.0, 1.0], 2, 0.0),
        ([1.0, 1.0, 9.0], 2, None),
        ([1.0, 2.0, 3.0], 3, None),
    ],
)
def test_training_settles_by_the_last_logged_losses_alone(losses: list[float], window: int, change: Any) -> None:
    config = make_config(train__early_stop_window=window, train__early_stop_below=0.5)
    assert settled(losses, config) == change
    assert settled(losses, make_config(train__early_stop_window=window)) is None


# ---------------------------------------------------------------- ending early


def test_training_ends_early_where_the_logged_losses_have_settled(tmp_path: Path) -> None:
    options = {"train__early_stop_below": 100.0, "train__early_stop_window": 3, "log__every_steps": 2}
    config, run = make_config(**options), make_run(tmp_path / "settled")
    live(config, run, stops=[3])  # lines at 2, 4, 6: the window survives the stop
    assert [r["step"] for r in lines(run)] == [2, 4, 6]
    assert events(run)[-1] == "finished" and generations.verify(run, 6).manifest["early_stopped"]
    assert run.ema_weights(6).exists() and run.grid(6).exists()
    assert finished_step(run, config) is not None
    unbounded = make_config(**{**options, "train__early_stop_below": None})
    assert finished_step(run, unbounded) is None  # who wants more has it
    unsettled = make_run(tmp_path / "unsettled")
    assert live(make_config(**{**options, "train__early_stop_below": 1e-9}), unsettled).step == TOTAL
    assert "early_stopped" not in generations.verify(unsettled, TOTAL).manifest
    assert generations.load(unsettled, TOTAL)["extra"]["early_stopped"] is None


def test_a_run_that_ended_early_keeps_by_how_much_its_losses_changed_and_goes_on_under_a_tighter_bound(
    tmp_path: Path,
) -> None:
    options = {"train__early_stop_window": 3, "log__every_steps": 2}
    run = make_run(tmp_path / "run")
    live(make_config(**options, train__early_stop_below=100.0), run)
    losses = [r["loss"] for r in lines(run)]
    change = generations.load(run, 6)["extra"]["early_stopped"]
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


def test_a_file_system_that_fails_for_a_moment_gives_no_answer_by_which_jobs_would_end(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    live(config, run)
    with monkeypatch.context() as m:
        Unreadable(m, {run.manifest(TOTAL): 1})
        with pytest.raises(OSError, match="Input/output error"):
            finished_step(run, config)
        assert finished_step(run, config) == TOTAL
