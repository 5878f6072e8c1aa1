"""The life of a run on a real SLURM, as an ordinary user: pre-empted, sampled and scored by a chain, succeeded.

What else can happen to one is in test_chaos.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ddpm.run.events import read_events
from ddpm.run.files import read_json, read_jsonl
from ddpm.run.paths import RunDir
from tests.draws import drawn
from tests.images import write_zip
from tools.chaos import cluster, lives
from tools.slurm_testbed.harness import SlurmTestbed

SMALL = [
    "data.name=images", "data.image_size=16", "model.base_channels=32", "model.channel_mults=[1,2]",
    "model.blocks_per_level=1", "model.attention_resolutions=[8]", "train.global_batch=16", "train.warmup_steps=10",
    "train.ema_decay=0.9", "log.every_steps=5", "log.grid_every_steps=null", "log.grid_images=4",
    "checkpoint.milestone_every_steps=null", "sample.num_samples=512", "sample.shards=8", "sample.batch=32",
    "evaluate.extractor=pixels",
]  # fmt: skip
TWO_RANKS = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1"]


@dataclass
class Site:
    """A user of the testbed with a place for runs and a set of images."""

    bed: SlurmTestbed
    root: Path
    images: Path
    exported: dict[str, str] = field(default_factory=dict)
    """What the user's shell has beside the usual."""

    def script(self, name: str, *args: str, code: int = 0) -> str:
        argv = [self.bed.python, self.bed.project / "launch" / f"{name}.py", *args, "--root", self.root]
        done = self.bed.run(argv, timeout=180, env=self.exported)
        assert done.returncode == code, f"{done.args}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, name: str, *args: str) -> list[str]:
        """Job ids of a submission of a small run: training, sampling, scoring."""
        said = self.script("submit", "--partition", "gpu", "--name", name, f"data.path={self.images}", *SMALL, *args)
        return re.findall(r"^queued: .*as job (\d+)", said, re.M)

    def run_dir(self, name: str) -> RunDir:
        return RunDir(self.root / name)

    def logged(self, name: str) -> int:
        return len(read_jsonl(self.run_dir(name).metrics))

    def wait_logged(self, name: str, more: int) -> None:
        goal = self.logged(name) + more
        self.bed.wait_for(lambda: self.logged(name) >= goal, 90, f"{goal} lines in the metrics of {name}")

    def wait_running(self, job: str, restarts: int) -> None:
        self.bed.wait_for(
            lambda: self.bed.restart_count(job) == restarts and self.bed.job_state(job) == "RUNNING",
            90,
            f"restart {restarts} of job {job}",
            poll_s=0.5,
        )

    def log(self, name: str) -> str:
        return "".join(p.read_text(errors="replace") for p in sorted(self.run_dir(name).logs.glob("*.out")))


@pytest.fixture(scope="module")
def site(testbed: SlurmTestbed) -> Site:
    """DDPM_TEST_IMAGES names a folder or zip to train on instead of the images made here."""
    if given := os.environ.get("DDPM_TEST_IMAGES"):
        images = Path(given).resolve()
    else:
        images = write_zip(testbed.workdir / "images.zip")
        images.chmod(0o644)
    return Site(testbed, testbed.mkdir("runs"), images)


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> RunDir:
    (job,) = site.submit("undisturbed", *TWO_RANKS, "train.total_steps=150", "--via", "sbatch")
    assert site.bed.wait_state(job, timeout_s=150) == "COMPLETED", site.log("undisturbed")
    return site.run_dir("undisturbed")


APPTAINER = """\
#!/bin/bash
[ "$1 $2 $3 $6" = "exec --nv --bind /bin/sh" ] || exit 9
echo "$5" >>"$(dirname "$0")/entered"
python=$(command -v "$8")
shift 8
exec /usr/bin/env PATH="$(dirname "$python")" "$python" "$@"
"""
"""Plays it: what runs inside has none of SLURM's commands."""


def contained(site: Site, name: str, more: str = "") -> Path:
    """A profile whose container is played in the folder `name`."""
    there = site.bed.mkdir(name)
    (there / "apptainer").write_text(APPTAINER)
    (there / "apptainer").chmod(0o755)
    (there / "torch.sif").touch()
    profile = site.bed.workdir / f"{name}.yaml"
    setup, container = f"setup: ['export PATH={there}:$PATH']\n", f"container: {{image: {there}/torch.sif}}\n"
    profile.write_text(setup + container + more)
    return profile


