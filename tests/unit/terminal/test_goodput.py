"""Where a run's time went, from made-up lives whose answer can be counted by hand."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from launch.terminal.goodput import breakdown, seconds, share


def stamp(s: float) -> str:
    return datetime.fromtimestamp(1_000_000_000 + s, timezone.utc).isoformat(timespec="milliseconds")


NOW = seconds(stamp(10_000))


def life(restart: int, since: float, *events: tuple[float, str], **first: Any) -> list[dict[str, Any]]:
    lines = [{"event": name, "time": stamp(at), "job": "7", "restart": restart} for at, name in events]
    lines[0].update(since=stamp(since), **first)
    return lines


def beat(restart: int, at: float) -> dict[str, Any]:
    return {"job": "7", "restart": restart, "time": stamp(at)}


def kinds(**given: float) -> dict[str, float]:
    return {"kept": 0, "start_up": 0, "lost": 0, "stopping": 0, "pending": 0, **given}


def test_an_undisturbed_run_spends_start_up_and_kept_time() -> None:
    events = life(0, 0, (10, "started"), (60, "checkpoint"), (109, "checkpoint"), (110, "finished"))
    spent = breakdown(events, beat(0, 110), NOW)
    assert spent == pytest.approx(kinds(start_up=10, kept=100))
    assert share(spent) == pytest.approx(100 / 110)


def test_a_pre_empted_life_keeps_its_steps_and_waits_to_be_killed() -> None:
    events = life(0, 0, (10, "started"), (50, "stop_requested"), (52, "checkpoint"))
    events += life(1, 500, (510, "resumed"), (610, "checkpoint"), (610, "finished"), last_sign=beat(0, 60))
    assert breakdown(events, beat(1, 610), NOW) == pytest.approx(kinds(start_up=20, kept=140, stopping=10))


def test_what_a_killed_life_did_after_its_last_save_is_lost() -> None:
    events = life(0, 0, (10, "started"), (40, "checkpoint"))
    events += life(1, 200, (205, "resumed"), (255, "checkpoint"), last_sign=beat(0, 70))
    assert breakdown(events, beat(1, 255), NOW) == pytest.approx(kinds(start_up=15, kept=80, lost=30))


def test_a_life_that_only_got_its_nodes_ends_when_slurm_freed_them() -> None:
    events = life(0, 0, (2, "allocated")) + life(1, 500, (501, "allocated"))  # pre-empted while starting, then killed
    events[1]["former_life_ended"] = stamp(40)
    events += life(2, 600, (603, "allocated"), (610, "resumed"), (700, "checkpoint"), (700, "finished"))
    events[2].update(former_life_ended=stamp(530), last_sign=None)
    assert breakdown(events, beat(2, 700), NOW) == pytest.approx(kinds(start_up=40 + 30 + 10, kept=90))


def test_a_life_that_fell_silent_held_its_nodes_until_slurm_noticed() -> None:
    events = life(0, 0, (2, "allocated"), (10, "started"), (40, "checkpoint"))
    events += life(1, 200, (202, "allocated"), (205, "resumed"), (255, "checkpoint"), last_sign=beat(0, 70))
    events[3]["former_life_ended"] = stamp(130)
    assert breakdown(events, beat(1, 255), NOW) == pytest.approx(kinds(start_up=15, kept=80, lost=90))


def test_an_earlier_word_of_slurm_does_not_shorten_what_a_life_showed() -> None:
    events = life(0, 0, (10, "started"), (40, "checkpoint"))
    events += life(1, 200, (205, "resumed"), (255, "checkpoint"), last_sign=beat(0, 70))
    events[2]["former_life_ended"] = stamp(20)  # by a clock that is behind
    assert breakdown(events, beat(1, 255), NOW) == pytest.approx(kinds(start_up=15, kept=80, lost=30))


def test_what_a_living_run_did_since_its_last_save_is_neither_kept_nor_lost() -> None:
    events = life(0, 0, (10, "started"), (40, "checkpoint"))
    now = seconds(stamp(75))
    spent = breakdown(events, beat(0, 70), now)
    assert spent == pytest.approx(kinds(start_up=10, kept=30, pending=30))
    assert share(spent) == pytest.approx(0.75)
    assert share(breakdown(events[:1], beat(0, 20), now)) is None


def test_a_rollback_loses_the_time_since_the_save_it_goes_back_to() -> None:
    events = life(0, 0, (0, "started"), (40, "checkpoint"), (60, "rollback"), (100, "checkpoint"), (100, "finished"))
    assert breakdown(events, beat(0, 100), NOW) == pytest.approx(kinds(kept=80, lost=20))


def test_a_life_that_crashed_while_starting_counts_as_start_up() -> None:
    events = life(0, 0, (30, "requeued"))
    events[0]["stage"] = "train"
    assert breakdown(events, {}, NOW) == pytest.approx(kinds(start_up=30))


def test_waiting_after_a_signal_by_hand_ends_where_training_goes_on() -> None:
    events = life(
        0, 0, (0, "started"), (20, "stop_requested"), (21, "checkpoint"), (65, "resumed"), (95, "checkpoint"),
        (95, "finished"),
    )  # fmt: skip
    assert breakdown(events, beat(0, 95), NOW) == pytest.approx(kinds(kept=50, stopping=45))


def test_time_in_the_queue_and_other_stages_do_not_count() -> None:
    events = life(0, 0, (1, "submitted"))
    events += [{**e, "stage": "sample"} for e in life(1, 5, (30, "requeued"))]
    assert breakdown(events, {}, NOW) == pytest.approx(kinds())


def test_a_heartbeat_from_the_future_is_no_sign_of_life_and_costs_no_years() -> None:
    events = life(0, 0, (10, "started"), (40, "checkpoint"))
    whole = kinds(start_up=10, kept=30)
    assert breakdown(events, beat(0, 10_000 + 3e8), NOW) == pytest.approx(whole)
    events += life(1, 200, (205, "resumed"), (255, "checkpoint"), (255, "finished"), last_sign=beat(0, 3e8))
    assert breakdown(events, beat(1, 255), NOW) == pytest.approx(kinds(start_up=15, kept=80))
