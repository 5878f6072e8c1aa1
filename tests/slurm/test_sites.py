"""A site that is strict: limits and QOS pre-emption by accounting, GPUs with their type behind a submit plugin, and one
node on which every job's first line ends its shell.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ddpm.run.events import read_events
from ddpm.run.files import read_json
from launch.cluster.options import load_profile
from tests.conftest import PROJECT, requires
from tests.draws import drawn
from tests.images import write_zip
from tests.slurm.test_life import APPTAINER, SMALL, Site
from tools.slurm_testbed.harness import ACCOUNTING, SlurmTestbed, missing

PLUGIN = """\
function slurm_job_submit(desc, parts, uid)
  local asked = desc.tres_per_node or ""
  if uid ~= 0 and string.find(asked, "gpu") and not string.find(asked, "gpu:a100") then
    slurm.log_user("GPUs are asked for with their type here: --gres=gpu:a100:1")
    slurm.log_user("see https://docs.site/gpus")
    return slurm.ERROR
  end
  return slurm.SUCCESS
end
function slurm_job_modify(desc, rec, parts, uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""
CONF = "PreemptType=preempt/qos\nPreemptMode=REQUEUE\nPartitionName=brief MaxTime=10\n"
PROFILE = """\
setup: ['[ "$SLURMD_NODENAME" != n1 ] || exit 0', 'export PATH={bin}:$PATH']
sample: {{mem: 500M}}
"""
"""Of a site: here its black hole, and a node's lack of sacctmgr."""


CONTAINER = "container: {{image: {bin}/torch.sif}}\n"


@pytest.fixture(scope="module")
def strict(testbed: SlurmTestbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    lacking = missing(ACCOUNTING)
    requires(not lacking, f"{', '.join(lacking)} missing", "on Debian as root: tools/slurm_testbed/start.sh --install")
    there = tmp_path_factory.mktemp("conf")
    (there / "submit.lua").write_text(PLUGIN)
    (there / "extra.conf").write_text(CONF)
    knobs = {"ACCOUNTING": "1", "GPU_TYPE": "a100"}
    bed = SlurmTestbed(PROJECT, sys.executable, SUBMIT_LUA=str(there / "submit.lua"),
                       EXTRA_CONF=str(there / "extra.conf"), **knobs)  # fmt: skip
    try:
        bed.start()
        bed.admin(["sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPU=10", "PreemptMode=REQUEUE"])
        bed.admin(["sacctmgr", "-i", "add", "qos", "short", "MaxWall=10"])
        bed.admin(["sacctmgr", "-i", "modify", "qos", "normal", "set", "GraceTime=10"])
        bed.admin(["sacctmgr", "-i", "add", "qos", "spare", "PreemptMode=CANCEL", "GraceTime=20", "MaxSubmitJobsPU=1"])
        bed.admin(["sacctmgr", "-i", "add", "qos", "urgent", "Priority=100", "Preempt=normal,spare"])
        bed.admin(["sacctmgr", "-i", "modify", "user", bed.user, "set", "qos+=short,spare,urgent"])
        images = write_zip(bed.workdir / "images.zip")
        images.chmod(0o644)
        nothing = bed.mkdir("bin") / "sacctmgr"
        nothing.write_text("#!/bin/sh\nexit 127\n")
        nothing.chmod(0o755)
        for name, more in (("site", ""), ("contained", CONTAINER)):
            (bed.workdir / f"{name}.yaml").write_text((PROFILE + more).format(bin=nothing.parent))
        (nothing.parent / "torch.sif").touch()
        (nothing.parent / "apptainer").write_text(APPTAINER)
        (nothing.parent / "apptainer").chmod(0o755)
        yield Site(bed, bed.mkdir("runs"), images)
    finally:
        bed.stop()


@pytest.fixture(autouse=True)
def _no_job_is_left(strict: Site) -> Iterator[None]:
    yield
    strict.bed.end_all_jobs()


SHORT = ["train.total_steps=10", "sample.num_samples=64", "sample.shards=64", "sample.steps=2", "sample.batch=8"]


WAYS = [("submitit", "site"), ("sbatch", "contained")]


@pytest.mark.long
@pytest.mark.parametrize(("via", "profile"), drawn("a strict site, via", WAYS, 1))
def test_the_whole_command_ends_with_a_score_on_a_site_with_a_black_hole_and_room_for_ten_jobs(
    strict: Site, via: str, profile: str
) -> None:
    name = f"whole-{via}"
    chosen = str(strict.bed.workdir / f"{profile}.yaml")
    jobs = strict.submit(name, "--profile", chosen, *SHORT, "--then", "sample,evaluate", "--via", via)
    assert len(jobs) == 3
    train, sample, _ = jobs
    assert len(strict.bed.job_states(sample)) in (1, 8)  # one record while none has begun
    for job in jobs:
        assert strict.bed.wait_state(job, timeout_s=240) == "COMPLETED", strict.log(name)
    run = strict.run_dir(name)
    record = read_json(run.eval / "ddim2-step10-seed0.json") or {}
    assert record["num_samples"] == 64
    blamed = [e for e in read_events(run) if e.get("bad_node")]
    assert {e["bad_node"] for e in blamed} == {"n1"} and {e["job"] for e in blamed} == {train}
    assert "setup failed on n1" in strict.log(name)
    for job in jobs:
        assert {r["ExcNodeList"] for r in strict.bed.records(job)} == {"n1"}
        assert all(re.search("(?:gres[:/])?gpu:a100:1$", r["TresPerNode"]) for r in strict.bed.records(job))


def test_the_doctor_tells_what_the_site_allows_and_what_a_node_has(strict: Site) -> None:
    draft = strict.root / "drafted.yaml"
    recipe = str(PROJECT / "configs" / "quickstart.yaml")
    words = ["--partition", "gpu", "--gpus-per-node", "0", "--exclude", "n1", "--write-profile", str(draft)]
    said = strict.script("doctor", recipe, *words, "--profile", str(strict.bed.workdir / "site.yaml"), "--probe")
    for told in (
        "SLURM would take a job to train",
        "SLURM would take a job to sample of 8 tasks",
        "you may have 10 jobs in the queue",
        "qos normal: pre-emption (requeue) leaves 15 s, and SLURM requeues the job",
    ):
        assert f"pass  {told}" in said, said
    assert re.search("pass  node .* see the same files", said) and "clock" not in said
    assert "fail" not in said, said
    strict.bed.wait_for(lambda: strict.bed.squeue() == "", 30, "the end of the job that asked a node")
    assert load_profile(str(draft))["partition"] == "gpu"
    said = strict.script("doctor", recipe, "--partition", "gpu", "--account", "nobodys", code=3)
    assert re.search("fail  SLURM would refuse a job to train: .*Invalid account", said), said


def test_a_typo_in_a_setup_line_costs_no_node_and_status_and_the_probe_tell_it(strict: Site) -> None:
    typo, name, words = strict.bed.workdir / "typo.yaml", "typo", ["--gpus-per-node", "0", "train.total_steps=10"]
    typo.write_text("setup: ['modul load x']\n")
    (job,) = strict.submit(name, "--profile", str(typo), *words)
    died = "modul: command not found; setup failed on n"
    strict.bed.wait_for(lambda: "died on node" in strict.script("status", name), 60, "the end of a life")
    assert died in strict.script("status", name) and "no fault of node" in strict.log(name)
    recipe = str(PROJECT / "configs" / "quickstart.yaml")
    asked = ["--partition", "gpu", "--gpus-per-node", "0", "--profile", str(typo), "--probe"]
    assert "modul: command not found" in strict.script("doctor", recipe, *asked, code=3)
    strict.script("cancel", name)
    strict.bed.wait_for(lambda: strict.bed.squeue() == "", 60, "an empty queue")
    assert {r["ExcNodeList"] for r in strict.bed.records(job)} <= {"(null)", ""}
    said = strict.script("submit", "--partition", "gpu", "--name", name, f"data.path={strict.images}", *SMALL, *words)
    assert "without node" not in said, said
    (again,) = re.findall(r"^queued: train as job (\d+)", said, re.M)
    assert strict.bed.wait_state(again, timeout_s=120) == "COMPLETED", strict.log(name)


def refused(site: Site, name: str, *words: str) -> str:
    said = site.script("submit", "--name", name, f"data.path={site.images}", *SMALL_WORDS, *words, code=2)
    assert not site.run_dir(name).path.exists() and site.bed.squeue() == ""
    return said


SMALL_WORDS = ["data.name=images", "data.image_size=16", "train.total_steps=10", "--via", "sbatch"]


def test_what_the_site_refuses_or_would_never_start_is_refused_in_its_own_words(strict: Site) -> None:
    (strict.bed.workdir / "gres.yaml").write_text("gpu_request: gres\npartition: gpu\n")
    said = refused(strict, "untyped", "--profile", str(strict.bed.workdir / "gres.yaml"), "--gpus-per-node", "1")
    assert "with their type here: --gres=gpu:a100:1" in said and "see https://docs.site/gpus" in said
    said = refused(strict, "long", "--partition", "gpu", "--qos", "short", "--time", "1h")
    assert "QOSMaxWallDurationPerJobLimit" in said and "never start" in said and "--qos" in said
    said = refused(strict, "brief", "--partition", "brief", "--time", "1h")
    assert "allows 10:00" in said and "ask for less" in said
    said = refused(strict, "account", "--partition", "gpu", "--account", "nobodys")
    assert "Invalid account" in said
    said = refused(strict, "crowd", "--partition", "gpu", "--nodes", "9", "train.global_batch=18")
    assert "Requested node configuration is not available" in said or "PartitionConfig" in said


@pytest.mark.long
def test_a_run_that_a_qos_pre_empts_saves_in_its_grace_period_and_comes_back(strict: Site) -> None:
    """Nodes cannot ask how long that is: there is no sacctmgr."""
    words = ["--gpus-per-node", "0", "--exclude", "n1", "train.total_steps=60"]
    (job,) = strict.submit("qos", "--profile", str(strict.bed.workdir / "site.yaml"), *words)
    strict.wait_logged("qos", 2)
    node = strict.bed.node_of(job) or ""
    strict.bed.sbatch("-p", "gpu", "--qos", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", command="sleep 1")
    strict.wait_running(job, 1)
    assert strict.bed.wait_state(job, timeout_s=120) == "COMPLETED", strict.log("qos")
    events = read_events(strict.run_dir("qos"))
    (stop,), (back,) = ([e for e in events if e["event"] == name] for name in ("stop_requested", "resumed"))
    assert stop["step"] == back["step"] and "waiting up to 45 s for SLURM" in strict.log("qos")


@pytest.mark.long
def test_a_run_that_would_be_cancelled_and_may_have_no_successor_beside_it_is_put_back_itself(strict: Site) -> None:
    words = ["--gpus-per-node", "0", "--exclude", "n1", "--qos", "spare", "train.total_steps=90"]
    (job,) = strict.submit("spare", *words)
    for life in (1, 2):
        strict.wait_logged("spare", 2)
        node = strict.bed.node_of(job) or ""
        urgent = ["--qos", "urgent", "-w", node, "--exclusive", "-o", "/dev/null"]
        strict.bed.sbatch("-p", "gpu", *urgent, command="sleep 1")
        strict.wait_running(job, life)
    assert strict.bed.wait_state(job, timeout_s=120) == "COMPLETED", strict.log("spare")
    events = read_events(strict.run_dir("spare"))
    stops, backs = ([e["step"] for e in events if e["event"] == name] for name in ("stop_requested", "resumed"))
    assert stops == backs and len(stops) == 2 and strict.log("spare").count("no successor: ") == 2, strict.log("spare")


@pytest.mark.parametrize("via", drawn("cancelled, via", ["submitit", "sbatch"], 1))
def test_a_training_that_is_cancelled_takes_its_chain_along(strict: Site, via: str) -> None:
    name = f"cancelled-{via}"
    inside = ["--profile", str(strict.bed.workdir / "contained.yaml")] if via == "sbatch" else []
    words = [*inside, "train.total_steps=100000", "--gpus-per-node", "0", "--exclude", "n1"]
    train, *later = strict.submit(name, *words, "--then", "sample,evaluate", "--via", via)
    strict.wait_logged(name, 1)
    strict.bed.cancel(train)
    for job in (train, *later):
        assert strict.bed.wait_state(job, timeout_s=60) == "CANCELLED", strict.log(name)
    (told,) = (e for e in read_events(strict.run_dir(name)) if e["event"] == "cancelled")
    assert (told["stage"], told["with_it"]) == ("train", later)


@pytest.fixture
def second(strict: Site) -> Iterator[SlurmTestbed]:
    """Another cluster behind the same slurmdbd, which the strict one's login node reaches by -M."""
    bed = SlurmTestbed(PROJECT, sys.executable, NODES="2", CLUSTER="second", BESIDE=str(strict.bed.cluster))
    try:
        bed.start()
        yield bed
    finally:
        bed.stop()


@pytest.mark.long
def test_a_run_on_another_cluster_is_seen_and_stopped_from_the_login_and_put_back_without_accounting(
    strict: Site, second: SlurmTestbed
) -> None:
    """Its first jobs have ids that the login's own cluster has given to others, long ago."""
    there = replace(strict, exported={"SLURM_CLUSTERS": "second"})
    asked = ["--gpus-per-node", "0", "train.total_steps=100000", "--tasks", "1", "--then", "sample,evaluate"]
    jobs = there.submit("away", *asked, "--via", "sbatch")
    assert jobs == ["1", "2", "3"] and second.squeue("-j", "1").split()[0] == "1"
    strict.wait_logged("away", 1)
    strict.bed.admin(["pkill", "-STOP", "-F", str(strict.bed.cluster / "slurmdbd.pid")])  # as from a node's network
    try:
        second.preempt(second.node_of("1") or "", 1)
        second.wait_for(lambda: second.restart_count("1") == 1 and second.job_state("1") == "RUNNING", 90, "its return")
    finally:
        strict.bed.admin(["pkill", "-CONT", "-F", str(strict.bed.cluster / "slurmdbd.pid")])
    said = strict.script("submit", "--partition", "gpu", "--name", "away", f"data.path={strict.images}", *SMALL, code=2)
    assert "queue of cluster second as job 1" in said
    (row,) = json.loads(strict.script("status", "away", "--json"))
    assert (row["state"], row["cluster"], row["jobs"]["2"]) == ("running", "second", "PENDING")
    said = strict.script("cancel", "away")
    assert "told to save and leave: job 1 of cluster second" in said and second.squeue() == ""
