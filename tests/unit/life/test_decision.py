"""launch/life/decision.py: each situation at the end of a batch shell, and what follows from it."""

from dataclasses import replace
from typing import Any

import pytest

from launch.cluster.scheduler import Mercy, Shown
from launch.life.decision import (
    MAX_RETRIES,
    Evidence,
    decide,
    mistaken_again,
    not_ours,
    retries_without_progress,
    uncounted_lives,
)

RUNNING = Shown("RUNNING", 0, True, "gpu", "normal", "1:00:00", None)
CANCELLED = replace(RUNNING, state="COMPLETING")
ENDED_BY_PRE_EMPTION = replace(CANCELLED, preempted=True)
NO_REQUEUE = replace(RUNNING, may_requeue=False)
LATER_LIFE = replace(RUNNING, restarts=1)
REQUEUES, CANCELS, CANCELS_AT_ONCE = Mercy(True, 10, 5), Mercy(False, 10, 5), Mercy(False, 0, 5)

CRASH = Evidence("train", 1, shown=RUNNING, progress=5)
PREEMPTED = replace(CRASH, code=75, reason="preempted", mercy=REQUEUES)
TIME_LIMIT = replace(CRASH, code=75, reason="time_limit")
SAVE_FAILED = replace(CRASH, reason="save_failed", mercy=REQUEUES)
SHARD = replace(CRASH, stage="sample")
LOOPING = replace(CRASH, retries=MAX_RETRIES)
FULL_DISK = replace(CRASH, can_tell=False)
UNREADABLE = replace(CRASH, can_tell=False, progress=None)
AT_ONCE = replace(PREEMPTED, shown=ENDED_BY_PRE_EMPTION, mercy=CANCELS_AT_ONCE)
EVALUATION = replace(CRASH, stage="evaluate")