@pytest.mark.long
@pytest.mark.parametrize("via", drawn("pre-empted, via", ["submitit", "sbatch"], 1))
def test_a_run_pre_empted_twice_comes_back_by_itself_and_ends_as_if_nothing_had_happened(
    site: Site, undisturbed: RunDir, via: str
) -> None:
    name = f"preempted-{via}"
    told = site.bed.mkdir(f"told-{via}") / "it.txt"
    notify = f"notify: {{command: [tee, -a, {told}]}}\n"
    inside = ["--profile", str(contained(site, "preempted", notify))] if via == "sbatch" else []
    (job,) = site.submit(name, *TWO_RANKS, *inside, "train.total_steps=150", "--via", via)
    for times in (1, 2):
        site.wait_logged(name, 2)
        site.bed.preempt(site.bed.node_of(job) or "", 2)
        site.wait_running(job, times)
    assert site.bed.wait_state(job, timeout_s=120) == "COMPLETED", site.log(name)
    run = site.run_dir(name)
    assert lives.same_end(run, undisturbed)
    events = read_events(run)
    stops = [e["step"] for e in events if e["event"] == "stop_requested"]
    assert [e["step"] for e in events if e["event"] == "resumed"] == stops and len(stops) == 2  # no step lost
    shown = [line for line in site.script("status", name, "--events").splitlines() if " stop_requested " in line]
    assert all("reason=preempted" in line.split() for line in shown) and len(shown) == 2, shown
    assert {e["job"] for e in events} == {job}
    if via == "sbatch":  # at its end, and at none of its requeues
        assert told.read_text() == f"run {name} has finished: step 150; {run.path}\n"


@pytest.mark.long
def test_a_run_that_is_cancelled_is_saved_and_nothing_of_it_stays_in_the_queue(site: Site) -> None:
    jobs = site.submit("everyday", "--gpus-per-node", "0", "train.total_steps=100000", "--then", "sample,evaluate")
    site.wait_logged("everyday", 2)
    site.bed.run(["scontrol", "requeue", jobs[0]])
    site.wait_running(jobs[0], 1)
    site.wait_logged("everyday", 2)
    assert f"job {jobs[0]} (running)" in site.script("remove", "everyday", "--yes", code=2)
    said = site.script("cancel", "everyday")
    assert f"told to save and leave: job {jobs[0]}" in said and all(f"cancelled: job {job}" in said for job in jobs[1:])
    assert site.bed.squeue("-j", ",".join(jobs)).strip().count("\n") == 0
    (row,) = json.loads(site.script("status", "everyday", "--json"))
    assert (row["state"], row["restarts"], row["problem"], row["jobs"]) == ("stopped", 1, None, {})
    assert f"is at step {row['saved_step']} (saved just now)" in said
    told = [line for line in site.script("status", "everyday", "--events").splitlines() if " stop_requested " in line]
    assert [line.split("reason=")[1].split(" step")[0].split(" world")[0] for line in told] == [
        "requeued by hand",
        "STOP",
    ]
    log = site.script("logs", "everyday")
    assert log.count("[batch]") >= 2 and not re.search(r"^(?:srun:|submitit )|CANCELLED AT", log, re.M)
    assert "CANCELLED AT" in site.script("logs", "everyday", "--all")
    site.script("remove", "everyday", "--yes")
    assert not site.run_dir("everyday").path.exists()


@pytest.mark.long
def test_a_sweep_is_runs_with_jobs_of_their_own_and_the_same_command_leaves_those_that_are_done(site: Site) -> None:
    words = ["--gpus-per-node", "0", "train.total_steps=10", "--sweep", "train.lr=1e-4,2e-4,4e-4"]
    jobs = site.submit("swept", *words)
    assert len(set(jobs)) == 3
    for job, name in zip(jobs, ("swept-lr_1e-4", "swept-lr_2e-4", "swept-lr_4e-4"), strict=True):
        assert site.bed.wait_state(job, timeout_s=120) == "COMPLETED", site.log(name)
        assert {e["job"] for e in read_events(site.run_dir(name))} == {job}
    rows = json.loads(site.script("status", "--compare", "swept-lr", "--json"))
    assert sorted(row["differs"]["train.lr"] for row in rows) == [1e-4, 2e-4, 4e-4]
    assert {row["step"] for row in rows} == {10} and rows == sorted(rows, key=lambda row: float(row["loss"]))
    assert site.submit("swept", *words) == []


