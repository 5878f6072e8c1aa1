"""launch/life/{gathering,supervisor}.py: which ends of a job put it back. SLURM's answers are given here."""

import contextlib
import errno
import itertools
import math
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from ddpm.run import events, paths
from ddpm.run.events import EventLog, read_events
from ddpm.run.files import stamp
from ddpm.run.paths import RunDir
from ddpm.sampling import request as requests
from launch.cluster import environment, scheduler
from launch.life import gathering, last_words, supervisor
from launch.life.life import Life
from launch.life.preemption import StopFlag
from launch.life.progress import progress
from launch.queue import nodes
from tests.saves import Unreadable

Shell = Callable[..., int]


class Cluster:
    """What SLURM says, and what it was told."""

    def __init__(self) -> None:
        self.state, self.may_requeue, self.cancels = "RUNNING", True, False
        self.preempted, self.grace_s = False, 10
        self.life: int | None = None  # which SLURM runs; None: the one that asks
        self.requeued: list[str] = []
        self.successors: list[str] = []
        self.waits: dict[str, str] = {}
        self.nodes, self.excluded = ["n1", "n2", "n3", "n4"], ""
        self.avoided: list[tuple[str, str]] = []
        self.suspended_at: str | None = None
        self.delays: list[int] = []
        self.slept: list[float] = []


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    for path in (run.checkpoints, run.logs, run.events):
        path.mkdir(parents=True)
    return run


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    c = Cluster()

    def successor(run: RunDir, stage: str, job: str, avoided: str = "") -> str:
        c.avoided.append(("successor", avoided))
        c.successors.append(job)
        new = str(100 + len(c.successors))
        EventLog(run, new, 0, "node", prefix="submit-").append("submitted", successor_of=job)
        return new

    def show(job: str) -> scheduler.Shown | None:
        life = int(os.environ["SLURM_RESTART_COUNT"]) if c.life is None else c.life
        shown = scheduler.Shown(c.state, life, c.may_requeue, "gpu", "normal", "1:00:00", None, c.preempted, c.excluded,
                                c.suspended_at)  # fmt: skip
        return shown if c.state else None

    monkeypatch.setattr(scheduler, "show", show)
    monkeypatch.setattr(
        scheduler, "mercy", lambda job, told: scheduler.Mercy(c.may_requeue and not c.cancels, c.grace_s, 5)
    )

    def spare(partition: str, excluded: str) -> tuple[int, list[str]]:
        return len(c.nodes), [node for node in c.nodes if node not in excluded.split(",")]

    monkeypatch.setattr(scheduler, "spare_nodes", spare)
    monkeypatch.setattr(scheduler, "exclude", lambda job, nodes: c.avoided.append((job, nodes)))
    monkeypatch.setattr(scheduler, "requeue", c.requeued.append)
    monkeypatch.setattr(scheduler, "delay", lambda job, seconds: c.delays.append(seconds))
    monkeypatch.setattr(scheduler, "dependents", lambda job: [w for w, other in c.waits.items() if other == job])
    monkeypatch.setattr(scheduler, "make_wait", c.waits.__setitem__)
    monkeypatch.setattr(supervisor, "submit_successor", successor)
    monkeypatch.setattr(supervisor.time, "sleep", c.slept.append)
    return c