ROWS: dict[str, tuple[Evidence, str, str]] = {
    # done, or for ever in vain
    "the work is done": (Evidence("train", 0), "leave", ""),
    "the work is done, and nobody asked SLURM": (Evidence("sample", 0, "crash", 3), "leave", ""),
    "another start would end the same way": (Evidence("train", 78), "fail", "exit code 78: starting again would end"),
    "another job holds the run": (replace(CRASH, code=76), "fail", "exit code 76: another job holds the run"),
    "an orphan that its heir has fenced out": (replace(CRASH, code=76, shown=LATER_LIFE), "leave", "life 1 of the job"),
    "an orphan of a job that SLURM has forgotten": (replace(CRASH, code=76, shown=None), "leave", "the job gone"),
    "an orphan of a job that pre-emption ends": (replace(AT_ONCE, code=76), "leave", "calls the job COMPLETING"),
    # whose the job is
    "cancelled after a crash": (replace(CRASH, shown=CANCELLED), "leave", "calls the job COMPLETING"),
    "cancelled in the grace period": (replace(PREEMPTED, shown=CANCELLED), "leave", "calls the job COMPLETING"),
    "cancelled at its time limit": (replace(TIME_LIMIT, shown=CANCELLED), "leave", "calls the job COMPLETING"),
    "put back by SLURM already": (replace(CRASH, shown=replace(RUNNING, state="PENDING")), "leave", "job PENDING"),
    "gone from SLURM": (replace(CRASH, shown=None), "leave", "calls the job gone"),
    "a node was out of reach, and a later life runs": (replace(CRASH, shown=LATER_LIFE), "leave", "this is 0"),
    "pre-emption ends a later life": (
        replace(AT_ONCE, shown=replace(ENDED_BY_PRE_EMPTION, restarts=1)), "leave", "calls the job COMPLETING",
    ),
    # what people ask for
    "a STOP file after a crash": (replace(CRASH, stop_file=True), "fail", "a STOP file forbids"),
    "a STOP file after a pre-emption": (replace(PREEMPTED, stop_file=True), "fail", "a STOP file forbids"),
    # the count
    "a crash": (CRASH, "requeue", "exit code 1 (crash); progress 5;"),
    "a crash, the last one that is put back": (replace(CRASH, retries=MAX_RETRIES - 1), "requeue", ""),
    "a crash too many": (LOOPING, "fail", "4 lives in a row ended (crash, exit code 1) without progress beyond 5"),
    "the same mistake of the code again": (
        replace(CRASH, retries=1, mistaken=True), "fail", "two lives in a row ended by the same mistake of the code",
    ),
    "a shard's crash too many": (replace(SHARD, retries=MAX_RETRIES), "fail", "4 lives in a row"),
    "a saved stop at the time limit": (TIME_LIMIT, "requeue", "exit code 75 (time_limit)"),
    "time limits without a new step": (
        replace(TIME_LIMIT, retries=MAX_RETRIES), "fail", "over too soon: submit again with a longer --time",
    ),
    "pre-empted after crashes without progress": (replace(PREEMPTED, retries=MAX_RETRIES), "requeue", ""),
    "a stop that could not save": (SAVE_FAILED, "requeue", "(save_failed)"),
    # where requeue is forbidden
    "a crash where requeue is forbidden": (replace(CRASH, shown=NO_REQUEUE), "succeed", "exit code 1 (crash)"),
    "a time limit where requeue is forbidden": (replace(TIME_LIMIT, shown=NO_REQUEUE), "succeed", ""),
    "pre-empted where requeue is forbidden": (
        replace(PREEMPTED, shown=NO_REQUEUE, mercy=replace(REQUEUES, requeues=False)), "succeed", "",
    ),
    "an evaluation where requeue is forbidden": (replace(EVALUATION, shown=NO_REQUEUE), "succeed", ""),
    "a shard where requeue is forbidden": (replace(SHARD, shown=NO_REQUEUE), "fail", "requeue is forbidden; the eval"),
    "a crash too many where requeue is forbidden": (replace(LOOPING, shown=NO_REQUEUE), "fail", "4 lives in a row"),
    # where pre-emption means cancelling
    "pre-empted where SLURM cancels": (replace(PREEMPTED, mercy=CANCELS), "succeed", "(preempted)"),
    "a stop that could not save where SLURM cancels": (replace(SAVE_FAILED, mercy=CANCELS), "succeed", "(save_failed)"),
    "a crash where SLURM cancels": (CRASH, "requeue", ""),
    "a shard pre-empted where SLURM cancels": (replace(SHARD, code=75, reason="preempted"), "requeue", ""),
    "pre-emption ends it at once": (AT_ONCE, "succeed", ""),
    "pre-emption ends it at once, requeue forbidden": (
        replace(AT_ONCE, shown=replace(ENDED_BY_PRE_EMPTION, may_requeue=False)), "succeed", "",
    ),
    "pre-emption ends it as it crashes": (replace(AT_ONCE, code=1, reason="crash"), "succeed", "(crash)"),
    "pre-emption ends it at once, and SLURM requeues": (replace(AT_ONCE, mercy=Mercy(True, 0, 5)), "leave", "ending"),
    "cancelled as its grace period began": (replace(AT_ONCE, mercy=CANCELS), "leave", "SLURM is ending the job"),
    "pre-emption ends a shard at once": (replace(AT_ONCE, stage="sample", mercy=None), "leave", "SLURM is ending"),
    # where lives cannot be counted
    "a crash on a full disk": (FULL_DISK, "requeue", "progress 5;"),
    "the last crash on a full disk that is put back": (replace(FULL_DISK, uncounted=MAX_RETRIES - 1), "requeue", ""),
    "a crash too many on a full disk": (replace(FULL_DISK, uncounted=MAX_RETRIES), "fail", "written to events/: make"),
    "a crash on a full disk where requeue is forbidden": (replace(FULL_DISK, shown=NO_REQUEUE), "fail", "written to"),
    "pre-empted on a full disk": (replace(PREEMPTED, can_tell=False, uncounted=9), "requeue", ""),
    "pre-empted on a full disk where SLURM cancels": (
        replace(PREEMPTED, can_tell=False, uncounted=9, mercy=CANCELS), "succeed", "",
    ),
    "a crash whose run cannot be read": (UNREADABLE, "requeue", "progress unknown;"),
    "a crash too many whose run cannot be read": (replace(UNREADABLE, uncounted=MAX_RETRIES), "fail", "can be read"),
    "an unreadable run where requeue is forbidden": (replace(UNREADABLE, shown=NO_REQUEUE), "fail", "can be read"),
}  # fmt: skip