@pytest.mark.long
def test_a_run_in_a_container_that_is_suspended_for_longer_than_its_ranks_wait_comes_back_uncounted(site: Site) -> None:
    profile = contained(site, "suspended", "rank_timeout_s: 10\n")
    (job,) = site.submit("suspended", *TWO_RANKS, "--profile", str(profile), "train.total_steps=60")
    site.wait_logged("suspended", 2)
    site.bed.admin(["scontrol", "suspend", job])
    time.sleep(12)
    (row,) = json.loads(site.script("status", "suspended", "--json"))
    site.bed.admin(["scontrol", "resume", job])
    # what a rank that takes the other for dead does, where it has not done so by itself
    with contextlib.suppress(IndexError, ProcessLookupError):
        ranks = cluster.Cluster(site.bed, site.root, "submitit").ranks(site.run_dir("suspended"))
        os.kill(ranks[1].pid, signal.SIGKILL)
    entered = (site.bed.workdir / "suspended" / "entered").read_text().split()
    assert row["state"] == "suspended" and entered == [str(site.bed.workdir / "suspended" / "torch.sif")] * 2
    assert site.bed.wait_state(job, timeout_s=120) == "COMPLETED", site.log("suspended")
    events = read_events(site.run_dir("suspended"))
    (told,) = (e for e in events if e["event"] in ("requeued", "failed"))
    assert (told["event"], told["reason"], told.get("bad_node")) == ("requeued", "suspended", None)
    assert {e["cluster"] for e in events} == {"testbed"}


def samples_of(run: RunDir, set_name: str) -> bytes:
    import numpy as np

    shards = sorted((run.samples / set_name).glob("shard-*.npz"))
    return b"".join(np.load(p)["images"].tobytes() for p in shards)


@pytest.mark.long
def test_a_chain_scores_exactly_what_was_asked_for_though_a_task_is_pre_empted(site: Site) -> None:
    told, profile = site.bed.mkdir("told-chain") / "it.txt", site.bed.workdir / "chain.yaml"
    profile.write_text(f"notify: {{mail: me@example.org, command: [tee, -a, {told}]}}\n")
    train, sample, evaluate = site.submit(
        "chain", "--profile", str(profile), "--gpus-per-node", "0", "train.total_steps=30", "sample.steps=60",
        "sample.num_samples=128", "sample.batch=8", "sample.shards=4", "--then", "sample,evaluate",
        "--max-parallel", "2",
    )  # fmt: skip
    bed = site.bed
    run = site.run_dir("chain")
    scripts = [p.read_text() for p in (run.logs / "submitit").glob("*.sh")]
    assert scripts and not any("--time" in text for text in scripts)  # none was asked for, none is invented
    assert bed.wait_state(train, timeout_s=60) == "COMPLETED", site.log("chain")
    task = bed.wait_for(
        lambda: next((line.split()[0] for line in bed.squeue("-t", "R", "-j", sample).splitlines()), ""),
        60,
        "a running sample task",
    )
    part = run.samples / "ddim60-step30-seed0" / "part"
    bed.wait_for(lambda: any(part.glob("*")), 60, "a finished batch")
    bed.preempt(bed.node_of(task) or "", 2)
    assert bed.wait_state(sample, timeout_s=200) == "COMPLETED", site.log("chain")
    assert bed.wait_state(evaluate, timeout_s=60) == "COMPLETED", site.log("chain")
    assert sum(r["Restarts"] != "0" for r in bed.records(sample)) >= 1
    record = read_json(run.eval / "ddim60-step30-seed0.json") or {}
    assert record["num_samples"] == 128 and record["checkpoint"]["step"] == 30 and record["seed"] == 0
    assert record["sampler"] == {"name": "ddim", "steps": 60, "eta": 0.0, "guidance": None}
    assert record["reference"]["split"] == "train" and record["extractor"]["name"] == "pixels"
    assert "fid" not in record and record["frechet_distance"] > 0
    (message,) = told.read_text().splitlines()
    assert message.startswith("run chain has finished: Fréchet distance ")
    mails = [
        bed.run(["scontrol", "show", "job", job]).stdout.count("MailUser=me@example.org") for job in (train, evaluate)
    ]
    assert mails == [0, 1], "of each job's end, or of none"

    two = ["--gpus-per-node", "2"]  # and a rank on each
    said = site.script("sample", "chain", "--set", "three", "--shards", "3", *two, "--via", "sbatch", "--wait")
    assert samples_of(run, "three") == samples_of(run, "ddim60-step30-seed0")
    assert "3 shards in 2 tasks" in said and len(re.findall(r" shard done shard=", site.log("chain"))) >= 4 + 3
    assert {r["NumTasks"] for r in bed.records(re.findall(r"as job (\d+)", said)[0])} == {"2"}


