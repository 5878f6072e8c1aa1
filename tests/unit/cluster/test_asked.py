"""launch/cluster/asked.py: which of a site's clusters is asked, and where jobs go. SLURM's commands are played here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.errors import RequestError
from launch.cluster import asked, environment, inquiry, slurm, slurm_questions
from launch.cluster.answers import Queued
from launch.cluster.reasons import explain
from tests.unit.cluster.test_site import options, resolved

SQUEUE = """\
CLUSTER: bravo
6 6 PENDING N/A None|1004|wrap
"""


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of a login that names no cluster."""
    for name in (*asked.VARIABLES, "SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    with asked.asking(""):
        yield


def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """A command that says which clusters its environment names."""
    (tmp_path / name).write_text("#!/bin/sh\necho ${SLURM_CLUSTERS-none} ${SBATCH_CLUSTERS-none}\n")
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(("exported", "told"), [("Bravo", "bravo"), ("all", "none"), ("alpha,bravo", "none")])
def test_a_command_asks_the_cluster_that_the_shell_names_if_that_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exported: str, told: str
) -> None:
    played(monkeypatch, tmp_path, "squeue")
    monkeypatch.setenv("SLURM_CLUSTERS", exported)
    assert slurm.run(["squeue"]) == f"{told} none\n"
    with asked.asking("charlie"):
        assert slurm.run(["squeue"]) == "charlie none\n" and environment.cluster() == "charlie"


def test_a_job_inherits_no_cluster_from_the_sbatch_that_queues_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    played(monkeypatch, tmp_path, "sbatch")
    for name in asked.VARIABLES:
        monkeypatch.setenv(name, "bravo")
    with asked.submitting(["sbatch", "--clusters=bravo"]):
        assert slurm.run(["sbatch"]) == "none none\n"


@pytest.mark.parametrize("words", [["--sbatch", "clusters=bravo"], ["--sbatch", "cluster=Bravo"], []])
def test_a_named_cluster_is_asked_from_then_on_and_is_where_every_stage_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    if not words:
        monkeypatch.setenv("SBATCH_CLUSTERS", "bravo")
    site = resolved(tmp_path, *words)
    assert asked.cluster() == environment.cluster() == "bravo"
    assert {options(site, stage)["clusters"] for stage in ("train", "sample", "evaluate")} == {"bravo"}
    assert asked.typed("scancel") == "scancel -M bravo"
    wait = explain("17", Queued("PENDING", "JobHeldUser"))
    assert wait is not None and wait.next_step == "scontrol -M bravo release 17"


def test_sbatch_of_a_job_names_no_cluster_since_its_own_needs_no_accounting(tmp_path: Path) -> None:
    site = resolved(tmp_path, "--sbatch", "clusters=bravo")
    with asked.asking(""):  # as in a job, whose batch shell has taken the user's away
        assert "clusters" not in options(site, "train")


@pytest.mark.parametrize(("node", "named"), [("n1", ""), ("", "bravo")], ids=["a job", "salloc on the login node"])
def test_what_a_job_queues_asks_its_own_cluster_without_naming_it_as_the_milestones_of_its_training_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, node: str, named: str
) -> None:
    for name, value in {"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "bravo", "SLURMD_NODENAME": node}.items():
        if value:
            monkeypatch.setenv(name, value)
    site = resolved(tmp_path, stage="evaluate", sbatch={"clusters": "Bravo"})
    assert (asked.cluster(), options(site, "evaluate").get("clusters", "")) == (named, named)
    assert environment.cluster() == "bravo" and site.sbatch["clusters"] == "Bravo"


@pytest.mark.parametrize(("words", "exported", "told"), [
    (["--sbatch", "clusters=alpha,bravo"], "", "--sbatch clusters=alpha,bravo: .* name one"),
    (["--sbatch", "clusters="], "bravo", "--sbatch clusters=: .* name one"),
    ([], "all", "SLURM_CLUSTERS=all: .* name one"),
])  # fmt: skip
def test_several_clusters_or_none_are_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], exported: str, told: str
) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", exported)
    with pytest.raises(RequestError, match=told):
        resolved(tmp_path, *words)
    if not words:  # which a queue alone heeds
        assert resolved(tmp_path, "--cluster", "local").is_local


def test_a_stage_on_another_cluster_than_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"evaluate.sbatch: clusters = bravo: .* on one cluster"):
        resolved(tmp_path, profile="evaluate: {sbatch: {clusters: bravo}}")


def test_what_accounting_says_of_the_user_is_of_the_cluster_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slurmdbd knows the user on several."""
    rows = {"alpha": "|lab|alpha\n", "bravo": "|gpulab|bravo\n"}

    def run(argv: list[str], **_: object) -> str:
        named = next((word.partition("=")[2] for word in argv if word.startswith("cluster=")), None)
        return "".join(line.split("|")[1] + "\n" for name, line in rows.items() if named in (None, name))

    monkeypatch.setattr(slurm, "run", run)
    with asked.asking("bravo"):
        assert inquiry.accounts() == ["gpulab"]


def test_the_line_that_names_the_cluster_is_none_of_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = SQUEUE.replace("1004", str(os.geteuid()))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat <<E\n{said}E\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = slurm_questions.look_up(["6", "CLUSTER:"])
    assert {job: told.state for job, told in found.items()} == {"6": "PENDING"}


def test_what_was_asked_once_of_one_cluster_answers_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asks: list[str] = []

    def run(argv: list[str], **_: object) -> str:
        asks.append(f"{argv[0]} of {asked.cluster() or 'alpha'}")
        return f"6 6 {'RUNNING' if asked.cluster() else 'PENDING'} N/A None|{os.geteuid()}|wrap\n"

    monkeypatch.setattr(slurm, "run", run)
    with slurm.asked_once(), slurm_questions.looked_up_together(["6"]):
        assert slurm_questions.look_up(["6"])["6"].state == "PENDING" and "PENDING" in slurm.ask(["sinfo"])
        with asked.asking("bravo"):
            assert slurm_questions.look_up(["6"])["6"].state == "RUNNING" and "RUNNING" in slurm.ask(["sinfo"])
        assert slurm_questions.look_up(["6"])["6"].state == "PENDING" and "PENDING" in slurm.ask(["sinfo"])
    assert asks == ["squeue of alpha", "sinfo of alpha", "squeue of bravo", "sinfo of bravo"]
