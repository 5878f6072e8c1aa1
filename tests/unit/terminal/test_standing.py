"""launch/terminal/standing.py: in what word a run stands."""

from dataclasses import replace
from typing import Any

import pytest

from launch.cluster.scheduler import Queued
from launch.terminal.standing import Facts, line, waits, word

HELD, PRIORITY = Queued("PENDING", "JobHeldUser"), Queued("PENDING", "Priority", "2026-11-27T08:00:00.000Z")
RUNNING, SUSPENDED, ENDING = Queued("RUNNING"), Queued("SUSPENDED"), Queued("COMPLETING")
WAITS = Queued("PENDING", "Dependency")


def event(name: str, job: str = "101", **fields: Any) -> dict[str, Any]:
    return {"event": name, "job": job, "restart": 0, **fields}


CHAIN = [
    event("submitted", "101", stage="train", via="sbatch"),
    event("submitted", "102", stage="sample", via="sbatch", set="fid"),
    event("submitted", "103", stage="evaluate", via="sbatch", set="fid"),
]
BEGUN = [*CHAIN, event("allocated"), event("started")]
FAILED = event("failed", stage="train", reason="x")
FOLLOWS = {"102": WAITS, "103": WAITS}
DONE = [*BEGUN, event("finished")]


@pytest.mark.parametrize(("stands", "facts"), [
    ("prepared", Facts([], {})),
    ("queued", Facts(CHAIN, {"101": PRIORITY, **FOLLOWS})),
    ("held", Facts(CHAIN, {"101": HELD, **FOLLOWS})),
    ("running", Facts(BEGUN, {"101": RUNNING, **FOLLOWS})),
    ("suspended", Facts(BEGUN, {"101": SUSPENDED, **FOLLOWS})),
    ("failed", Facts([*BEGUN, FAILED], {})),
    ("failed", Facts([*BEGUN, FAILED], FOLLOWS)),  # though an array waits
    ("queued", Facts([*BEGUN, FAILED, event("submitted", "110", stage="train")], {"110": PRIORITY})),
    ("starting", Facts(CHAIN[:1], {}, here=True)),
    ("starting", Facts([*CHAIN[:1], event("allocated")], {}, here=True)),
    ("running", Facts(BEGUN, {}, beats=True, here=True)),
    ("running", Facts(BEGUN, {}, here=True)),  # its disk is full for a sign of life too
    ("starting", Facts([*BEGUN, event("submitted", "104", via="local")], {}, here=True)),
    ("cancelled", Facts([*BEGUN, event("cancelled", stage="train")], {})),
    ("cancelled", Facts([*BEGUN, event("cancelled", stage="train")], FOLLOWS)),
    ("cancelled", Facts(CHAIN, {})),  # while it waited
    ("queued", Facts(CHAIN, None)),  # SLURM does not answer
    ("queued", Facts([*BEGUN, event("stop_requested", reason="preempted"), event("requeued")], None)),
    ("ended", Facts(BEGUN, None)),
    ("elsewhere", Facts([event("submitted", "101", cluster="b", via="sbatch")], None, cluster="a")),
    ("complete", Facts(DONE, None, finished=True)),
    ("stopped", Facts([*BEGUN, event("stop_requested", reason="STOP")], {})),
    ("stopped", Facts(BEGUN, {}, stop_file=True)),
    ("ended", Facts([*BEGUN, event("stop_requested", reason="preempted")], {})),
    ("completing", Facts(BEGUN, {"101": ENDING})),
    ("completing", Facts(BEGUN, {"101": ENDING, **FOLLOWS})),  # pre-empted, with its followers
    ("completing", Facts(DONE, {"102": ENDING, "103": ENDING}, finished=True)),
    ("completing", Facts(DONE, {"102": ENDING, "103": WAITS}, finished=True)),  # samples, pre-empted maybe
    ("queued", Facts(DONE, {"102": ENDING, "103": PRIORITY}, finished=True)),
    ("running", Facts(BEGUN, {}, beats=True)),
    ("queued", Facts(DONE, FOLLOWS, finished=True)),
    ("sampling", Facts(DONE, {"102": RUNNING, "103": WAITS}, finished=True)),
    ("sampling", Facts(DONE, {"102": RUNNING, "103": RUNNING}, finished=True)),
    ("scoring", Facts(DONE, {"103": RUNNING}, finished=True)),
    ("suspended", Facts(DONE, {"103": SUSPENDED}, finished=True)),
    ("running", Facts(DONE, {}, finished=True, works_here=True)),
    ("scoring", Facts([*DONE, *(event("stage_began", stage=s) for s in ("sample", "evaluate"))], {}, finished=True,
                      works_here=True)),
    ("complete", Facts(DONE, {}, finished=True)),
    ("complete", Facts(DONE, {"101": ENDING}, finished=True)),
    ("failed", Facts([*DONE, event("failed", "103", stage="evaluate")], {}, finished=True)),
    ("failed", Facts([*DONE, event("failed", "102_7", stage="sample")], {}, finished=True)),
    ("complete", Facts([*DONE, event("failed", "103", stage="evaluate"), event("submitted", "104", stage="evaluate")],
                       {}, finished=True)),
    ("cancelled", Facts([*DONE, event("cancelled", "102_7", stage="sample")], {}, finished=True)),
    ("complete", Facts([*BEGUN, FAILED, event("resumed"), event("finished")], {}, finished=True)),
    ("queued", Facts([event("allocated", "9")], {"9": PRIORITY})),  # submitted by hand
    ("elsewhere", Facts([event("submitted", "101", cluster="b", via="sbatch")], {}, cluster="a")),
    ("cancelled", Facts([event("submitted", "101", cluster="a", via="sbatch")], {}, cluster="a")),
    ("failed", Facts([event("submitted", "101", cluster="b"), {**FAILED, "cluster": "b"}], {}, cluster="a")),
    ("running", Facts([event("submitted", "101", stage="sample", cluster="b"), event("submitted", "101", cluster="a")],
                      {"101": RUNNING}, cluster="a")),
])  # fmt: skip
def test_a_run_stands(stands: str, facts: Facts) -> None:
    assert word(facts) == stands


def test_a_run_here_that_was_killed_at_once_was_not_cancelled_in_a_queue() -> None:
    assert word(Facts([event("submitted", "local-1", stage="train+sample", via="local")], {})) == "ended"


def test_what_waits_is_told_with_what_to_do_for_scripts_and_for_people() -> None:
    jobs = {"101": PRIORITY, "102": HELD, "103": RUNNING, "104": WAITS}
    told = {wait["job"]: wait for wait in waits(jobs, "")}
    assert set(told) == {"101", "102", "104"}
    assert set(told["101"]) == {"job", "reason", "words", "next_step", "can_start", "held", "expected_start"}
    assert told["101"]["expected_start"] == "2026-11-27T08:00:00.000Z" and told["102"]["held"]
    assert "expects it to start at 2026-11-27T08:00Z" in line(told["101"])
    assert line(told["102"]).endswith(": scontrol release 102")


def test_nobody_is_told_to_end_the_whole_run_while_a_job_of_it_runs() -> None:
    jobs = {"101": replace(PRIORITY, reason="QOSGrpGRES")}
    assert "cancel.py RUN, then" in waits(jobs, "cancel.py RUN")[0]["next_step"]
    assert "scancel 101, then" in waits({**jobs, "103": RUNNING}, "cancel.py RUN")[0]["next_step"]


def test_what_can_never_start_is_told_so() -> None:
    jobs = {"101": replace(PRIORITY, reason="PartitionTimeLimit")}
    assert waits(jobs, "")[0]["can_start"] is False
