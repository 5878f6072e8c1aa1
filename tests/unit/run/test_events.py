"""ddpm/run/events.py: the lives of a run in their order, whatever clocks and files say."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from ddpm.run import events
from ddpm.run.events import EventLog, in_order, read_events, read_events_and_damage
from ddpm.run.paths import RunDir


def told(job: str, restart: int, *events: tuple[str, str], follows: tuple[str, int, str] | None = None) -> Any:
    lines: list[dict[str, Any]] = [
        {"event": event, "time": f"{at}.000Z" if at else at, "job": job, "restart": restart} for event, at in events
    ]
    if follows:
        lines[0]["last_sign"] = {"job": follows[0], "restart": follows[1], "time": f"{follows[2]}.000Z"}
    return lines


def names(files: list[Any]) -> list[str]:
    return [f"{e['job']}.{e['restart']} {e['event']}" for e in in_order(files)]


def test_events_of_several_writers_are_merged_by_time() -> None:
    life = told("17", 0, ("started", "2026-11-20T09:00:00"), ("checkpoint", "2026-11-20T09:10:00"))
    sampling = told("18", 0, ("allocated", "2026-11-20T09:05:00"), follows=("17", 0, "2026-11-20T09:04:00"))
    assert names([life, sampling]) == ["17.0 started", "18.0 allocated", "17.0 checkpoint"]


def test_a_node_whose_clock_is_behind_does_not_put_a_life_before_the_one_it_follows() -> None:
    submitted = told("17", 0, ("submitted", "2026-11-20T08:00:00"))
    first = told("17", 0, ("started", "2026-11-20T07:30:00"), ("requeued", "2026-11-20T09:10:00"))
    second = told("17", 1, ("resumed", "2026-11-20T08:40:00"), ("checkpoint", "2026-11-20T08:50:00"))
    other = told(
        "3", 0, ("resumed", "2026-11-20T08:10:00"), ("finished", "2026-11-20T08:20:00"),
        follows=("17", 1, "2026-11-20T08:55:00"),
    )  # fmt: skip
    expected = ["17.0 submitted", "17.0 started", "17.0 requeued", "17.1 resumed", "17.1 checkpoint",
                "3.0 resumed", "3.0 finished"]  # fmt: skip
    files = [submitted, first, second, other]
    for _ in range(5):
        random.shuffle(files)
        assert names(files) == expected


def test_a_clock_that_is_set_back_within_a_life_changes_nothing_of_its_order() -> None:
    life = told("17", 0, ("started", "2030-01-01T00:00:00"), ("checkpoint", "2026-11-20T09:00:00"))
    heir = told("17", 1, ("resumed", "2026-11-20T09:10:00"))
    assert names([heir, life]) == ["17.0 started", "17.0 checkpoint", "17.1 resumed"]


def test_bad_times_and_lives_that_follow_each_other_end_nothing(run: RunDir) -> None:
    at = "2026-11-20T09:00:00"
    one = told("17", 0, ("started", at), ("checkpoint", at), follows=("18", 0, at))
    other = told("18", 0, ("started", at), follows=("17", 0, at))
    assert sorted(names([one, other])) == ["17.0 checkpoint", "17.0 started", "18.0 started"]
    run.events.mkdir()
    lines = [{**one[0], "time": bad} for bad in ({}, 7, "", "2026", "9999999-01-01T00:00:00Z")] + [{}, one[1]]
    (run.events / "17.0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [e["event"] for e in read_events(run)] == ["checkpoint"]


def test_a_copy_beside_a_file_of_events_tells_nothing_twice_and_litter_nothing(run: RunDir) -> None:
    log = EventLog(run, "17", 0, "n1")
    for step in (1, 2, 3):
        log.append("checkpoint", step=step)
    whole = log.path.read_text()
    (run.events / "17.0 (copy).jsonl").write_text(whole)
    (run.events / "17.0.old.jsonl").write_text("".join(whole.splitlines(keepends=True)[:2]))
    (run.events / "._17.0.jsonl").write_bytes(b"\0\5\26\7 Mac OS X")
    events, damage = read_events_and_damage(run)
    assert [e["step"] for e in events] == [1, 2, 3] and damage == []
    (run.events / "17.0.theirs.jsonl").write_text(whole.replace('"step": 3', '"step": 4'))  # which tells more
    assert len(read_events(run)) == 6


def test_a_run_that_is_gone_is_not_made_anew_by_an_event(run: RunDir) -> None:
    log = EventLog(run, "17", 0, "n1")
    run.path.rename(run.path.with_name("moved"))
    try:
        log.append("checkpoint", step=3)
    except FileNotFoundError:
        pass
    assert not run.path.exists()


def test_thousands_of_lives_are_put_in_order_without_comparing_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    num, settled = 3000, []
    really = events._File.settle
    monkeypatch.setattr(events._File, "settle", lambda self, of: (settled.append(1), really(self, of)))
    years = [1970 if k == num - 1 else 2026 for k in range(num)]  # the last node has not heard the time yet
    lives = [told("17", k, ("resumed", f"{years[k]}-11-20T{k // 3600:02}:{k // 60 % 60:02}:{k % 60:02}"))
             for k in range(num)]  # fmt: skip
    random.shuffle(lives)
    assert names(lives) == [f"17.{k} resumed" for k in range(num)]
    assert len(settled) < 3 * num


def test_an_event_that_a_full_disk_refuses_leaves_no_file_that_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fsync = RunDir(tmp_path), os.fsync
    log = EventLog(run, "17", 0, "n1")

    def full(fd: int) -> None:
        os.ftruncate(fd, before)
        raise OSError(errno.ENOSPC, "No space left on device")

    before = 0
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        log.append("started")
    assert not list(run.events.iterdir())
    monkeypatch.setattr(os, "fsync", fsync)
    log.append("started")
    monkeypatch.setattr(os, "fsync", full)
    before = log.path.stat().st_size
    with pytest.raises(OSError, match="No space"):
        log.append("checkpoint")
    assert [e["event"] for e in read_events(run)] == ["started"]
