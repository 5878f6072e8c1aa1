"""What a scancel of one job means for what follows it. SLURM's answers are given here."""

from pathlib import Path

import pytest

from ddpm.config.schema import Config
from ddpm.errors import EXIT_REQUEUE, DoNotRetry, RequestError
from ddpm.run.events import EventLog, read_events
from ddpm.run.paths import RunDir
from launch.cluster import environment, scheduler, slurm
from launch.cluster.job import Job
from launch.life import supervisor
from launch.life.life import Life
from launch.life.preemption import StopFlag
from launch.life.starting import request_of
from launch.queue import chain

SQUEUE = "102|afterany:101(unfulfilled)\n103|afterany:102_*(unfulfilled),afterany:104(unfulfilled)\n201|(null)\n"


class Cluster:
    """Says what squeue and scontrol say; remembers what is cancelled."""

    def __init__(self) -> None:
        self.state = "CANCELLED"
        self.cancelled: list[list[str]] = []

    def run(self, argv: list[str], **_: object) -> str:
        if argv[0] == "scancel":
            self.cancelled.append(argv[1:])
        if "config" in argv:
            return "PreemptMode = REQUEUE\nKillWait = 0 sec\nPreemptType = preempt/none\n"
        return SQUEUE if argv[0] == "squeue" else f"JobId=101 JobState={self.state} Requeue=1 Restarts=0 Partition=gpu"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    c = Cluster()
    monkeypatch.setattr(slurm, "run", c.run)
    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": True)
    for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    return c


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "tiny")
    for path in (run.checkpoints, run.logs, run.events):
        path.mkdir(parents=True)
    run.config.write_text(Config().to_yaml())
    return run


def life_of(run: RunDir, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Life:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    return Life(run, StopFlag(), environment.current())


BY_SCANCEL = "slurmstepd-n1: error: *** JOB 101 ON n1 CANCELLED AT 2026-11-26T21:18:47 ***"


@pytest.mark.parametrize(("stage", "state", "log", "cancelled"), [
    ("train", "COMPLETING", BY_SCANCEL, [["102", "103"]]), ("train", "RUNNING", BY_SCANCEL, []),
    ("train", "COMPLETING", BY_SCANCEL.replace("47 ***", "47 DUE TO JOB REQUEUE ***"), []),
    ("train", "COMPLETING", BY_SCANCEL.replace("47 ***", "47 DUE TO TIME LIMIT ***"), []),
    ("train", "COMPLETING", BY_SCANCEL.replace("47 ***", "47 DUE to SIGNAL Terminated ***"), [["102", "103"]]),
    ("train", "PENDING", BY_SCANCEL, []), ("train", "COMPLETING", BY_SCANCEL.replace("JOB 101", "STEP 101.0"), []),
    ("sample", "COMPLETING", BY_SCANCEL, []),
])  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_a_training_that_its_owner_cancels_takes_along_what_waits_for_it_and_says_so(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    stage: str, state: str, log: str, cancelled: list[list[str]], inside: bool,
) -> None:  # fmt: skip
    cluster.state = state
    (run.logs / f"{stage}-101.out").write_text(f"[batch] now restart=0 stage={stage}\n{log}\n")
    life = life_of(run, monkeypatch, SLURM_JOB_ID="101", DDPM_STAGE=stage)
    monkeypatch.setattr("launch.life.preemption.time.monotonic", iter(range(0, 10_000, 100)).__next__)
    if inside:  # then the batch shell does the same
        monkeypatch.setenv("DDPM_SHELL_ASKS", "1")
        monkeypatch.setattr(scheduler, "available", lambda command="": False)
        assert life.until_killed_or_on("preempted") == EXIT_REQUEUE and cluster.cancelled == []
        for _ in range(2):  # of the log alone, once
            run.exit_marker("101", 0).write_text("75 preempted")
            monkeypatch.setattr(supervisor.time, "sleep", lambda s: None)
            supervisor.end(run, stage, 75, "")
    else:
        life.until_killed_or_on("preempted")
    assert cluster.cancelled == cancelled
    told = [e for e in read_events(run) if e["event"] == "cancelled"]
    with_it = [job for ids in cancelled for job in ids]
    was = bool(cancelled) or stage == "sample"
    assert [(e["stage"], e["with_it"]) for e in told] == ([(stage, with_it)] if was else [])
    assert ("cancelled by scancel" in capsys.readouterr().out) == was


def test_a_task_that_finds_no_training_to_go_on_from_calls_off_its_siblings_and_the_score(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = {"SLURM_JOB_ID": "110", "SLURM_ARRAY_JOB_ID": "102", "SLURM_ARRAY_TASK_ID": "5"}
    with pytest.raises(DoNotRetry, match=r"training ended at step 0.*Cancelled, as it was to follow: job 103"):
        request_of(life_of(run, monkeypatch, **array), "set")
    assert cluster.cancelled == [["103"], ["--state=PENDING", "102"]]
    with pytest.raises(DoNotRetry, match="training ended at step 0"):
        request_of(life_of(run, monkeypatch, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1", **array), "set")
    assert len(cluster.cancelled) == 2  # by one rank for all


def test_shards_whose_job_was_cancelled_are_not_made_anew_by_the_score(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "jobs_in_queue", lambda *_: [])
    run.run_json.write_text('{"launch": {}}')
    EventLog(run, "102", 0, "login", prefix="submit-").append("submitted", stage="sample", set="set", via="sbatch")
    env = life_of(run, monkeypatch, SLURM_JOB_ID="103").env
    with pytest.raises(DoNotRetry, match=r"set lacks 2 shards \(3-4\).*job 102 was cancelled.*launch/sample.py"):
        chain.fill_gaps(run, "set", [3, 4], None, "", env)


@pytest.mark.parametrize("refused", ["sample", "evaluate"])
def test_a_score_whose_missing_shards_find_a_full_queue_says_what_to_type_once_there_is_room(
    run: RunDir, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def submit(job: Job) -> str:
        if job.stage == refused:
            raise RequestError(f"SLURM refused the {refused} job: sbatch: error:\n  AssocMaxSubmitJobLimit\n(wait …)")
        return "104"

    monkeypatch.setattr(chain, "jobs_in_queue", lambda *_: [])
    monkeypatch.setattr(chain, "submit", submit)
    run.run_json.write_text('{"launch": {}}')
    env = life_of(run, monkeypatch, SLURM_JOB_ID="103").env
    score = f"python launch/evaluate.py {run.quoted} --set set --reference test"
    with pytest.raises(DoNotRetry) as told:
        chain.fill_gaps(run, "set", [3, 4], ("--reference", "test"), "", env)
    lacks = f"set lacks 2 shards (3-4): once SLURM takes jobs again, python launch/sample.py {run.quoted} --set set"
    words = f"SLURM refused the {refused} job: sbatch: error: AssocMaxSubmitJobLimit (wait …)"
    assert str(told.value) == f"{lacks}, then {score}. {words}"
