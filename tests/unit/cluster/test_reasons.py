"""launch/cluster/reasons.py: why a job waits, by squeue's lines (22.05, number 21 by 26.05, -o "%F %i %T %S %r")."""

import pytest

from launch.cluster import reasons, scheduler, slurm
from launch.terminal import columns

SAID = """\
17 17 PENDING N/A PartitionConfig
18 18 PENDING N/A PartitionTimeLimit
19 19 PENDING N/A PartitionNodeLimit
20 20 PENDING N/A PartitionDown
21 21 REQUEUE_HOLD N/A job requeued in held state
22 22 PENDING 2026-11-26T21:13:42 BeginTime
23 23 PENDING N/A JobHeldUser
25 25 RUNNING 2026-11-26T20:13:42 None
26 26_0 RUNNING 2026-11-26T20:13:42 None
26 26_1 PENDING N/A JobArrayTaskLimit
29 29 PENDING N/A Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions
30 30 PENDING N/A launch failed requeued held
31 31 PENDING 2026-11-27T08:00:00 Priority
32 32 PENDING N/A ReqNodeNotAvail, UnavailableNodes:n[1-3]
33 33 PENDING N/A (launch failed requeued held)
34 34 PENDING N/A QOSMaxWallDurationPerJobLimit
35 35 PENDING N/A QOSGrpGRES
36 36 PENDING N/A AssocGrpGRESMinutes
37 37 PENDING N/A QOSMaxJobsPerUserLimit
38 38 PENDING N/A SomethingNew
28 28 PENDING N/A ReqNodeNotAvail, Reserved for maintenance
39 39 SUSPENDED 2026-11-26T20:13:42 None
41 41 PENDING N/A Dependency
42 42 PENDING N/A DependencyNeverSatisfied
40 40 COMPLETING 2026-11-26T20:13:42 None
"""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> dict[str, reasons.Wait | None]:
    asked = []
    monkeypatch.setattr(slurm, "run", lambda argv, **_: asked.append(argv) or SAID)
    found = scheduler.look_up([str(job) for job in range(17, 43)])
    assert len(asked) == 1  # however many jobs there are
    return {job: reasons.explain(job, told, "END") for job, told in found.items()}


@pytest.mark.parametrize(("job", "words", "step"), [
    ("17", "the partition does not allow", "in another --partition"),
    ("18", "above what the partition allows", "shorter --time"),
    ("19", "more nodes, or fewer", "--nodes"),
    ("20", "the partition is down", "another --partition"),
    ("21", "it was put back, and is held", "scontrol release 21"),  # by --requeue=expedite, after a failure
    ("22", "not to start before its time", ""),
    ("31", "others are before it", ""),
    ("41", "waits for the job before it to end", ""),
    ("42", "will not end as it asks", "END, then submit again"),
    ("23", "its owner holds it", "scontrol release 23"),
    ("28", "down, drained or reserved: Reserved for maintenance", "sinfo -R"),
    ("29", "kept for jobs in partitions of higher priority", "another --partition"),
    ("30", "a node failed to start it", "scontrol release 30"),
    ("32", "n[1-3]", "sinfo -R"),
    ("33", "a node failed to start it", "scontrol release 33"),
    ("34", "its QOS allows one job", "--qos"),
    ("35", "the jobs under its QOS", "wait"),
    ("36", "its account", "--account"),
    ("37", "your jobs under its QOS", "another --qos"),
    ("38", "SomethingNew", "scontrol show job 38"),
])  # fmt: skip
def test_a_reason_to_wait_is_told_in_words_with_what_to_do(
    waits: dict[str, reasons.Wait | None], job: str, words: str, step: str
) -> None:
    wait = waits[job]
    assert wait is not None and words in str(wait) and step in wait.next_step
    assert "\n" not in str(wait) and "{" not in str(wait)


def test_what_can_never_start_and_what_is_held_are_told_from_what_waits(
    waits: dict[str, reasons.Wait | None],
) -> None:
    never = {job for job, wait in waits.items() if wait and wait.never}
    held = {job for job, wait in waits.items() if wait and wait.held}
    assert (never, held) == ({"17", "18", "19", "34", "42"}, {"21", "23", "30", "33"})


def test_slurms_expected_start_is_told_where_it_says(waits: dict[str, reasons.Wait | None]) -> None:
    told = waits["31"]
    assert told is not None and told.to_json()["expected_start"].startswith("2026-11-2") and "expects" in str(told)
    assert waits["18"] is not None and waits["18"].start is None


def test_what_runs_is_suspended_or_ends_waits_for_nothing(waits: dict[str, reasons.Wait | None]) -> None:
    assert [waits[job] for job in ("25", "26", "39", "40")] == [None] * 4


def test_a_reason_that_is_a_sentence_is_passed_on_whole_and_begins_in_the_table(
    waits: dict[str, reasons.Wait | None],
) -> None:
    told = waits["29"]
    assert told is not None
    sentence = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"
    assert f"({sentence})" in str(told) and told.to_json()["reason"] == sentence
    waiting = next(column for column in columns.COLUMNS if column.name == "waits for")
    assert waiting.forms[0]({"state": "queued", "waits": [told.to_json()]}) == "Nodes required for job are …"
