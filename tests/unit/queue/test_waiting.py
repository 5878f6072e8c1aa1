"""launch/queue: which jobs count as being in the queue. SLURM's answers are given here."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm.config.sample import Evaluate
from ddpm.errors import EXIT_FATAL, DoNotRetry
from ddpm.run.events import EventLog, read_events
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler, slurm, slurm_questions
from launch.cluster.job import Job
from launch.cluster.site import Site, Stage
from launch.life import training
from launch.life.decision import bad_nodes, retries_without_progress
from launch.queue import chain, submitting, waiting
from launch.queue.waiting import evaluations_in_queue, jobs_in_queue
from launch.terminal import overview

Answers = Callable[..., list[list[str]]]


def told(run: RunDir, job: str, event: str, /, **fields: object) -> None:
    EventLog(run, job, 0, "host").append(event, **fields)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Have squeue answer so, in turn, the last answer for ever; returns what it is asked for. A minute is a moment."""

    def give(*states: dict[str, str]) -> list[list[str]]:
        asked: list[list[str]] = []
        turns = itertools.chain(states, itertools.repeat(states[-1]))

        def queued(jobs: list[str]) -> dict[str, str]:
            asked.append(jobs)
            return {job: state for job, state in next(turns).items() if job in jobs}

        monkeypatch.setattr(scheduler, "available", lambda: True)
        monkeypatch.setattr(scheduler, "queued", queued)
        monkeypatch.setattr(waiting, "COMPLETING_POLL_S", 0.001)
        monkeypatch.setattr(waiting, "COMPLETING_AT_MOST_S", 0.2)
        return asked

    return give


