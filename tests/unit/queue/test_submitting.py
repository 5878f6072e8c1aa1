"""launch/queue: how a job, and a chain of them, is submitted. SLURM's answers are given here."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.events import EventLog, read_events
from ddpm.run.files import now
from ddpm.run.paths import RunDir
from launch import jobs, submit
from launch.cluster import code, scheduler, slurm
from launch.cluster.environment import PROJECT
from launch.cluster.job import Job, numbers, share
from launch.cluster.site import Site, Stage
from launch.queue import chain, submitting, waiting
from launch.queue.nodes import bad_nodes
from tests.cli.harness import TINY

INVALID = scheduler.SchedulerError("sbatch: error: Invalid account")
VIA = pytest.mark.parametrize("via", ["submitit", "sbatch"])


class Cluster:
    """Takes jobs, from the id 101 on; after `accepts` of them it answers `otherwise`. Remembers all commands."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.accepts = 1000
        self.otherwise: Exception = INVALID
        self.array_size = 1001
        self.room = 10_000  # for jobs, of which each task of an array is one
        self.queue: list[str] = []
        self.nodes: list[str] | None = ["n1"]
        self._took: dict[str, int] = {}

    def run(self, argv: list[str], env: dict[str, str] | None = None, **_: Any) -> str:
        self.commands.append(argv)
        self.environments.append(dict(os.environ if env is None else env))
        if argv[0] == "sbatch":
            number = len(self.of("sbatch"))
            tasks = next((int(word.split("-")[3].split("%")[0]) + 1 for word in argv if word.startswith("--array=")), 1)
            if number > self.accepts or tasks > self.room:
                raise self.otherwise
            self.room -= tasks
            self._took[str(100 + number)] = tasks
            return f"{100 + number}\n" if "--parsable" in argv else f"Submitted batch job {100 + number}\n"
        if argv[0] == "scancel":
            self.room += sum(self._took.pop(job) for job in argv[1:])
        if argv[:2] == ["sinfo", "-h"]:
            if self.nodes is None:
                raise slurm.NoAnswer("sinfo: no answer")
            return "\n".join(self.nodes if "gpu" in argv else ["n9"])
        if "hostnames" in argv:
            return "\n".join(argv[-1].split(","))
        there = {"sinfo": "cpu|(null)\ngpu*|gpu:2\n", "scontrol": f"MaxArraySize = {self.array_size}\n"}
        return {**there, "squeue": "\n".join(self.queue)}.get(argv[0], "")

    def of(self, command: str) -> list[list[str]]:
        return [c for c in self.commands if c[0] == command]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    c = Cluster()
    monkeypatch.setattr(slurm, "run", c.run)
    for asked in (slurm, scheduler):
        monkeypatch.setattr(asked, "available", lambda command="sbatch": True)
    return c