@pytest.mark.long
def test_a_chain_follows_the_successor_of_a_job_that_must_not_be_requeued(site: Site) -> None:
    train, sample, evaluate = site.submit(
        "heirs", "--gpus-per-node", "0", "train.total_steps=400", "--sbatch", "no-requeue", "--via", "sbatch", "--then",
        "sample,evaluate", "sample.num_samples=32", "sample.shards=1", "sample.steps=5",
    )  # fmt: skip
    site.wait_logged("heirs", 2)
    site.bed.preempt(site.bed.node_of(train) or "", 1)
    assert site.bed.wait_state(evaluate, timeout_s=200) == "COMPLETED", site.log("heirs")
    run = site.run_dir("heirs")
    (heir,) = (e["job"] for e in read_events(run) if e.get("successor_of") == train)
    assert site.bed.job_state(heir) == "COMPLETED" and site.bed.job_states(sample) == ["COMPLETED"]
    assert (read_json(run.eval / "ddim5-step400-seed0.json") or {})["num_samples"] == 32


@pytest.mark.long
@pytest.mark.parametrize("via", drawn("exported, via", ["submitit", "sbatch"], 1))
def test_what_a_user_has_exported_decides_only_what_was_not_asked_for(site: Site, via: str) -> None:
    exported = {"SBATCH_EXPORT": "NONE", "SBATCH_NO_REQUEUE": "1", "SBATCH_OPEN_MODE": "truncate",
                "SBATCH_JOB_NAME": "other", "SBATCH_SIGNAL": "KILL@3600", "SBATCH_TIMELIMIT": "7"}  # fmt: skip
    user = replace(site, exported=exported)
    name = f"exported-{via}"
    jobs = user.submit(name, "--gpus-per-node", "0", "--via", via, "train.total_steps=10", "--then", "sample",
                       "sample.num_samples=32", "sample.shards=2", "sample.steps=5")  # fmt: skip
    for job, stage in zip(jobs, ("train", "sample"), strict=True):
        assert site.bed.wait_state(job, timeout_s=120) == "COMPLETED", site.log(name)
        for record in site.bed.records(job):
            told = (record["JobName"], record["Requeue"], record["TimeLimit"])
            assert told == (f"{name}-{stage}", "1", "00:07:00")
    assert len(list((site.run_dir(name).samples / "ddim5-step10-seed0").glob("shard-*.npz"))) == 2


