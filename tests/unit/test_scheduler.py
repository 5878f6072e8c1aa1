"""launch/scheduler.py and how launch/submit.py queues a chain. SLURM's answers are given here."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import RequestError
from ddpm.rundir import RunDir, read_events
from launch import scheduler, submit
from launch.cluster import slurm
from launch.cluster.site import Site
from tests.cli.harness import TINY

VIA = pytest.mark.parametrize("via", ["submitit", "sbatch"])


class Cluster:
    """Takes jobs, from the id 101 on; after `accepts` of them it answers `otherwise`. Remembers all commands."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.accepts = 1000
        self.otherwise: Exception = slurm.SlurmError("sbatch: error: Invalid account")

    def run(self, argv: list[str], **_: Any) -> str:
        self.commands.append(argv)
        if argv[0] == "sbatch":
            number = len(self.of("sbatch"))
            if number > self.accepts:
                raise self.otherwise
            return f"{100 + number}\n" if "--parsable" in argv else f"Submitted batch job {100 + number}\n"
        return {"sinfo": "gpu|gpu:2\n", "scontrol": "MaxArraySize = 2\n"}.get(argv[0], "")

    def of(self, command: str) -> list[list[str]]:
        return [c for c in self.commands if c[0] == command]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    c = Cluster()
    monkeypatch.setattr(slurm, "run", c.run)
    monkeypatch.setattr(slurm, "available", lambda command="sbatch": True)
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2))
    return c


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "tiny")
    for path in (run.checkpoints, run.logs, run.events):
        path.mkdir(parents=True)
    return run


def options_of(command: list[str]) -> set[str]:
    return {word for word in command if word.startswith("--") and word != "--parsable"}


@VIA
def test_everything_that_is_asked_for_is_a_flag(run: RunDir, cluster: Cluster, via: str) -> None:
    """SBATCH_* variables, which a user may have exported, go before the lines of a script, and flags before them."""
    job = scheduler.Job("train", run, Site(via=via, account="lab", time=60, sbatch={"exclusive": True, "nice": 5}))
    assert scheduler.submit(job) == ["101"]
    (command,) = cluster.of("sbatch")
    assert options_of(command) == {
        "--job-name=tiny-train", "--account=lab", "--time=60", "--nodes=1", "--ntasks-per-node=1", "--requeue",
        "--export=ALL", "--open-mode=append", "--signal=USR2@120", f"--output={run.logs}/train-%j.out", "--exclusive",
        "--nice=5",
    }  # fmt: skip


@VIA
def test_an_array_and_its_logs_are_named_by_flags_too(run: RunDir, cluster: Cluster, via: str) -> None:
    jobs = [scheduler.Job("sample", run, Site(via=via, max_parallel=8), "set", shards) for shards in ((0, 1), (2,))]
    assert [scheduler.submit(job) for job in jobs] == [["101"], ["102"]]
    array, single = map(options_of, cluster.of("sbatch"))
    assert f"--output={run.logs}/sample-%A_%a.out" in array and any(o.startswith("--array=0-1%") for o in array)
    if via == "submitit":  # which makes no array of one
        assert f"--output={run.logs}/sample-%j.out" in single and not any(o.startswith("--array") for o in single)


def test_a_successor_takes_its_environment_along_though_the_job_before_did_not(run: RunDir, cluster: Cluster) -> None:
    scheduler.submit(scheduler.Job("train", run, Site(via="sbatch", account="lab")))
    for events in run.events.iterdir():
        events.write_text(events.read_text().replace('"export": "ALL"', '"account": "lab"'))
    scheduler.submit_successor(run, "train", "101")
    assert {"--export=ALL", "--account=lab"} <= options_of(cluster.of("sbatch")[1])


# ---------------------------------------------------------------- refusals and silence

SILENCE = slurm.NoAnswer("sbatch: error: Batch job submission failed: Unable to contact slurm controller")


@VIA
def test_a_refusal_is_the_requests_fault_and_silence_is_not(run: RunDir, cluster: Cluster, via: str) -> None:
    cluster.accepts = 0
    with pytest.raises(RequestError, match="Invalid account"):
        scheduler.submit(scheduler.Job("train", run, Site(via=via)))
    cluster.otherwise = SILENCE
    with pytest.raises(slurm.NoAnswer, match="squeue --me --name tiny-train") as caught:
        scheduler.submit(scheduler.Job("train", run, Site(via=via)))
    assert caught.value.exit_code == 3 and "Unable to contact" in str(caught.value)
    assert cluster.of("scancel") == []


@VIA
def test_an_array_whose_second_part_is_refused_is_taken_back(run: RunDir, cluster: Cluster, via: str) -> None:
    cluster.accepts = 1
    with pytest.raises(RequestError):
        scheduler.submit(scheduler.Job("sample", run, Site(via=via), "set", (0, 1, 2, 3)))
    assert cluster.of("scancel") == [["scancel", "101"]]


@VIA
def test_of_an_array_whose_second_part_had_no_answer_the_first_is_known(
    run: RunDir, cluster: Cluster, via: str
) -> None:
    cluster.accepts, cluster.otherwise = 1, SILENCE
    with pytest.raises(slurm.NoAnswer):
        scheduler.submit(scheduler.Job("sample", run, Site(via=via), "set", (0, 1, 2, 3)))
    assert cluster.of("scancel") == [] and [e["job"] for e in read_events(run)] == ["101"]


def test_a_job_that_could_not_be_noted_down_is_taken_back(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_submitted", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        scheduler.submit(scheduler.Job("train", run, Site(via="sbatch")))
    assert cluster.of("scancel") == [["scancel", "101"]]


@pytest.mark.parametrize("error", [RequestError("no"), OSError("no"), ValueError("no"), slurm.SlurmError("no")])
def test_a_chain_that_fails_half_way_is_taken_back_whatever_the_reason(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(job: scheduler.Job) -> list[str]:
        if job.stage == "evaluate":
            raise error
        return ["101"]

    monkeypatch.setattr(scheduler, "submit", refuse)
    chain = [scheduler.Job("train", run, Site()), scheduler.Job("evaluate", run, Site(), "set")]
    with pytest.raises(type(error)):
        submit.queue(chain)
    assert cluster.of("scancel") == [["scancel", "101"]]


def test_a_chain_that_is_queued_stays_though_nobody_reads_of_it(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    ids, told = submit.queue([scheduler.Job("train", run, Site()), scheduler.Job("evaluate", run, Site(), "set")])
    assert len(ids) == len(told) == 2 and cluster.of("scancel") == []


def test_a_chain_in_which_slurm_falls_silent_stays(run: RunDir, cluster: Cluster) -> None:
    cluster.accepts, cluster.otherwise = 1, SILENCE
    with pytest.raises(slurm.NoAnswer, match="tiny-evaluate"):
        submit.queue([scheduler.Job("train", run, Site()), scheduler.Job("evaluate", run, Site(), "set")])
    assert cluster.of("scancel") == []


@VIA
@pytest.mark.parametrize("silent", [True, False])
def test_a_new_run_is_kept_where_its_job_may_be_in_the_queue(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, via: str, silent: bool
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ["--partition", "gpu", "--via", via, "--root", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["submit.py", str(tmp_path / "tiny.yaml"), *words])
    cluster.accepts = 0
    if silent:
        cluster.otherwise = SILENCE
    with pytest.raises(slurm.NoAnswer if silent else RequestError):
        submit.main()
    assert (tmp_path / "runs" / "tiny").exists() == silent
    if silent:  # and the same command goes on
        cluster.accepts = 9
        assert submit.main() == 0