@pytest.fixture
def shell_ends(run: RunDir, monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> Shell:
    """The end of the batch shell of one life: srun's exit code, and the marker that the job left."""
    restarts: dict[str, int] = {}
    ticks = itertools.count()
    monkeypatch.setattr(
        events, "now", lambda: f"2026-11-20T09:00:00.{next(ticks):06d}Z"
    )  # lives take longer than a millisecond

    def end(code: int, *, said: str | None = None, job: str = "17", stage: str = "train", set_name: str = "") -> int:
        restart = restarts.get(job, 0)
        restarts[job] = restart + 1
        for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(key, raising=False)
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        if said is not None:
            run.exit_marker(job, restart).write_text(said)
        return supervisor.end(run, stage, code, set_name)

    return end


def saved(run: RunDir, step: int) -> None:
    run.manifest(step).touch()


def last(run: RunDir) -> dict[str, Any]:
    return read_events(run)[-1]


def test_done_work_is_left_alone_and_its_owner_may_be_told(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for end in ("of_success", "of_hold", "of_failure"):
        monkeypatch.setattr(supervisor.ending, end, lambda *_, end=end: told.append(end))
    assert shell_ends(0) == 0 and cluster.requeued == [] and read_events(run) == []
    assert told == ["of_success"] and cluster.slept == []


def test_done_work_is_done_though_what_a_task_said_of_its_shards_cannot_be_removed(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    run.shard_marker("17").mkdir()
    assert shell_ends(0, stage="sample", set_name="fid") == 0 and read_events(run) == []


def test_a_log_on_a_full_disk_costs_no_job_its_return(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as full, contextlib.redirect_stdout(full):
        shell_ends(1)
    assert cluster.requeued == ["17"]


def test_the_shell_of_a_job_that_was_put_back_waits_for_slurm_to_end_it(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell that left first would end the job before SLURM has put it back."""
    shell_ends(1)
    assert sum(cluster.slept) == supervisor.KILLED_WITHIN_S
    ended = iter([7, 7, 7, 1, 1, 1])  # our parent: the shell, until it is killed
    monkeypatch.setattr(supervisor.os, "getppid", lambda: next(ended))
    cluster.slept.clear()
    shell_ends(75, said="75 time_limit")
    assert sum(cluster.slept) == 2


def test_a_saved_stop_and_a_crash_are_put_back(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    shell_ends(75, said="75 time_limit")
    assert last(run)["event"] == "requeued" and last(run)["reason"] == "time_limit"
    saved(run, 5)
    shell_ends(137)
    assert (last(run)["reason"], last(run)["exit_code"], last(run)["progress"]) == ("crash", 137, 5)
    assert cluster.requeued == ["17", "17"]


def test_the_jobs_own_word_goes_before_sruns_code(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    """srun may report a peer that was killed while rank 0 had finished."""
    assert shell_ends(143, said="0 crash") == 0
    assert cluster.requeued == [] and read_events(run) == [] and not list(run.logs.iterdir())
    assert shell_ends(0, said="78 crash") == 78 and last(run)["event"] == "failed"


def test_a_marker_that_a_full_disk_left_empty_is_no_word(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    shell_ends(1, said="")
    assert cluster.requeued == ["17"] and last(run)["exit_code"] == 1


def test_a_job_whose_run_was_moved_tells_nothing_to_what_lies_under_its_name(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    assert shell_ends(0, said="78 gone") == 78
    assert cluster.requeued == [] and read_events(run) == []


@pytest.mark.parametrize("said", ["75 preempted", "75 crash"])
@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", ""])
def test_a_job_that_is_not_running_is_slurms(
    run: RunDir, cluster: Cluster, shell_ends: Shell, state: str, said: str
) -> None:
    cluster.state = state
    assert shell_ends(75, said=said) == 75
    assert cluster.requeued == [] and cluster.successors == [] and read_events(run) == []


def test_a_stop_file_ends_every_requeue(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    run.stop_file.touch()
    assert shell_ends(1) == 1 and cluster.requeued == [] and "STOP" in last(run)["reason"]


def test_lives_that_advance_are_put_back_without_end(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    for step in range(1, 12):
        saved(run, step)
        shell_ends(1)
    assert len(cluster.requeued) == 11


def test_three_lives_without_a_new_step_after_one_that_made_some_are_failed(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    saved(run, 5)
    for _ in range(3):  # the one that saved step 5, and two that did not get beyond it
        shell_ends(1)
    assert len(cluster.requeued) == 3
    assert shell_ends(139) == 139
    assert len(cluster.requeued) == 3 and last(run)["event"] == "failed"
    assert "without progress beyond 5" in last(run)["reason"] and "139" in last(run)["reason"]


def test_each_retry_in_a_row_waits_longer_and_the_first_after_progress_does_not(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    for step in (0, 0, 0, 1, 1):
        if step:
            saved(run, step)
        shell_ends(1)
    assert cluster.delays == [60, 300, 60]
    assert [e.get("wait_s") for e in read_events(run)] == [None, 60, 300, None, 60]
    shell_ends(75, said="75 time_limit")
    assert len(cluster.delays) == 3


@pytest.mark.parametrize(("ago_s", "reason"), [(5, "suspended"), (3600, "crash"), (-1, "crash")])
def test_ranks_that_take_each_other_for_dead_after_a_suspension_come_back_without_a_count(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, ago_s: int, reason: str
) -> None:
    began = time.time() - 10_000 if ago_s > 0 else time.time()  # -1: in the life before
    monkeypatch.setenv("DDPM_SINCE", stamp(datetime.fromtimestamp(began, tz=timezone.utc)))
    cluster.suspended_at = stamp(datetime.fromtimestamp(time.time() - abs(ago_s), tz=timezone.utc))
    for _ in range(5):
        shell_ends(1)
    assert last(run)["reason"] == reason if reason == "suspended" else last(run)["event"] == "failed"
    assert len(cluster.requeued) == (5 if reason == "suspended" else 3)
    assert bool(cluster.delays or any(e.get("bad_node") for e in read_events(run))) is (reason == "crash")


def test_preemptions_never_count_and_never_break_the_count(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    for _ in range(10):
        shell_ends(75, said="75 preempted")
    assert len(cluster.requeued) == 10
    for _ in range(3):
        shell_ends(1)
        shell_ends(75, said="75 preempted")
    shell_ends(1)
    assert len(cluster.requeued) == 16 and last(run)["event"] == "failed"


def test_where_requeue_is_forbidden_a_successor_goes_once_and_inherits_the_count(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    cluster.may_requeue = False
    cluster.waits.update({"18": "17", "19": "18"})  # a chain: samples, then their score
    for job in ("17", "101", "102"):
        assert shell_ends(1, job=job) == 1
    assert cluster.waits == {"18": "103", "19": "18"}
    assert cluster.successors == ["17", "101", "102"] and cluster.requeued == []
    shell_ends(1, job="103")
    assert len(cluster.successors) == 3 and last(run)["event"] == "failed"


def test_where_pre_emption_means_cancelling_a_pre_empted_run_has_a_successor_and_a_crashed_one_comes_back(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    cluster.cancels = True
    shell_ends(75, said="75 preempted")
    assert (cluster.successors, cluster.requeued) == (["17"], [])
    shell_ends(1, job="18")
    shell_ends(75, said="75 preempted", job="19_3", stage="sample", set_name="fid")
    assert (cluster.successors, cluster.requeued) == (["17"], ["18", "19_3"])
    shell_ends(1, said="1 save_failed", job="20")
    assert (cluster.successors, cluster.requeued) == (["17", "20"], ["18", "19_3"])


FULL = "sbatch: error: QOSMaxSubmitJobPerUserLimit\n  error: Job violates accounting/QOS policy"


@pytest.fixture
def refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue has as many jobs of the user as it may, this one among them."""

    def refuse(*_: Any) -> str:
        raise scheduler.SchedulerError(FULL)

    cluster.cancels = True
    monkeypatch.setattr(supervisor, "submit_successor", refuse)


@pytest.mark.usefixtures("refused")
def test_a_pre_empted_job_whose_successor_is_refused_is_put_back_itself(
    cluster: Cluster, shell_ends: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell_ends(75, said="75 preempted") == 75
    assert cluster.requeued == ["17"] and "QOSMaxSubmitJobPerUserLimit; error: Job" in capsys.readouterr().out


@pytest.mark.usefixtures("refused")
def test_a_job_that_is_put_back_itself_waits_as_after_any_crash(cluster: Cluster, shell_ends: Shell) -> None:
    for _ in range(2):
        shell_ends(1, said="1 save_failed")
    assert cluster.requeued == ["17", "17"] and cluster.delays == [60]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("why", ["forbidden", "refused", "no grace", "unclear"])
def test_a_successors_refusal_is_the_end_where_the_job_cannot_be_put_back_or_may_have_one(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def forbid(job: str) -> None:
        raise scheduler.SchedulerError("scontrol: Requested operation is presently disabled")

    def unclear(*_: Any) -> str:
        raise scheduler.NoJobId(FULL)

    if why == "forbidden":
        cluster.may_requeue = False
    elif why == "refused":
        monkeypatch.setattr(scheduler, "requeue", forbid)
    elif why == "unclear":
        monkeypatch.setattr(supervisor, "submit_successor", unclear)
    else:
        cluster.state, cluster.preempted, cluster.grace_s = "COMPLETING", True, 0
    with pytest.raises(scheduler.SchedulerError, match="QOSMaxSubmitJobPerUserLimit"):
        shell_ends(75, said="75 preempted")
    assert cluster.requeued == []


@pytest.mark.parametrize("may_requeue", [True, False])
def test_a_job_that_pre_emption_ends_without_grace_has_a_successor(
    run: RunDir, cluster: Cluster, shell_ends: Shell, may_requeue: bool
) -> None:
    cluster.cancels, cluster.may_requeue = may_requeue, may_requeue
    cluster.state, cluster.preempted, cluster.grace_s = "COMPLETING", True, 0
    cluster.waits.update({"18": "17"})
    shell_ends(75, said="75 preempted")
    assert (cluster.successors, cluster.requeued, cluster.waits) == (["17"], [], {"18": "101"})


@pytest.mark.parametrize(
    ("stage", "cancels", "life", "grace_s"),
    [
        ("train", False, 0, 0),  # SLURM requeues it
        ("sample", True, 0, 0),  # the evaluation makes up for it
        ("train", True, 1, 0),  # it has done so, and this is an orphan
        ("train", True, 0, 10),  # cancelled in the second in which its grace period began
    ],
)
def test_a_job_that_pre_emption_ends_is_left_to_slurm_where_it_comes_back_or_may_have_been_cancelled(
    run: RunDir, cluster: Cluster, shell_ends: Shell, stage: str, cancels: bool, life: int, grace_s: int
) -> None:
    cluster.state, cluster.preempted, cluster.grace_s = "COMPLETING", True, grace_s
    cluster.cancels, cluster.life = cancels, life
    assert shell_ends(75, said="75 preempted", stage=stage, set_name="fid") == 75
    assert (cluster.successors, cluster.requeued, read_events(run)) == ([], [], [])


def begun_set(run: RunDir) -> paths.SampleSet:
    """Of 40 samples in 2 shards."""
    request = requests.Request(requests.CheckpointRef(5, "ab"), "ema", "ddim", 4, 0.0, None, 0, 40, 2, 2, "fp32", None)
    requests.publish_request(run.sample_set("fid"), request)
    run.sample_set("fid").part.mkdir()
    return run.sample_set("fid")


def takes_shard(run: RunDir, job: str, shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a task does first in each of its lives."""
    for name, value in (("SLURM_ARRAY_JOB_ID", ""), ("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    Life(run, StopFlag(), environment.current()).works_on([shard])


def test_a_request_that_cannot_be_read_now_is_no_lack_of_progress(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_set(run)
    takes_shard(run, "17", 1, monkeypatch)
    Unreadable(monkeypatch, {run.sample_set("fid").request: 1})
    with pytest.raises(OSError, match="Input/output error"):
        progress(run, "17", "sample", "fid")


def test_finished_batches_are_the_progress_of_a_shard_until_it_is_done(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = begun_set(run)
    takes_shard(run, "17", 1, monkeypatch)
    for i in range(6):
        (where.part / f"{20 + 2 * i:09d}-2.npz").touch()
        shell_ends(1, stage="sample", set_name="fid")
    assert len(cluster.requeued) == 6 and last(run)["progress"] == 6
    assert shell_ends(0, stage="sample", set_name="fid") == 0 and list(run.logs.iterdir()) == []


@pytest.mark.parametrize(
    ("request_is", "marker_is"), [("", "1"), ("{", "1"), (None, "1"), ("whole", "1,"), ("whole", "")]
)
def test_a_task_whose_set_or_shards_cannot_be_told_has_not_advanced(
    run: RunDir, request_is: str | None, marker_is: str
) -> None:
    where = begun_set(run)
    (where.part / "000000020-2.npz").touch()
    run.shard_marker("17").write_text(marker_is)
    if request_is is None:
        where.request.unlink()
    elif request_is != "whole":
        where.request.write_text(request_is)
    assert progress(run, "17", "sample", "fid") == 0


def test_a_task_of_several_shards_advances_with_each_of_their_batches_and_with_each_that_is_done(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, steps = begun_set(run), []

    def look() -> None:
        steps.append(progress(run, "17", "sample", "fid"))

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    Life(run, StopFlag(), environment.current()).works_on([0, 1])
    look()
    for first in range(0, 20, 2):
        (where.part / f".tmp-1-{first:09d}-2.npz").touch()
        (where.part / f"{first:09d}-2.npz").touch()
        look()
    for path in where.part.iterdir():  # shard 0 is published, and its parts go
        path.unlink()
    where.shard_manifest(0, 2).touch()
    look()
    (where.part / f"{20:09d}-2.npz").touch()
    look()
    assert steps == sorted(set(steps)) and steps[0] == 0


@pytest.mark.parametrize("said", [True, False])
def test_a_task_that_crashes_is_not_put_back_for_what_its_siblings_make(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, said: bool
) -> None:
    where = begun_set(run)
    if said:  # else it dies before it has said which shard it makes
        takes_shard(run, "17", 1, monkeypatch)
    for i in range(6):
        (where.part / f"{2 * i:09d}-2.npz").touch()
        shell_ends(1, stage="sample", set_name="fid")
    assert len(cluster.requeued) == 3 and "without progress beyond 0" in last(run)["reason"]


def test_an_evaluation_is_not_put_back_for_shards_that_others_make(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    where = begun_set(run)
    for i in range(6):
        where.shard_manifest(i, 6).touch()
        shell_ends(1, stage="evaluate", set_name="fid")
    assert len(cluster.requeued) == 3
    where.features("pixels", 0, 2).with_suffix(".json").touch()
    shell_ends(1, stage="evaluate", set_name="fid")
    assert len(cluster.requeued) == 4 and last(run)["progress"] == 1


def test_a_slurmctld_that_is_away_for_a_moment_does_not_cost_the_job_its_return(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, silences = scheduler.show, iter([True, True])

    def show(job: str) -> scheduler.Shown | None:
        if next(silences, False):
            raise scheduler.NoAnswer("scontrol: Unable to contact slurm controller")
        return answers(job)

    def requeue(job: str) -> None:
        cluster.requeued.append(job)
        assert cluster.slept[-1] == gathering.SETTLE_S, "a slurmctld that has just come back may lose a requeue"

    monkeypatch.setattr(scheduler, "show", show)
    monkeypatch.setattr(scheduler, "requeue", requeue)
    monkeypatch.setattr(time, "monotonic", lambda: sum(cluster.slept))
    shell_ends(1)
    assert cluster.requeued == ["17"]


def test_a_successor_for_which_nothing_could_be_made_to_wait_is_no_failure(
    run: RunDir,
    cluster: Cluster,
    shell_ends: Shell,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise scheduler.SchedulerError("scontrol: Access/permission denied")

    monkeypatch.setattr(scheduler, "make_wait", refuse)
    cluster.may_requeue, cluster.waits = False, {"18": "17"}
    assert shell_ends(1) == 1
    assert cluster.successors == ["17"] and "failed" not in [e["event"] for e in read_events(run)]
    assert (
        "by hand, for each job that does: scontrol update jobid=JOB dependency=afterany:101" in capsys.readouterr().out
    )


@pytest.mark.parametrize("may_requeue", [True, False])
def test_a_job_that_is_cancelled_while_slurm_does_not_answer_the_order_stays_away(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, may_requeue: bool
) -> None:
    tried: list[str] = []

    def unheard(*order: Any) -> str:
        tried.append(order[0] if len(order) == 1 else order[2])
        cluster.state = "COMPLETING"
        raise scheduler.NoAnswer("Unable to contact slurm controller")

    cluster.may_requeue = may_requeue
    monkeypatch.setattr(scheduler, "requeue", unheard)
    monkeypatch.setattr(supervisor, "submit_successor", unheard)
    shell_ends(1)
    assert tried == ["17"]


@pytest.mark.parametrize("code", [1, 75, 76])
def test_the_shell_of_an_earlier_life_leaves_a_later_one_alone(
    run: RunDir, cluster: Cluster, shell_ends: Shell, code: int
) -> None:
    """Its node was out of reach, and SLURM has put the job elsewhere under the same id."""
    cluster.life = 1
    assert shell_ends(code) == code
    assert cluster.requeued == [] and cluster.successors == [] and read_events(run) == []


@pytest.mark.parametrize("may_requeue", [True, False])
def test_a_crash_loop_ends_though_a_full_disk_takes_no_event(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, may_requeue: bool
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cluster.may_requeue = may_requeue
    monkeypatch.setattr(EventLog, "append", full)
    for _ in range(6):
        shell_ends(1)
    assert len(cluster.requeued) == (3 if may_requeue else 0) and cluster.successors == []


def test_a_requeue_that_slurm_refuses_is_told(
    run: RunDir, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(job: str) -> None:
        raise scheduler.SchedulerError("scontrol: Requested operation is presently disabled\n  try later")

    monkeypatch.setattr(scheduler, "requeue", refuse)
    monkeypatch.setattr(scheduler, "PATIENCE_S", 0)
    with pytest.raises(scheduler.SchedulerError):
        shell_ends(75, said="75 time_limit")
    monkeypatch.setattr(supervisor.sys, "argv", ["supervisor", str(run.path), "train", "75"])
    assert supervisor.main() == 75
    assert "could not be put back" in capsys.readouterr().out
    assert last(run)["event"] == "failed" and "submit the run again" in last(run)["reason"]
    assert "presently disabled; try later; submit" in last(run)["reason"]  # in one line


def break_file_system(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next `times` looks into the run directory fail."""
    left = iter(range(times))

    def broken(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is not None:
                raise OSError(errno.ESHUTDOWN, "Cannot send after transport endpoint shutdown")
            return real(*args, **kwargs)

        return look

    readers = [(owner, "read_events") for owner in (gathering, supervisor)]
    for owner, name in ((Path, "read_text"), (RunDir, "latest_step"), *readers):
        monkeypatch.setattr(owner, name, broken(getattr(owner, name)))


def test_a_file_system_that_is_away_for_a_moment_costs_the_job_nothing(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(run, 5)
    break_file_system(monkeypatch, 7)
    shell_ends(143, said="75 time_limit")
    assert cluster.requeued == ["17"]
    told = last(run)
    assert (told["event"], told["reason"], told["exit_code"], told["progress"]) == ("requeued", "time_limit", 75, 5)


@pytest.mark.parametrize("cancels", [False, True])
def test_a_file_system_that_goes_away_under_the_decision_is_waited_for_and_the_life_is_told(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, cancels: bool
) -> None:
    away = run.path.parent.with_name("away")
    append, submit = EventLog.append, supervisor.submit_successor

    def goes(*args: Any, **fields: Any) -> None:
        if not cluster.slept:
            run.path.parent.rename(away)
        append(*args, **fields)

    def comes_back(seconds: float) -> None:
        cluster.slept.append(seconds)
        if len(cluster.slept) == 3:
            away.rename(run.path.parent)

    def stale(*args: Any) -> str:
        if len(cluster.slept) == 3:
            cluster.slept.append(0)
            raise OSError(errno.ESTALE, "Stale file handle")
        return submit(*args)

    cluster.may_requeue = not cancels
    monkeypatch.setattr(EventLog, "append", goes)
    monkeypatch.setattr(supervisor, "submit_successor", stale)
    monkeypatch.setattr(supervisor.time, "sleep", comes_back)
    shell_ends(1)
    (told,) = [e for e in read_events(run) if e["event"] != "submitted"]
    assert told["event"] == "requeued" and (cluster.successors if cancels else cluster.requeued) == ["17"]


def test_what_a_life_said_as_it_left_is_waited_for_while_its_run_is_away_with_all_beside_it(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = run.path.parent.with_name("away")

    def comes_back(seconds: float) -> None:
        if away.exists():
            away.rename(run.path.parent)

    run.exit_marker("17", 0).write_text("75 time_limit")
    run.path.parent.rename(away)
    monkeypatch.setattr(supervisor.time, "sleep", comes_back)
    shell_ends(143)
    assert (last(run)["event"], last(run)["reason"]) == ("requeued", "time_limit")


def test_lives_whose_run_directory_cannot_be_read_are_put_back_as_often_as_a_crash(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    break_file_system(monkeypatch, 10**6)
    monkeypatch.setattr(scheduler, "PATIENCE_S", 0)
    codes = [shell_ends(1, said="75 time_limit") for _ in range(6)]
    assert cluster.requeued == ["17"] * 3 and codes == [1] * 6
    assert "failed: its lives cannot be counted while nothing can be read" in capfd.readouterr().out
    assert shell_ends(0) == 0 and shell_ends(78) == 78 and len(cluster.requeued) == 3


def test_a_run_that_stays_away_is_given_up_while_the_job_has_its_last_minutes(
    cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, clock = [], [0.0]
    break_file_system(monkeypatch, 10**6)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(scheduler, "requeue", lambda job: at.append(clock[0]))
    shell_ends(1)  # as where a save before the time limit failed, of whose 120 s 90 are left then
    assert len(at) == 1 and 60 <= at[0] < 85


def test_a_successor_that_an_unreadable_run_directory_prevents_is_told(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stale(*_: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    cluster.cancels = True
    monkeypatch.setattr(scheduler, "PATIENCE_S", 0)
    monkeypatch.setattr(supervisor, "submit_successor", stale)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    run.exit_marker("17", 0).write_text("75 preempted")
    monkeypatch.setattr(supervisor.sys, "argv", ["supervisor", str(run.path), "train", "75"])
    assert supervisor.main() == 75
    assert "could not be put back" in capfd.readouterr().out


def test_events_of_people_are_no_lives(run: RunDir, cluster: Cluster, shell_ends: Shell) -> None:
    log = EventLog(run, "17", 0, "login", prefix="submit-")
    for _ in range(5):
        log.append("submitted", stage="train")
        log.append("failed", reason="x")
    shell_ends(1)
    assert len(cluster.requeued) == 1


# ---------------------------------------------------------------- bad nodes


def dies_on(run: RunDir, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, node: str, code: int, log: str) -> int:
    monkeypatch.setenv("SLURMD_NODENAME", node)
    with (run.logs / "train-17.out").open("a") as f:
        f.write(log + "\n")
    return shell_ends(code)


def test_a_life_that_died_by_itself_is_put_back_elsewhere_with_what_waits_for_it(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.waits, cluster.excluded = {"18": "17", "19": "18"}, "n9"
    dies_on(run, shell_ends, monkeypatch, "n1", 127, "bash: python: command not found")
    assert cluster.requeued == ["17"] and cluster.avoided == [(job, "n9,n1") for job in ("17", "18", "19")]
    assert (last(run)["bad_node"], last(run)["error"]) == ("n1", "bash: python: command not found")


SETUP_FAILED = "/code/slurm/setup.sh: line 24: {}\nsetup failed on {} (exit code {}): {}"


@pytest.mark.parametrize(("said", "code", "blamed"), [
    ("modul: command not found", 127, []), ("module: cannot load cuda/99", 1, ["n1"]),
])  # fmt: skip
def test_a_setup_line_that_is_no_command_or_fails_on_two_nodes_is_the_profiles_fault(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch,
    said: str, code: int, blamed: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(nodes, "MENDED_AFTER_S", math.inf)  # the events here have another year's time
    line = said.partition(":")[0] + " load x"
    dies_on(run, shell_ends, monkeypatch, "n1", code, SETUP_FAILED.format(said, "n1", code, line))
    assert [out for job, out in cluster.avoided if job == "17"] == nodes.bad_nodes(run) == blamed
    assert nodes.bad_nodes(run, ["module load y"]) == []  # that line is not in the profile any more
    assert last(run)["error"] == f"{said}; setup failed on n1 (exit code {code}): {line}"
    dies_on(run, shell_ends, monkeypatch, "n2", code, SETUP_FAILED.format(said, "n2", code, line))
    assert [out for job, out in cluster.avoided if job == "17"] == blamed and nodes.bad_nodes(run, [line]) == []


@pytest.mark.parametrize(("nodes", "excluded", "avoided"), [
    (["n1"], "", False), (["n1", "n2"], "", True), (["n1", "n2"], "n2", False), (["n1", "n2", "n3", "n4"], "n2", True),
    (["n1", "n2", "n3", "n4"], "n2,n3", False),
])  # fmt: skip
def test_half_of_a_partition_and_what_a_job_needs_of_it_is_never_given_up(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch,
    nodes: list[str], excluded: str, avoided: bool,
) -> None:  # fmt: skip
    cluster.nodes, cluster.excluded = nodes, excluded
    dies_on(run, shell_ends, monkeypatch, "n1", 1, "x")
    assert cluster.requeued == ["17"] and bool(cluster.avoided) == avoided


@pytest.mark.parametrize(("code", "said"), [
    (75, "75 preempted"), (75, "75 time_limit"), (75, "75 save_failed"), (137, None)
])  # fmt: skip
def test_a_node_is_not_blamed_for_what_is_not_its_fault(
    run: RunDir, cluster: Cluster, shell_ends: Shell, code: int, said: str | None
) -> None:
    if said is None:  # memory ran out
        (run.logs / "train-17.out").write_text("slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=17.0.\n")
    shell_ends(code, said=said)
    assert cluster.requeued == ["17"] and cluster.avoided == [] and "bad_node" not in last(run)


def test_the_node_whose_rank_died_first_is_left_out_and_a_successor_leaves_it_out_too(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.may_requeue = False
    log = "srun: error: n3: task 2: Exited with exit code 1\nsrun: error: n2: tasks 0-1: Killed"
    dies_on(run, shell_ends, monkeypatch, "n2", 143, log)
    assert cluster.avoided == [("successor", "n3")] and cluster.successors == ["17"]


def test_the_node_of_a_rank_that_hangs_is_left_out_and_not_those_that_waited_for_it(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = "2026-11-26T20:01:03.000Z failed: rank 2 on n3 did not answer for 600 s"
    ends = "2026-11-26T20:01:03.100Z failed: rank 1 lost its connection to another, and ends: Connection closed by peer"
    first = "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n3: task 2: Killed"
    dies_on(run, shell_ends, monkeypatch, "n1", 137, f"{hangs}\n{first}\n{ends}")
    assert cluster.avoided == [("17", "n3")]
    assert last(run)["error"] == "rank 2 on n3 did not answer for 600 s"


@pytest.mark.parametrize("said", [
    "Z failed: ranks 2, 3 on n2, n3 did not answer for 600 s",
    "Z failed: rank 1 on n2 did not come within 600 s\nZ failed: rank 0 on n1 could not be reached by rank 1 at n1",
    "Z failed: rank 2 on an unknown node did not come within 600 s",
    "Z failed: port 24174 is another process's here: the next life takes another",
    "Z failed: rank 0 lost its connection to another, and ends: x\nZ failed: rank 1 lost its connection to another",
    "[rank1]:[E1126 ProcessGroupNCCL.cpp:629] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7",
])  # fmt: skip
def test_no_node_is_left_out_where_it_is_not_known_which_rank_is_not_heard(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    lines = [line if line.startswith("[") else f"2026-11-26T20:01:03.000{line}" for line in said.splitlines()]
    log = "\n".join([*lines, "srun: error: n2: tasks 0-1: Exited with exit code 1"])
    dies_on(run, shell_ends, monkeypatch, "n1", 137, log)
    assert cluster.requeued == ["17"] and cluster.avoided == [] and "bad_node" not in last(run)
    assert last(run)["error"] in log or "none had died" in last(run)["error"]


@pytest.mark.parametrize(("own", "first", "error"), [
    ("", "n3: task 2: Killed", "rank 2 on n3: Killed"),
    ("", "n1: task 0: Exited with exit code 1\nsrun: error: n3: task 2: Killed", "rank 2 on n3: Killed"),
    ("ValueError: of rank 2", "n3: task 2: Exited with exit code 1", "ValueError: of rank 2"),
    ("", "n3: task 2: Exited with exit code 1", "rank 2 on n3: Exited with exit code 1"),
    ("", "n3: tasks 2-3: Segmentation fault (core dumped)", "ranks 2-3 on n3: Segmentation fault (core dumped)"),
])  # fmt: skip
def test_why_a_life_of_several_ranks_ended_is_what_befell_the_first_of_them(
    tmp_path: Path, own: str, first: str, error: str
) -> None:
    lost = "2026-11-26T20:01:03.100Z failed: rank 0 lost its connection to another, and ends: Connection closed by peer"
    words = last_words.read(tmp_path / "log", ENDS.format(f"{own}\nsrun: error: {first}\n{lost}"), 3)
    assert (words.error, words.node) == (error, "n3")


def test_a_successor_does_without_the_nodes_that_its_predecessor_was_to_do_without(
    run: RunDir, cluster: Cluster, shell_ends: Shell
) -> None:
    cluster.may_requeue, cluster.excluded = False, "n1,n4"
    shell_ends(75, said="75 time_limit")
    assert cluster.avoided == [("successor", "n1,n4")]


ENDS = """\
[batch] 2026-11-26T20:00:00Z job=17 restart=0 stage=train nodes=n1 run=/runs/tiny
OldError: of another life
[batch] 2026-11-26T20:01:00Z job=17 restart=3 stage=train nodes=n4 run=/runs/tiny
2026-11-26T20:01:02.000Z step=5/100 loss=0.5
Traceback (most recent call last):
  File "x.py", line 3, in f
{}
srun: error: n4: task 0: Exited with exit code 1
"""


def test_what_has_failed_names_stage_node_log_its_last_error_and_where_it_was_tried(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in ("n1", "n2", "n3"):
        dies_on(run, shell_ends, monkeypatch, node, 1, "")
    dies_on(run, shell_ends, monkeypatch, "n4", 1, ENDS.format("RuntimeError: no \x1b[1m luck"))
    failed = last(run)
    assert failed["event"] == "failed" and failed["log_file"] == str(run.logs / "train-17.out")
    for word in ("stage train on node n4", "train-17.out", "RuntimeError: no  [1m luck", "n1, n2, n3 before"):
        assert word in failed["reason"]


@pytest.mark.parametrize(("line", "told"), [
    ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of GPU memory"),
    ("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2 GiB", "out of GPU memory"),
    ("torch.AcceleratorError: CUDA error: out of memory", "out of GPU memory"),
    ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "out of GPU memory"),
    ("srun: error: cuda-n1: task 0: Out Of Memory", "out of memory (it had asked for 4000 MB"),
    ("slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=17.0.", "out of memory (it had asked for 4000 MB"),
    ("slurmstepd-n1: error: StepId=17.0 exceeded memory limit (137895936 > 104857600), being killed",
     "out of memory (it had asked for 4000 MB"),
])  # fmt: skip
def test_out_of_memory_is_called_so_with_how_much_was_asked_for(
    run: RunDir, cluster: Cluster, shell_ends: Shell, monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4000")
    for _ in range(4):
        dies_on(run, shell_ends, monkeypatch, "n1", 137, line)
    assert told in last(run)["reason"] and "out_of_memory" in last(run)["reason"] and cluster.avoided == []


def test_what_a_life_went_on_without_is_not_why_it_ends(tmp_path: Path) -> None:
    skipped = "2026-11-26T20:01:02.500Z no grid: it does not fit beside the steps step=5 error=CUDA out of memory"
    assert last_words.read(tmp_path / "log", ENDS.format(f"{skipped}\nSegmentation fault"), 3).lacked == ""
    ended = "2026-11-26T20:01:02.500Z failed: CUDA out of memory. Tried to allocate 2 GiB"
    assert last_words.read(tmp_path / "log", ENDS.format(ended), 3).lacked == "GPU memory"


@pytest.mark.parametrize(("line", "error"), [
    ("2026-11-26T20:01:03.000Z failed: the request is gone", "the request is gone"),
    ("ValueError", "ValueError"), ("ModuleNotFoundError: No module named 'torch'", "No module named 'torch'"),
    ("setup failed on n1 (exit code 1): module load cuda/99", "module load cuda/99"),
    ("/usr/bin/python: cannot execute binary file", "cannot execute"), ("2026-11-26T20:01:03.000Z step=6 loss=0.1", ""),
    ("Segmentation fault (core dumped)", "Segmentation fault"),
    ("ValueError: ours\n[2026-11-26T20:01:04.123] error: *** STEP 17.0 ON n4 CANCELLED AT 2026-11-26T20:01:04 "
     "DUE TO TASK FAILURE ***", "ours"),  # by slurmstepd from SLURM 25.05 on
    ("[rank0] error: a word of the code's own", "[rank0] error: a word"),
    ("ValueError: ours\n[2026-11-26T20:01:04+00:00] error: Detected 1 oom_kill event in StepId=17.0.", "ours"),
])  # fmt: skip
def test_the_last_error_of_the_works_own_is_found_in_its_log(tmp_path: Path, line: str, error: str) -> None:
    words = last_words.read(tmp_path / "log", ENDS.format(line), 3)
    assert error in words.error and bool(words.error) == bool(error) and words.node == "n4"


def test_a_step_that_slurm_does_not_start_is_told_in_its_words_and_no_nodes_fault(tmp_path: Path) -> None:
    said = "srun: error: Unable to create step for job 17: Invalid generic resource (gres) specification"
    words = last_words.read(tmp_path / "log", f"[batch] now job=17 restart=3 stage=train\n{said}\n", 3)
    assert words.error == said and words.by_no_node and words.node == ""


def test_a_long_error_is_cut_between_words(tmp_path: Path) -> None:
    words = last_words.read(tmp_path / "log", ENDS.format("RuntimeError: " + "word " * 400), 3)
    assert words.error.endswith("word word …") and len(words.error) <= last_words.CHARACTERS + 2


def test_an_exception_is_told_with_its_place_in_the_code_of_the_run(tmp_path: Path) -> None:
    frames = [
        "Traceback (most recent call last):",
        '  File "/runs/.cache/code/6d2a/ddpm/training/step.py", line 200, in take',
        "    self.stat.model",
        '  File "/env/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1, in __getattr__',
        "AttributeError: no stat",
    ]

    def told(*lines: str) -> str:
        return last_words.read(tmp_path / "log", ENDS.format("\n".join(lines)), 3).error

    assert told(*frames) == "AttributeError: no stat (ddpm/training/step.py, line 200)"
    assert told(frames[0], *frames[3:]) == "AttributeError: no stat"
    failed = "the fence is another's: error"
    assert told(*frames, f"2026-11-28T12:00:00.000Z failed: {failed}") == failed