def test_a_run_can_be_queued_by_hand_from_anywhere_as_printed_and_from_the_project_as_documented(site: Site) -> None:
    words = ["--name", "hand", f"data.path={site.images}", *SMALL, "train.total_steps=10", "--gpus-per-node", "0"]
    said = site.script("submit", "--partition", "gpu", *words, "--prepare")
    line = next(line for line in said.splitlines() if " sbatch " in line)
    first = site.bed.run(["bash", "-c", line], check=True, cwd=site.bed.home, env={"SBATCH_EXPORT": "NONE"})
    template = ["slurm/train.sbatch", str(site.run_dir("hand").path)]
    documented = ["sbatch", "--parsable", "--partition", "gpu", "--gpus-per-node=1", "--output=/dev/null", *template]
    for job in (first.stdout.strip(), None):
        job = job or site.bed.run(documented, check=True, cwd=site.bed.project).stdout.strip()
        assert site.bed.wait_state(job, timeout_s=60) == "COMPLETED", site.log("hand")
        assert (site.run_dir("hand").logs / f"train-{job}.out").exists()
    assert site.run_dir("hand").latest_step() == 10 and "nothing to do" in site.log("hand")
    ask = "from launch.cluster.scheduler import queued; print(queued(['999999']), queued(['999998', '999999']))"
    known = site.bed.run([site.bed.python, "-c", ask], check=True, cwd=site.bed.project)
    assert known.stdout == "{} {}\n"  # ids that SLURM does not know are no failure


def test_what_a_hand_made_job_has_can_be_asked_for_again_and_its_ranks_share_their_cpus(site: Site) -> None:
    code = (
        "import json, os; from launch.cluster import environment; "
        "print(json.dumps([environment.allocation(), environment.current().cpus]))"
    )
    asked = ["--gres=gpu:2", "--mem=4000", "--ntasks-per-node=2", f"--chdir={site.bed.project}"]
    out = site.bed.workdir / "hand-made.out"
    show = f'"{site.bed.python}" -c "{code}"'
    job = site.bed.sbatch(*asked, f"--output={out}", command=f"{show}; srun {show}")
    assert site.bed.wait_state(job) == "COMPLETED"
    (options, cpus), *ranks = (json.loads(line) for line in out.read_text().splitlines() if line.startswith("["))
    assert (options["gpus-per-node"], options["mem"], cpus) == ("2", "4000", 1)
    assert [cpus for _, cpus in ranks] == [1, 1]


@pytest.mark.long
def test_milestones_are_scored_by_jobs_beside_training_and_tasks_share_a_bound(site: Site) -> None:
    short = ["diffusion.timesteps=25", "sample.steps=5", "train.total_steps=20", "checkpoint.milestone_every_steps=20"]
    site.submit("curve", "--gpus-per-node", "0", *short, "evaluate.milestones={num_samples: 64}")
    run = site.run_dir("curve")

    def curve() -> list[int]:
        return [point["step"] for point in (read_json(run.milestones) or {}).get("curve", [])]

    site.bed.wait_for(lambda: curve() == [20], 120, f"the milestone in {run.milestones}")
    asked = ["curve", "--bits-per-dim", "--reference", "train", "--num-images", "80"]
    (job,) = re.findall(r"as job (\d+)", site.script("evaluate", *asked, "--wait"))
    bound = read_json(run.score("bits-per-dim-train-80-step20-seed0"))
    assert bound is not None and bound["num_samples"] == 80
    logs = [path.read_text() for path in run.logs.glob(f"evaluate-{job}_*.out")]
    # queued when it was saved, asked for again at the end
    assert sum(e["event"] == "submitted" and e["stage"] == "sample" for e in read_events(run)) == 1
    assert len(logs) == 3 and sum(log.count("bits per dimension images=") for log in logs) == 3, logs


@pytest.mark.long
def test_a_run_from_anothers_weights_that_dies_before_its_first_save_begins_with_them_again(
    site: Site, undisturbed: RunDir
) -> None:
    asked = ("--from", f"{undisturbed.name}@150", "train.total_steps=100", "checkpoint.every_min=null")
    (job,) = site.submit("second", *TWO_RANKS, *asked)
    run = site.run_dir("second")
    site.wait_logged("second", 2)
    before = {line["step"]: line["loss"] for line in read_jsonl(run.metrics)}
    os.kill(cluster.Cluster(site.bed, site.root, "submitit").ranks(run)[1].pid, signal.SIGKILL)
    assert run.steps_saved() == []
    assert site.bed.wait_state(job, timeout_s=120) == "COMPLETED", site.log("second")
    after = {line["step"]: line["loss"] for line in read_jsonl(run.metrics)}
    assert [e["event"] for e in read_events(run)].count("started") == 2 and len(before) >= 2
    assert {step: after[step] for step in before} == before
    assert after[5] < read_jsonl(undisturbed.metrics)[0]["loss"]  # of a run that begins with nothing