def test_a_job_that_is_being_put_back_is_in_the_queue(
    run: RunDir, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch")
    answers({"17": "COMPLETING"}, {"17": "COMPLETING"}, {"17": "COMPLETING"}, {"17": "PENDING"})
    assert jobs_in_queue(run, "train") == ["17"]
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("waiting for SLURM") == 1 and "17" in said.err


def test_a_job_that_has_ended_is_not_though_it_was_completing_for_a_moment(
    run: RunDir, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    told(run, "17", "submitted", stage="sample", set="fid", via="sbatch")
    answers({"17": "COMPLETING"}, {})
    assert jobs_in_queue(run, "sample", "fid") == []
    assert capsys.readouterr().err == ""


def test_a_job_that_does_not_come_to_its_end_does_not_block_the_run(run: RunDir, answers: Answers) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch")
    asked = answers({"17": "COMPLETING"})
    assert jobs_in_queue(run, "train") == []
    assert len(asked) > 10


def test_a_slurm_that_does_not_answer_is_said_with_what_to_do(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(jobs: list[str]) -> dict[str, str]:
        raise scheduler.NoAnswer("squeue: no answer in 30 s")

    told(run, "17", "submitted", stage="train")
    monkeypatch.setattr(scheduler, "available", lambda: True)
    monkeypatch.setattr(scheduler, "queued", silent)
    with pytest.raises(scheduler.NoAnswer, match=r"whether job 17 is in the queue .* try again later\n  squeue"):
        jobs_in_queue(run, "train")


def test_jobs_of_other_stages_and_sets_and_of_this_machine_are_not_asked_for(run: RunDir, answers: Answers) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch", set="")
    told(run, "18", "submitted", stage="sample", via="sbatch", set="fid")
    told(run, "19", "submitted", stage="evaluate", via="sbatch", set="fid")
    told(run, "local-1", "submitted", stage="train", via="local")
    told(run, "local-1", "allocated")
    asked = answers({job: "RUNNING" for job in ("17", "18", "19", "local-1")})
    assert jobs_in_queue(run, "train") == ["17"]
    assert jobs_in_queue(run, "sample", "fid") == ["18"]
    assert jobs_in_queue(run, "sample", "other") == []
    assert asked == [["17"], ["18"]]


def test_a_training_job_that_was_submitted_by_hand_is_known_once_it_had_its_nodes(
    run: RunDir, answers: Answers
) -> None:
    told(run, "17", "allocated")
    answers({"17": "PENDING"})
    assert jobs_in_queue(run, "train") == ["17"]
    assert jobs_in_queue(run, "sample", "fid") == []


def test_evaluations_of_a_set_are_told_apart_by_what_they_compare_with(run: RunDir, answers: Answers) -> None:
    told(run, "17", "submitted", stage="evaluate", via="sbatch", set="fid", args=[])
    told(run, "18", "submitted", stage="evaluate", via="sbatch", set="fid", args=["--reference", "test"])
    again = ["--reference", "train", "--round", "1:3"]
    told(run, "19", "submitted", stage="evaluate", via="sbatch", set="fid", args=again)
    told(run, "20", "submitted", stage="evaluate", via="sbatch", set="other", args=[])
    told(run, "21", "submitted", stage="evaluate", via="sbatch", set="fid", args=["--extractor", "pixels"])
    answers({job: "PENDING" for job in ("17", "18", "19", "20", "21")})
    train, test = Evaluate(reference="train"), Evaluate(reference="test")
    assert evaluations_in_queue(run, "fid", train, default=train) == ["17", "19"]
    assert evaluations_in_queue(run, "fid", test, default=train) == ["18"]
    assert evaluations_in_queue(run, "fid", Evaluate(reference="/stats.npz"), default=train) == []
    assert evaluations_in_queue(run, "fid", Evaluate(extractor="pixels"), default=train) == ["21"]
    assert evaluations_in_queue(run, "other", test, default=test) == ["20"]


def test_an_evaluation_does_not_wait_for_itself_and_lets_a_slurm_that_does_not_answer_pass(
    run: RunDir, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_JOB_ID", "19"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    told(run, "19", "submitted", stage="evaluate", via="sbatch", set="fid")
    run.run_json.write_text("{}")
    asked = answers({"19": "RUNNING"})

    def out_of_reach(argv: list[str], **_: object) -> str:
        raise scheduler.NoAnswer("sbatch: Socket timed out on send/recv operation")

    monkeypatch.setattr(slurm, "run", out_of_reach)
    with pytest.raises(scheduler.NoAnswer):
        chain.fill_gaps(run, "fid", [3], (), "", environment.current())
    assert asked == []


def test_a_copy_of_a_run_has_none_of_the_originals_jobs_and_a_run_by_another_name_its_own(
    run: RunDir, answers: Answers
) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch", run=str(run.path))
    told(run, "17", "allocated")
    told(run, "18", "submitted", stage="train", via="sbatch")  # as it was told once
    answers({"17": "PENDING", "18": "PENDING"})
    copy, link = RunDir(run.path.with_name("copy")), RunDir(run.path.with_name("link"))
    shutil.copytree(run.path, copy.path)
    link.path.symlink_to(run.path)
    assert [jobs_in_queue(r, "train") for r in (run, link, copy)] == [["17", "18"], ["17", "18"], ["18"]]
    run.path.rename(run.path.with_name("elsewhere"))  # who knows whether that was a move
    assert jobs_in_queue(copy, "train") == ["17", "18"]


def sent_by(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is given to sbatch, whose jobs are 101 and on."""
    sent: list[list[str]] = []

    def run(argv: list[str], **_: object) -> str:
        sent.extend([argv] if argv[0] == "sbatch" else [])
        return f"{100 + len(sent)}"

    monkeypatch.setattr(slurm, "run", run)
    return sent


@pytest.mark.parametrize(("before", "missing", "next_round"), [
    ("", [3, 4], "1:2"), ("1:2", [3, 4], "2:2"), ("2:2", [3, 4], "3:2"), ("3:2", [4], "1:1"), ("3:2", [3, 4], None),
])  # fmt: skip
def test_missing_shards_are_made_until_three_rounds_have_added_none(
    run: RunDir, answers: Answers, monkeypatch: pytest.MonkeyPatch, before: str, missing: list[int],
    next_round: str | None,
) -> None:  # fmt: skip
    """STOP was there when the score was asked for: what it has made goes on too."""
    monkeypatch.setenv("SLURM_JOB_ID", "90")
    run.run_json.write_text('{"launch": {"via": "sbatch"}}')
    run.checkpoints.mkdir()
    run.stop_file.touch()
    told(run, "90", "submitted", stage="evaluate", via="sbatch", set="fid", despite=run.stop_mark())
    answers({})
    sent = sent_by(monkeypatch)
    code = chain.fill_gaps(run, "fid", missing, ("--reference", "test"), before, environment.current())
    assert (code, len(sent)) == ((0, 2) if next_round else (EXIT_FATAL, 0))
    if next_round:
        assert "--dependency=afterany:101" in sent[1]
        assert sent[1][-4:] == ["--reference", "test", "--round", next_round]
        new = [e for e in read_events(run) if e["job"] in ("101", "102")]
        assert [(e["stage"], e["despite"]) for e in new] == [(s, run.stop_mark()) for s in ("sample", "evaluate")]


def test_missing_shards_are_made_where_the_evaluation_was_sent_to_and_not_where_the_run_was(
    run: RunDir, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of somebody else's is scored under one's own account."""
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    theirs = {"launch": {"account": "theirs", "via": "sbatch"}}
    run.run_json.write_text(json.dumps(theirs))
    run.checkpoints.mkdir()
    answers({})
    sent = sent_by(monkeypatch)
    mine = Site(account="mine", via="sbatch", sample=Stage(qos="long"), setup=("module load x",))
    submitting.submit(Job("evaluate", run, mine, "fid", extra_args=("--reference", "train")))
    for job in ("101", submitting.submit_successor(run, "evaluate", "101"), "7"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        before = len(sent)
        chain.fill_gaps(run, "fid", [3], (), "", environment.current())
        account = "theirs" if job == "7" else "mine"  # of an earlier one nothing is known
        assert [f"--account={account}" in argv for argv in sent[before:]] == [True, True]
        assert ("--qos=long" in sent[before]) == (job != "7")


def test_an_answer_for_several_runs_is_too_old_after_seconds_for_a_job_that_has_ended_to_keep_another_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, said = [0.0], ["6 6 RUNNING\n", ""]
    monkeypatch.setattr(slurm, "run", lambda argv, **_: said.pop(0))
    monkeypatch.setattr(slurm_questions.time, "monotonic", lambda: clock[0])
    with scheduler.looked_up_together(["6", "7"]):
        found = [scheduler.queued(["6"]) for clock[0] in (0.0, 4.0, 10.0)]
    assert found == [{"6": "RUNNING"}] * 2 + [{}]


def test_in_a_container_without_sbatch_it_is_said_who_makes_missing_shards(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    monkeypatch.setattr(scheduler, "available", lambda: False)
    with pytest.raises(DoNotRetry, match=r"2 shards .*\(3-4\).* on a login node python launch/sample.py .*evaluate.py"):
        chain.fill_gaps(run, "fid", [3, 4], (), "", environment.current())


def test_the_overview_of_a_copy_shows_none_of_the_originals_jobs(run: RunDir) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch", run=str(run.path))
    copy = RunDir(run.path.with_name("copy"))
    shutil.copytree(run.path, copy.path)
    queued = {"17": scheduler.Queued("PENDING")}
    assert [overview.describe(r, queued)["jobs"] for r in (run, copy)] == [{"17": "PENDING"}, {}]


def test_a_run_that_two_clusters_share_asks_each_for_its_own_jobs_and_counts_their_lives_apart(
    run: RunDir, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose jobs may have the same ids, and nodes the same names."""
    for cluster, job in (("a", "17"), ("b", "17"), ("b", "18"), ("", "16")):
        EventLog(run, job, 0, "host", prefix="submit-", cluster=cluster).append(
            "submitted", stage="train", via="sbatch", run=str(run.path), options={"partition": cluster or "old"}
        )
        EventLog(run, job, 0, f"node-{cluster}", cluster=cluster).append(
            "requeued", reason="crash", progress=0, bad_node=f"node-{cluster}"
        )
    assert {p.name for p in run.events.iterdir()} >= {"17.0.jsonl", "b-17.0.jsonl", "submit-17.0.jsonl", "18.0.jsonl"}
    asked = answers(dict.fromkeys(("16", "17", "18"), "RUNNING"))
    for cluster, jobs in (("a", ["17", "16"]), ("b", ["17", "18", "16"])):
        monkeypatch.setattr(scheduler, "cluster_name", lambda here=cluster: here)
        assert sorted(jobs_in_queue(run, "train")) == sorted(jobs) and sorted(asked[-1]) == sorted(jobs)
        assert waiting.submission(run, "17")["options"] == {"partition": cluster}
        here = waiting.of_this_cluster(read_events(run))
        assert (retries_without_progress(here, "17", 0), bad_nodes(here, "17")) == (1, [f"node-{cluster}"])


def test_another_clusters_job_is_no_orphan_of_this_ones_though_it_has_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "Second")
    env = environment.current()
    holder = {"job": "17", "restart": 0, "host": "n1"}
    assert env.owner()["cluster"] == "second"
    found = [training.is_orphan({**holder, **named}, env) for named in ({}, {"cluster": "second"}, {"cluster": "a"})]
    assert found == [True, True, False]


def test_a_clusters_name_is_in_its_configuration_or_slurmctld_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(slurm, "available", lambda command="": True)
    monkeypatch.setattr(slurm, "run", lambda argv, **_: "SlurmctldPort = 1\nClusterName             = Told\n")
    for written, name in (("# x\nClusterName=Big  # ours\n", "big"), ("include other.conf\n", "told")):
        (tmp_path / name).write_text(written)
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / name))
        assert slurm_questions.cluster_name() == name
    monkeypatch.setenv("SLURM_CLUSTERS", "Other")
    assert slurm_questions.cluster_name() == "other"