@pytest.mark.parametrize("situation", ROWS)
def test_what_becomes_of_the_job(situation: str) -> None:
    evidence, what, why = ROWS[situation]
    decision = decide(evidence)
    assert decision.what == what and why in decision.why
    assert decision.goes_on == (what in ("requeue", "succeed")) and bool(decision.why) == (evidence.code != 0)


@pytest.mark.parametrize(
    ("shown", "or_preempted", "ours"),
    [(RUNNING, False, True), (ENDED_BY_PRE_EMPTION, False, False), (ENDED_BY_PRE_EMPTION, True, True),
     (CANCELLED, True, False), (LATER_LIFE, True, False), (None, True, False)],
)  # fmt: skip
def test_an_order_is_given_only_for_a_life_that_is_ours(shown: Shown | None, or_preempted: bool, ours: bool) -> None:
    assert (not not_ours(shown, 0, or_preempted=or_preempted)) == ours


def event(what: str, job: str, restart: int = 0, **fields: Any) -> dict[str, Any]:
    return {"event": what, "job": job, "restart": restart, **fields}


@pytest.mark.parametrize(
    ("told", "count"),
    [
        ([], 0),
        ([("crash", 5), ("time_limit", 5)], 2),
        ([("crash", 4), ("crash", 5)], 1),
        ([("crash", 5), ("crash", 4)], 0),
        ([("crash", 5), ("preempted", 5), ("crash", 5)], 2),
    ],
)
def test_retries_are_those_in_a_row_at_the_same_progress(told: list[tuple[str, int]], count: int) -> None:
    events = [event("requeued", "17", i, reason=r, progress=p) for i, (r, p) in enumerate(told)]
    assert retries_without_progress([*events, event("requeued", "18", reason="crash", progress=5)], "17", 5) == count


def test_an_event_that_is_there_twice_as_where_its_write_failed_at_the_end_is_one_retry() -> None:
    events = [event("requeued", "17", restart, reason="crash", progress=5) for restart in (0, 0, 1)]
    assert retries_without_progress(events, "17", 5) == 2


def test_a_successor_inherits_the_retries() -> None:
    events = [event("requeued", "17", reason="crash", progress=5), event("submitted", "101", successor_of="17")]
    assert retries_without_progress(events, "101", 5) == 1


@pytest.mark.parametrize(
    ("error", "job", "progress", "mistaken"),
    [
        ("NameError: name 'gama' is not defined", "17", 5, True),
        ("NameError: name 'gama' is not defined", "101", 5, True),
        ("NameError: name 'gama' is not defined", "18", 5, False),
        ("NameError: name 'gama' is not defined", "17", 6, False),
        ("NameError: name 'gamma' is not defined", "17", 5, False),
        ("RuntimeError: CUDA error", "16", 5, False),
        ("", "17", 5, False),
    ],
)
def test_a_mistake_of_the_code_is_known_by_its_return(error: str, job: str, progress: int, mistaken: bool) -> None:
    events = [
        event("requeued", "16", error="RuntimeError: CUDA error", progress=5),
        event("requeued", "17", error="NameError: name 'gama' is not defined", progress=5),
        event("submitted", "101", successor_of="17"),
    ]
    assert mistaken_again(events, job, error, progress) is mistaken


def test_lives_are_uncounted_since_the_last_that_told_of_more_than_its_beginning() -> None:
    events = [event("requeued", "17", 1), event("allocated", "17", 3), event("requeued", "18", 7)]
    assert (uncounted_lives(events, "17", 4), uncounted_lives([], "17", 2)) == (3, 2)
