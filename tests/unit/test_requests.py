"""launch/requests.py: which jobs count as being in the queue. SLURM's answers are given here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpm.rundir import EventLog, RunDir
from launch import requests
from launch.cluster import environment, slurm

Answers = Callable[..., list[list[str]]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def told(run: RunDir, job: str, event: str, **fields: str) -> None:
    EventLog(run, job, 0, "host").append(event, **fields)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Have squeue answer so, in turn, the last answer for ever; returns what it is asked for. Sleeping is no wait."""

    def give(*states: dict[str, str]) -> list[list[str]]:
        asked: list[list[str]] = []
        turns = itertools.chain(states, itertools.repeat(states[-1]))

        def queued(jobs: list[str]) -> dict[str, str]:
            asked.append(jobs)
            return {job: state for job, state in next(turns).items() if job in jobs}

        clock = itertools.count()
        monkeypatch.setattr(slurm, "available", lambda: True)
        monkeypatch.setattr(slurm, "queued", queued)
        patched = SimpleNamespace(sleep=lambda s: None, monotonic=lambda: float(next(clock)))
        monkeypatch.setattr(requests, "time", patched)
        return asked

    return give


def test_a_job_that_is_being_put_back_is_in_the_queue(
    run: RunDir, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch")
    answers({"17": "COMPLETING"}, {"17": "COMPLETING"}, {"17": "COMPLETING"}, {"17": "PENDING"})
    assert requests.jobs_in_queue(run, "train") == ["17"]
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("waiting for SLURM") == 1 and "17" in said.err


def test_a_job_that_has_ended_is_not_though_it_was_completing_for_a_moment(
    run: RunDir, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    told(run, "17", "submitted", stage="sample", set="fid", via="sbatch")
    answers({"17": "COMPLETING"}, {})
    assert requests.jobs_in_queue(run, "sample", "fid") == []
    assert capsys.readouterr().err == ""


def test_a_job_that_does_not_come_to_its_end_does_not_block_the_run(run: RunDir, answers: Answers) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch")
    asked = answers({"17": "COMPLETING"})
    assert requests.jobs_in_queue(run, "train") == []
    assert len(asked) > 10


def test_jobs_of_other_stages_and_sets_and_of_this_machine_are_not_asked_for(run: RunDir, answers: Answers) -> None:
    told(run, "17", "submitted", stage="train", via="sbatch", set="")
    told(run, "18", "submitted", stage="sample", via="sbatch", set="fid")
    told(run, "19", "submitted", stage="evaluate", via="sbatch", set="fid")
    told(run, "local-1", "submitted", stage="train", via="local")
    told(run, "local-1", "allocated")
    asked = answers({job: "RUNNING" for job in ("17", "18", "19", "local-1")})
    assert requests.jobs_in_queue(run, "train") == ["17"]
    assert requests.jobs_in_queue(run, "sample", "fid") == ["18"]
    assert requests.jobs_in_queue(run, "sample", "other") == []
    assert asked == [["17"], ["18"]]


def test_a_training_job_that_was_submitted_by_hand_is_known_once_it_had_its_nodes(
    run: RunDir, answers: Answers
) -> None:
    told(run, "17", "allocated")
    answers({"17": "PENDING"})
    assert requests.jobs_in_queue(run, "train") == ["17"]
    assert requests.jobs_in_queue(run, "sample", "fid") == []


def test_an_evaluation_does_not_wait_for_itself_and_lets_a_slurm_that_does_not_answer_pass(
    run: RunDir, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_JOB_ID", "19"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    told(run, "19", "submitted", stage="evaluate", via="sbatch", set="fid")
    run.run_json.write_text("{}")
    asked = answers({"19": "RUNNING"})

    def out_of_reach(job: object) -> list[str]:
        raise slurm.NoAnswer("sbatch: Socket timed out on send/recv operation")

    monkeypatch.setattr(requests.scheduler, "submit", out_of_reach)
    with pytest.raises(slurm.NoAnswer):
        requests.fill_gaps(run, "fid", [3], None, "", environment.current())
    assert asked == []