@pytest.fixture(autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What jobs run is laid out in one place for all runs here."""
    there = tmp_path_factory.getbasetemp() / "code"
    monkeypatch.setattr(code, "_place", lambda run, packed: there / code.digest(packed))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "tiny")
    for path in (run.checkpoints, run.logs, run.events):
        path.mkdir(parents=True)
    return run


def slurm_shows(*, may_requeue: bool, time_limit: str) -> scheduler.Shown:
    return scheduler.Shown("RUNNING", 0, may_requeue, "gpu", "normal", time_limit, None)


def options_of(command: list[str]) -> set[str]:
    return {word for word in command if word.startswith("--") and word != "--parsable"}


@VIA
@pytest.mark.parametrize("request_by", ["gpus-per-node", "gres", "none"])
def test_only_what_is_asked_for_says_which_gpus_a_job_gets(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, via: str, request_by: Any
) -> None:
    """Not the allocation around; nor what is exported for sbatch, which from SLURM 26.05 on refuses both. Nor does that
    make several jobs of it, or have sbatch wait for its end."""
    given = {"SLURM_JOB_ID": "5", "SLURM_GPUS_PER_NODE": "4", "SBATCH_WAIT": "1", "SBATCH_ARRAY_INX": "0-1"}
    exported = {"SBATCH_GRES": "gpu:2", "SBATCH_GPUS": "8", "SBATCH_GPUS_PER_NODE": "8", "SBATCH_QOS": "low"}
    for name, value in {**given, **exported}.items():
        monkeypatch.setenv(name, value)
    submitting.submit(Job("train", run, Site(via=via, gpus_per_node=1, gpu_request=request_by)))
    told = next(e for c, e in zip(cluster.commands, cluster.environments, strict=True) if c[0] == "sbatch")
    stay = exported if request_by == "none" else {"SBATCH_QOS": "low"}
    assert {k: v for k, v in told.items() if k in {**given, **exported}} == stay
    assert exported.items() <= os.environ.items()


@VIA
def test_a_job_is_told_of_which_run_it_is(run: RunDir, cluster: Cluster, via: str) -> None:
    run.run_json.write_text('{"schema": 1, "name": "tiny", "run_id": "0f1e2d"}')
    submitting.submit(Job("train", run, Site(via=via)))
    told = next(e for c, e in zip(cluster.commands, cluster.environments, strict=True) if c[0] == "sbatch")
    scripts = [path.read_text() for path in (run.logs / "submitit").glob("*_submission.sh")]
    assert told.get("DDPM_RUN_ID") == "0f1e2d" if via == "sbatch" else "export DDPM_RUN_ID=0f1e2d\n" in scripts[0]


@VIA
def test_everything_that_is_asked_for_is_a_flag(run: RunDir, cluster: Cluster, via: str) -> None:
    """SBATCH_* variables, which a user may have exported, go before the lines of a script, and flags before them."""
    job = Job("train", run, Site(via=via, account="lab", time=60, sbatch={"exclusive": True, "nice": 5}))
    assert submitting.submit(job) == "101"
    (command,) = cluster.of("sbatch")
    assert options_of(command) == {
        "--job-name=tiny-train", "--account=lab", "--time=60", "--nodes=1", "--ntasks-per-node=1", "--requeue",
        "--export=ALL", "--open-mode=append", "--signal=USR2@120", f"--output={run.logs}/train-%j.out", "--exclusive",
        "--nice=5",
    }  # fmt: skip


@VIA
def test_an_array_and_its_logs_are_named_by_flags_too(run: RunDir, cluster: Cluster, via: str) -> None:
    both = [Job("sample", run, Site(via=via, max_parallel=8), "set", shards) for shards in ((0, 1), (2,))]
    assert [submitting.submit(job) for job in both] == ["101", "102"]
    array, single = map(options_of, cluster.of("sbatch"))
    assert f"--output={run.logs}/sample-%A_%a.out" in array and any(o.startswith("--array=0-1%") for o in array)
    assert f"--output={run.logs}/sample-%j.out" in single and not any(o.startswith("--array") for o in single)


def test_a_successor_takes_its_environment_along_though_the_job_before_did_not(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitting.submit(Job("train", run, Site(via="sbatch", account="lab")))
    for events in run.events.iterdir():
        events.write_text(events.read_text().replace('"export": "ALL"', '"account": "lab"'))
    monkeypatch.setenv("DDPM_OF_RUN", "0f1e2d")
    submitting.submit_successor(run, "train", "101")
    assert {"--export=ALL", "--account=lab"} <= options_of(cluster.of("sbatch")[1])
    assert cluster.environments[-1]["DDPM_RUN_ID"] == "0f1e2d"  # and of this run alone


def test_the_successor_of_one_task_of_an_evaluation_computes_the_same(run: RunDir, cluster: Cluster) -> None:
    site = Site(via="sbatch", account="lab", tasks=2)
    submitting.submit(Job("evaluate", run, site, "bound", extra_args=("--bits-per-dim",), parts=2))
    submitting.submit_successor(run, "evaluate", "101_1")
    heir = cluster.of("sbatch")[1]
    assert heir[-3:] == [str(run.path), "bound", "--bits-per-dim"] and "--account=lab" in heir
    assert f"--output={run.logs}/evaluate-%j.out" in heir and submitting.sent_where(run, "101_1") == site


@pytest.mark.parametrize("odd", ['"options": 7', '"options": null', '"set": 7', '"args": "x"', '"job": 101'])
def test_a_job_whose_submission_is_odd_has_a_successor_all_the_same(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """What its event does not tell any more is as SLURM has it."""
    submitting.submit(Job("train", run, Site(via="sbatch", account="lab")))
    monkeypatch.setenv("SLURM_JOB_ACCOUNT", "lab")
    key = odd.partition(":")[0].strip('"')
    for path in run.events.iterdir():
        event = json.loads(path.read_text())
        path.write_text(json.dumps({**event, key: json.loads(f"{{{odd}}}")[key]}) + "\n")
    assert submitting.submit_successor(run, "train", "101") == "102"
    options = options_of(cluster.of("sbatch")[1])
    assert "--account=lab" in options and ("--job-name=tiny-train" in options) == (key != "options")
    assert [e["successor_of"] for e in read_events(run) if e["job"] == "102"] == ["101"]


@pytest.mark.parametrize(("shown", "flags"), [
    (None, []),
    (slurm_shows(may_requeue=True, time_limit=""), []),
    (slurm_shows(may_requeue=False, time_limit="1:00:00"), ["--no-requeue", "--time=1:00:00"]),
])  # fmt: skip
def test_a_successor_of_a_job_by_hand_asks_for_what_slurm_shows_of_it(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, shown: scheduler.Shown | None, flags: list[str]
) -> None:
    monkeypatch.setattr(scheduler, "show", lambda job: shown)
    assert submitting.submit_successor(run, "train", "7") == "101"
    assert sorted(options_of(cluster.of("sbatch")[0])) == ["--export=ALL", *flags]


def test_a_number_of_tasks_that_is_odd_counts_as_one(run: RunDir, cluster: Cluster) -> None:
    submitting.submit(Job("sample", run, Site(), "set", (0, 1)))
    assert submitting.sent_tasks(run, "101") == 2
    for path in run.events.iterdir():
        path.write_text(path.read_text().replace('"tasks": 2', '"tasks": "many"'))
    assert submitting.sent_tasks(run, "101") == 1


@pytest.mark.parametrize(("value", "requeue"), [(None, True), (False, True), (True, False)])
def test_an_option_that_a_stage_takes_away_is_none_of_its(run: RunDir, value: bool | None, requeue: bool) -> None:
    site = Site(sbatch={"no-requeue": True}, evaluate=Stage(sbatch={"no-requeue": value}))
    options = Job("evaluate", run, site, "set").options()
    assert ("requeue" in options, "no-requeue" in options) == (requeue, not requeue)
    assert "requeue" not in Job("train", run, site).options()


# ---------------------------------------------------------------- nodes that are left out


def died_on(run: RunDir, node: str, when: str) -> None:
    EventLog(run, "7", 0, "host").append("requeued", bad_node=node, time=when)


def test_a_setup_line_that_fails_on_two_nodes_is_not_the_nodes_fault(run: RunDir) -> None:
    def died(node: str, restart: int, error: str, *, began: bool = False) -> None:
        log = EventLog(run, "7", restart, node)
        if began:
            log.append("started")
        log.append("requeued", bad_node=node, error=error)

    died("n1", 0, "setup failed on n1 (exit code 1): module load x")
    assert bad_nodes(run) == ["n1"]
    died("n2", 1, "setup failed on n2 (exit code 1): module load x")
    assert bad_nodes(run) == []
    for restart, node in ((7, "n7"), (8, "n8")):  # as slurm/supervise.sh tells it
        EventLog(run, "7", restart, node).append(
            "requeued", bad_node=node, reason=f"/x/python does not run on node {node}"
        )
        assert bad_nodes(run) == (["n7"] if node == "n7" else [])
    died("n3", 2, "RuntimeError: CUDA error: uncorrectable ECC error", began=True)
    died("n4", 3, "RuntimeError: CUDA error: uncorrectable ECC error", began=True)
    died("n5", 4, "")
    died("n6", 5, "")
    assert bad_nodes(run) == ["n3", "n4", "n5", "n6"]


def test_a_node_on_which_the_code_itself_failed_is_not_left_out(run: RunDir) -> None:
    wrong = "NameError: name 'snr' is not defined"
    EventLog(run, "7", 0, "n1").append("requeued", bad_node="n1", error=wrong)
    EventLog(run, "7", 1, "n2").append("requeued", bad_node="n2", error="RuntimeError: CUDA error")
    assert bad_nodes(run) == ["n1", "n2"]
    EventLog(run, "7", 2, "n3").append("failed", last_error="RuntimeError: CUDA error")
    assert bad_nodes(run) == ["n1", "n2"]
    EventLog(run, "7", 2, "n3").append("failed", last_error=wrong)
    assert bad_nodes(run) == ["n2"]


@pytest.mark.parametrize(("asked", "excluded"), [("", "n2"), ("n1", "n1,n2")])
def test_what_is_queued_while_a_life_of_the_first_dies_on_a_node_does_without_it_too(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, asked: str, excluded: str
) -> None:
    cluster.nodes = ["n1", "n2", "n3", "n4"]
    site = Site(via="sbatch", exclude=asked or None)

    def late(job: Job) -> str:  # the first job is at work before the second is in the queue
        taken = submitting.submit(job)
        if job.stage == "evaluate":
            died_on(run, "n2", now())
        return taken

    monkeypatch.setattr(chain, "submit", late)
    chain.queue([Job("train", run, site), Job("evaluate", run, site, "set")], Config())
    assert [c for c in cluster.commands if c[:2] == ["scontrol", "update"]] == [
        ["scontrol", "update", "jobid=102", f"excnodelist={excluded}"]
    ]


@VIA
@pytest.mark.parametrize(("nodes", "asked", "excluded"), [
    (["n1", "n2", "n3", "n4"], {}, "n2"), (["n1", "n2", "n3", "n4"], {"exclude": "n1"}, "n1,n2"), (["n2"], {}, ""),
    (["n1", "n3"], {}, ""), (["n1", "n2", "n3"], {"nodes": 3}, ""),
    (["n1", "n2", "n3", "n4"], {"exclude": "n1,n3"}, "n1,n3"),
    (["n1", "n2", "n3", "n4"], {"sbatch": {"exclude": "n1"}}, "n1,n2"),
    (["n1", "n2", "n3", "n4"], {"exclude": "none"}, ""),
])  # fmt: skip
def test_a_new_job_does_without_a_node_on_which_a_life_of_the_run_died_by_itself(
    run: RunDir, cluster: Cluster, via: str, nodes: list[str], asked: dict[str, Any], excluded: str
) -> None:
    """By the rule of a job that is put back: never without half of a partition, nor what the job needs of it."""
    died_on(run, "n2", now())
    died_on(run, "n4", "2020-01-01T00:00:00.000Z")  # mended since, for all that anybody knows
    cluster.nodes = nodes
    train = Job("train", run, Site(via=via, partition="gpu", **asked))
    for job in (train, Job("sample", run, Site(via=via, **asked), "s", (1,))):
        needs_less = job.stage == "sample" and "nodes" in asked
        submitting.submit(job)
        options = options_of(cluster.of("sbatch")[-1])
        wanted = "n2" if needs_less else excluded
        assert [o for o in options if "exclude" in o] == ([f"--exclude={wanted}"] if wanted else [])
    if excluded:
        assert f"--exclude={excluded}" in submitting.by_hand(train)


def test_of_the_nodes_on_which_lives_died_no_more_than_half_of_the_partition_is_left_out(
    run: RunDir, cluster: Cluster
) -> None:
    cluster.nodes = ["n1", "n2", "n3", "n4"]
    for node in ("n4", "n2", "n3"):
        died_on(run, node, now())
    submitting.submit(Job("train", run, Site(via="sbatch")))
    assert "--exclude=n4,n2" in options_of(cluster.of("sbatch")[-1])


def test_where_slurm_does_not_tell_its_nodes_a_new_job_is_queued_all_the_same(run: RunDir, cluster: Cluster) -> None:
    died_on(run, "n2", now())
    cluster.nodes = None
    assert submitting.submit(Job("train", run, Site(partition="gpu"))) == "101"


# ---------------------------------------------------------------- submitit


def run_by_submitit(run: RunDir, job: str, probe: str) -> subprocess.CompletedProcess[str]:
    """What submitit's runner does as rank 0 of `job`. probe: a module in the way of launch.jobs, by its source."""
    (run.path / "launch").mkdir()
    (run.path / "launch" / "__init__.py").touch()
    (run.path / "launch" / "jobs.py").write_text(probe)
    base, _, task = job.partition("_")
    env = {"SLURM_JOB_ID": "99", "SLURM_ARRAY_JOB_ID": base, "SLURM_ARRAY_TASK_ID": task} if task else {}
    env = {"SLURM_JOB_ID": base, **env, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    path = os.pathsep.join([str(run.path), os.environ.get("PYTHONPATH", "")])
    env |= {"SUBMITIT_EXECUTOR": "slurm", "PYTHONPATH": path, "PATH": os.environ["PATH"]}
    argv = [sys.executable, "-u", "-m", "submitit.core._submit", str(run.logs / "submitit")]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, cwd=run.path)


PROBE = "def main(argv):\n    print('told', *argv)\n"


@pytest.mark.parametrize(("shards", "job", "told"), [
    ((), "101", "train RUN"), ((2,), "101", "sample RUN set --shards 2"),
    ((4, 5), "101_1", "sample RUN set --shards 5"),
    ((3, 4, 6, 9, 11), "101_0", "sample RUN set --shards 3,6,11"),
])  # fmt: skip
def test_submitits_runner_finds_in_a_pickle_the_entry_and_what_it_is_told_and_nothing_else_of_ours(
    run: RunDir, cluster: Cluster, shards: tuple[int, ...], job: str, told: str
) -> None:
    stage, set_name = ("sample", "set") if shards else ("train", "")
    submitting.submit(Job(stage, run, Site(tasks=2), set_name, shards))
    done = run_by_submitit(run, job, PROBE)
    assert done.returncode == 0, done.stderr
    assert f"told {told.replace('RUN', str(run.path))}\n" in done.stdout


def test_a_job_that_the_version_before_queued_starts(run: RunDir) -> None:
    """Its pickle names the entry as a function of its module."""
    (run.logs / "submitit").mkdir()
    delayed = DelayedSubmission(jobs.main, ["train", "RUN"])
    delayed.set_timeout(5, 3)
    delayed.dump(run.logs / "submitit" / "17_submitted.pkl")
    done = run_by_submitit(run, "17", PROBE)
    assert done.returncode == 0 and "told train RUN\n" in done.stdout, done.stderr


def test_what_submits_does_not_load_what_runs(run: RunDir, cluster: Cluster) -> None:
    code = (
        "import sys; from launch import submit, sample, evaluate, status; from launch.life import supervisor; "
        "from launch.cluster import by_submitit; from pickle import dumps; "
        "dumps(by_submitit.Named(by_submitit.ENTRY)); "
        "sys.exit('launch.jobs' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
    submitting.submit(Job("train", run, Site()))
    (saved,) = (run.logs / "submitit").glob("*.pkl")
    assert pickle.loads(saved.read_bytes()).function is jobs.main  # noqa: S301


def test_the_script_of_a_submitit_job_lies_under_its_id(run: RunDir, cluster: Cluster) -> None:
    submitting.submit(Job("sample", run, Site(), "set", (0, 1)))
    text = (run.logs / "submitit" / "101_submission.sh").read_text()
    assert submitting.describe(Job("sample", run, Site(), "set", (0, 1))).endswith(text)
    assert {p.name for p in (run.logs / "submitit").glob("101*.pkl")} == {f"101_{i}_submitted.pkl" for i in (0, 1)}


# ---------------------------------------------------------------- refusals and silence

SILENCE = scheduler.NoAnswer("sbatch: error: Batch job submission failed: Unable to contact slurm controller")


@VIA
def test_a_refusal_is_the_requests_fault_and_silence_is_not(run: RunDir, cluster: Cluster, via: str) -> None:
    cluster.accepts = 0
    with pytest.raises(RequestError, match="Invalid account"):
        submitting.submit(Job("train", run, Site(via=via)))
    cluster.otherwise = SILENCE
    with pytest.raises(scheduler.NoAnswer, match="squeue --me --name tiny-train") as caught:
        submitting.submit(Job("train", run, Site(via=via)))
    assert caught.value.exit_code == 3 and "Unable to contact" in str(caught.value)
    assert cluster.of("scancel") == []


@VIA
def test_a_job_that_could_not_be_noted_down_is_taken_back(run: RunDir, cluster: Cluster, via: str) -> None:
    run.events.rmdir()
    run.events.touch()
    with pytest.raises(FileExistsError):
        submitting.submit(Job("train", run, Site(via=via)))
    assert cluster.of("scancel") == [["scancel", "101"]]


def test_an_interrupt_leaves_no_job_that_nobody_could_find_again(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place, name, taken_back in ((scheduler, "preemption", []), (EventLog, "append", [["scancel", "101"]])):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, interrupted)
            submitting.submit(Job("train", run, Site(via="sbatch")))
        assert cluster.of("scancel") == taken_back and len(cluster.of("sbatch")) == len(taken_back)


@VIA
@pytest.mark.parametrize("error", [OSError("no"), ValueError("no")])
def test_a_chain_in_which_something_breaks_half_way_is_taken_back(
    run: RunDir, cluster: Cluster, via: str, error: Exception
) -> None:
    cluster.otherwise = error
    for there in (["scancel", "101"],), ():
        cluster.commands.clear()
        cluster.accepts = len(there)
        with pytest.raises(type(error), match="no"):
            chain.queue([Job("train", run, Site(via=via)), Job("evaluate", run, Site(via=via), "set")], Config())
        assert cluster.of("scancel") == [*there]


@VIA
def test_a_later_stage_that_is_refused_takes_nothing_back_and_is_told_with_what_adds_it(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, via: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/submit.py", "--then", "sample,evaluate", "data.path=my images"])
    cluster.accepts = 1
    site = Site(via=via)
    jobs = [Job("train", run, site), Job("sample", run, site, "set", (0,)), Job("evaluate", run, site, "set")]
    ids, told = chain.queue(jobs, Config())
    assert ids == ["101"] and cluster.of("scancel") == []
    assert "not queued: sample and evaluate" in told[-1] and "Invalid account" in told[-1]
    assert told[-1].endswith("\n  python launch/submit.py --then sample,evaluate 'data.path=my images'")
    cluster.accepts = 9
    cluster.queue = ["101 101 RUNNING"]
    ids, told = chain.queue(jobs, Config())
    assert len(ids) == 3 and told[0] == "in the queue already: train as job 101" and cluster.of("scancel") == []


@VIA
def test_a_first_stage_that_is_refused_is_an_error(run: RunDir, cluster: Cluster, via: str) -> None:
    cluster.accepts = 0
    with pytest.raises(RequestError, match="Invalid account"):
        chain.queue([Job("train", run, Site(via=via)), Job("evaluate", run, Site(via=via), "set")], Config())


@VIA
def test_what_slurm_has_taken_and_will_never_start_is_taken_back_and_refused_in_its_words(
    run: RunDir, cluster: Cluster, via: str
) -> None:
    cluster.queue = ["101 101 PENDING N/A PartitionNodeLimit", "102 102 PENDING N/A Dependency"]
    jobs = [Job("train", run, Site(via=via)), Job("evaluate", run, Site(via=via), "set")]
    with pytest.raises(RequestError, match=r"never start it.*PartitionNodeLimit\): submit again with other --nodes"):
        chain.queue(jobs, Config())
    assert cluster.of("scancel") == [["scancel", "101", "102"]]
    cluster.queue = ["103 103 PENDING N/A PartitionTimeLimit"]
    with pytest.raises(RequestError, match="PartitionTimeLimit"):
        submitting.submit_alone(jobs[1])
    assert cluster.of("scancel")[1:] == [["scancel", "103"]]


def test_what_a_queued_job_waits_for_is_told_once_where_there_is_something_to_do_or_a_time(
    run: RunDir, cluster: Cluster
) -> None:
    job = Job("train", run, Site())
    told = []
    for number, why in enumerate(("2026-11-27T08:00:00 Priority", "N/A QOSGrpGRES", "N/A Priority", "N/A None"), 101):
        cluster.queue = [f"{number} {number} PENDING {why}"]
        told.append(chain.queue([job], Config())[1])
    assert "SLURM expects it to start at 2026-11-2" in told[0][1] and told[1][1].endswith(
        f"none of them runs, python launch/cancel.py {run.path}, then submit again for less, or with another --qos"
    )
    assert [len(lines) for lines in told] == [2, 2, 1, 1]


@VIA
def test_what_waits_for_a_job_that_was_cancelled_waits_for_the_one_in_its_place(
    run: RunDir, cluster: Cluster, via: str
) -> None:
    jobs = [Job("train", run, Site(via=via)), Job("evaluate", run, Site(via=via), "set")]
    chain.queue(jobs, Config())
    cluster.queue = ["102 102 PENDING N/A Dependency"]
    cluster.commands.clear()
    ids, _ = chain.queue(jobs, Config())
    assert ids == ["101", "102"] and len(cluster.of("sbatch")) == 1
    assert ["scontrol", "update", "jobid=102", "dependency=afterany:101"] in cluster.commands


# ---------------------------------------------------------------- tasks

TOO_MANY = scheduler.SchedulerError(
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\n  error: Batch job submission failed: Job violates accounting/QOS "
    "policy (job submit limit, user's size and/or time limits)"
)


def shards_of(command: list[str]) -> list[list[int]]:
    """What each task of a template's sbatch makes, by the words that the template passes on."""
    (at,) = (n for n, word in enumerate(command) if word.endswith("/slurm/sample.sbatch"))
    args = jobs.parse(["sample", *command[at + 1 :]])
    return [share(args.shards, task, args.tasks) for task in range(args.tasks)]


@VIA
@pytest.mark.parametrize(("asked", "size", "tasks"), [
    ({}, 1001, 4), ({"tasks": 3}, 1001, 3), ({"tasks": 7}, 1001, 7), ({"tasks": 50}, 1001, 7), ({}, 2, 2), ({}, 0, 1),
    ({"tasks": 5}, 1, 1),
])  # fmt: skip
def test_the_tasks_of_one_array_make_each_shard_once(
    run: RunDir, cluster: Cluster, via: str, asked: dict[str, Any], size: int, tasks: int
) -> None:
    shards = (0, 1, 2, 5, 6, 8, 1200)
    cluster.array_size = size
    submitting.submit(Job("sample", run, Site(via=via, max_parallel=4, **asked), "set", shards))
    (command,) = cluster.of("sbatch")
    if via == "sbatch":
        made = shards_of(command)
    else:
        made = [numbers(pickle.loads(p.read_bytes()).args[0][-1]) for p in (run.logs / "submitit").glob("*.pkl")]  # noqa: S301
    assert len(made) == tasks and sorted(n for task in made for n in task) == sorted(shards)
    array = [o for o in command if o.startswith("--array")]
    assert array == ([] if tasks == 1 else [f"--array=0-{tasks - 1}%{min(4, tasks) if via == 'submitit' else 4}"])


@VIA
def test_where_a_user_may_not_have_so_many_jobs_fewer_tasks_make_the_shards_and_the_score_has_room_too(
    run: RunDir, cluster: Cluster, via: str
) -> None:
    cluster.room, cluster.otherwise = 9, TOO_MANY
    site = Site(via=via)
    sampled = Job("sample", run, site, "set", tuple(range(64)))
    ids, told = chain.queue([Job("train", run, site), sampled, Job("evaluate", run, site, "set")], Config())
    assert len(ids) == 3 and "64 shards in 4 tasks" in told[1] and told[2].startswith("queued: evaluate")
    assert cluster.room == 9 - 1 - 4 - 1


@VIA
def test_a_number_of_tasks_that_was_asked_for_is_not_taken_back_for_the_score(
    run: RunDir, cluster: Cluster, via: str
) -> None:
    cluster.room, cluster.otherwise = 9, TOO_MANY
    site = Site(via=via, tasks=8)
    sampled = Job("sample", run, site, "set", tuple(range(64)))
    ids, told = chain.queue([Job("train", run, site), sampled, Job("evaluate", run, site, "set")], Config())
    assert len(ids) == 2 and "not queued: evaluate" in told[-1] and cluster.of("scancel") == []


@VIA
@pytest.mark.parametrize(("shards", "otherwise"), [(64, INVALID), (1, TOO_MANY)])
def test_samples_are_not_taken_back_for_a_score_that_would_have_no_room_without_them_either(
    run: RunDir, cluster: Cluster, via: str, shards: int, otherwise: Exception
) -> None:
    cluster.accepts, cluster.otherwise = 1, otherwise
    sampled = Job("sample", run, Site(via=via), "set", tuple(range(shards)))
    ids, told = chain.queue([sampled, Job("evaluate", run, Site(via=via), "set")], Config())
    assert ids == ["101"] and "not queued: evaluate" in told[-1] and cluster.of("scancel") == []


def test_a_chain_that_is_queued_stays_though_nobody_reads_of_it(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    ids, told = chain.queue([Job("train", run, Site()), Job("evaluate", run, Site(), "set")], Config())
    assert len(ids) == len(told) == 2 and cluster.of("scancel") == []


def test_a_chain_in_which_slurm_falls_silent_stays(run: RunDir, cluster: Cluster) -> None:
    cluster.accepts, cluster.otherwise = 1, SILENCE
    with pytest.raises(scheduler.NoAnswer, match="tiny-evaluate"):
        chain.queue([Job("train", run, Site()), Job("evaluate", run, Site(), "set")], Config())
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
    with pytest.raises(scheduler.NoAnswer if silent else RequestError):
        submit.main()
    assert (tmp_path / "runs" / "tiny").exists() == silent
    if silent:  # and the same command goes on
        cluster.accepts = 9
        assert submit.main() == 0


def test_pickles_are_the_submitters_alone_and_another_user_has_other_ones(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever could write there would have a job run their code."""
    where = run.logs / "submitit"
    where.mkdir(mode=0o775)
    job = Job("train", run, Site())
    submitting.submit(job)
    assert where.stat().st_mode & 0o777 == 0o700 and list(where.glob("*.pkl"))
    monkeypatch.setattr(os, "geteuid", lambda: where.stat().st_uid + 1)
    before = set(where.iterdir())
    submitting.submit(job)
    assert set(where.iterdir()) == before and len(list(run.logs.glob("submitit-*/*.pkl"))) == 1


def test_what_only_the_login_node_knows_of_a_qos_is_written_down_for_the_job_and_its_successors(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"qos normal": "requeue|00:02:00"}
    monkeypatch.setattr(scheduler, "preemption", lambda asked: told if asked == "gpu" else {"of": repr(asked)})
    submitting.submit(Job("train", run, Site(via="sbatch")))
    assert read_events(run)[0]["preemption"] == {"of": "None"}  # whichever partition it is to be
    submitting.submit(Job("train", run, Site(via="sbatch", partition="gpu", sbatch={"no-requeue": True})))
    monkeypatch.setattr(scheduler, "preemption", lambda partitions: {})
    heir = submitting.submit_successor(run, "train", "102")
    monkeypatch.setattr(scheduler, "mercy", lambda job, told: told)
    kept = {**told, "no-requeue": "1"}
    assert [waiting.mercy_for(run, job) for job in ("102", heir, "7")] == [kept, kept, {}]


def test_what_a_job_runs_is_laid_out_again_where_it_was_purged_meanwhile(run: RunDir, tmp_path: Path) -> None:
    run.config.touch()
    home = code.unpack(run)
    shutil.rmtree(home)
    (tmp_path / "srun").write_text("#!/bin/sh\nexec >$(dirname $0)/said; echo $3 $4; [ ! -f $4 ] || echo there\n")
    (tmp_path / "srun").chmod(0o755)
    env = {"SLURM_JOB_ID": "101", "SLURM_JOB_NODELIST": "n1", "DDPM_HOME": str(home), "DDPM_PYTHON": sys.executable}
    argv = ["bash", str(PROJECT / "slurm" / "train.sbatch"), str(run.path)]
    subprocess.run(argv, env={**env, "PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout=60)
    assert (tmp_path / "said").read_text().split() == ["bash", str(home / "slurm" / "rank.sh"), "there"]


@pytest.mark.parametrize("shards", [(2,), (0, 1)])
def test_a_sample_jobs_template_writes_to_the_log_that_the_options_of_a_job_name(
    run: RunDir, tmp_path: Path, shards: tuple[int, ...]
) -> None:
    """What SLURM itself says of a job goes there: a reader must not have to look in two files."""
    run.config.touch()
    (tmp_path / "srun").write_text("#!/bin/sh\necho made\n")
    (tmp_path / "srun").chmod(0o755)
    job = Job("sample", run, Site(), "set", shards)
    ids = {"SLURM_ARRAY_JOB_ID": "101", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "102"}
    env = {"SLURM_JOB_ID": "101"} if not job.is_array else ids
    env |= {"DDPM_HOME": str(PROJECT), "DDPM_PYTHON": "/bin/true", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    argv = ["bash", str(PROJECT / "slurm" / "sample.sbatch"), str(run.path), "set"]
    assert subprocess.run(argv, env={**env, "SLURM_JOB_NODELIST": "n1"}, timeout=60).returncode == 0
    (log,) = run.logs.iterdir()
    said = str(job.options()["output"]).replace("%j", "101").replace("%A_%a", "101_1")
    assert str(log) == said and "made" in log.read_text()
