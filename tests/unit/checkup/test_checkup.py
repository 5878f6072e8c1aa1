"""What doctor.py finds, where no cluster is needed to tell."""

import errno
import itertools
import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from ddpm.config.data import Data
from ddpm.config.sample import Evaluate, Sample
from ddpm.config.schema import Config
from ddpm.config.section import build
from ddpm.config.train import Checkpoint, Train
from launch.checkup import cluster, files, node, node_report, profile
from launch.checkup.finding import Finding
from launch.cluster import environment, inquiry, scheduler, slurm
from launch.cluster.environment import PROJECT
from launch.cluster.job import Job
from launch.cluster.options import load_profile
from launch.cluster.partitions import Partition
from launch.cluster.site import Site


def test_how_many_jobs_a_user_may_have_and_how_many_of_them_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"format=MaxSubmitJobs": "\n10\n", "format=MaxSubmitJobsPU": "\n", "format=MaxJobs": "\n2\n",
            "format=MaxJobsPU": "4\n"}  # fmt: skip
    monkeypatch.setattr(slurm, "run", lambda argv, **_: told.get(argv[-1], ""))
    said = [finding.what for finding in cluster._limits(Site(time="1h"), {}, {})]
    assert "you may have 10 jobs in the queue" in said
    assert "of your jobs, or tasks of arrays, at most 2 run at a time: others wait" in said
    told.clear()
    assert not any("jobs" in finding.what for finding in cluster._limits(Site(time="1h"), {}, {}))


def test_the_space_of_a_run_is_that_of_its_end() -> None:
    kept = Checkpoint(keep_last=2, milestone_every_steps=25, milestone_every_epochs=None)
    train, sample = Train(total_epochs=4, global_batch=10), Sample(num_samples=7, shards=1)
    config = Config(name="x", train=train, checkpoint=kept, sample=sample, data=Data(image_size=16))
    samples, num = 7 * 16 * 16 * 3, config.network.num_parameters
    assert files.space_of_a_run(config, 250) == ((4 + 2) * 16 * num + (4 + 1) * 4 * num + samples, 4)
    assert files.space_of_a_run(config, None) == (2 * 16 * num + 4 * num + samples, 0)


@pytest.mark.parametrize("extractor", ["inception", "dinov2"])
def test_weights_that_scores_need_are_there_or_fetched_or_brought_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extractor: str
) -> None:
    config = Config(name="x", data=Data(name="digits"), evaluate=Evaluate(extractor=extractor))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def told(unreachable: Exception | None) -> files.Finding:
        monkeypatch.setattr(socket, "create_connection", Mock(side_effect=unreachable))
        return list(files.storage(config, tmp_path, tmp_path / "cache", None))[-1]

    lacking = told(TimeoutError())
    assert lacking.verdict == "warn" and f"prefetch.py --from {files.FETCHED[extractor]}" in lacking.remedy
    assert (told(None).verdict == "pass") == (extractor == "inception")  # a submission fetches those alone
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "cache" / "weights" / files.FETCHED[extractor]).touch()
    assert told(TimeoutError()) == files.Finding(
        "pass", f"{extractor.capitalize()}'s weights are in {tmp_path / 'cache' / 'weights'}"
    )


def test_a_root_without_room_for_a_file_is_none_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    (found,) = files.storage(Config(name="x"), tmp_path, tmp_path, None)
    assert found.verdict == "fail" and "cannot be written (No space left on device)" in found.what


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """What is found by a job that told so of its node."""

    def found(told: dict[str, object], site: Site) -> list[Finding]:
        def answer(job: Job, home: dict[str, str], script: Path, asked: Path, log: Path) -> str:
            seen = json.loads(asked.read_text())
            asked.with_suffix(".node.json").write_text(json.dumps({"sees": seen, "time": time.time(), **told}))
            return "17"

        monkeypatch.setattr(node, "settle", lambda site, dry_run: site)
        monkeypatch.setattr(inquiry, "submit_probe", answer)
        return list(node.probe(site, tmp_path, patience_s=60))

    return found


@pytest.mark.parametrize(("cuda", "remedy"), [("13.0", "nvidia-smi on n1"), (None, "TORCH=default tools/env.sh")])
def test_a_node_without_a_gpu_is_told_from_a_torch_without_cuda(
    probe: Callable[..., list[Finding]], cuda: str | None, remedy: str
) -> None:
    told = {"host": "n1", "lacks": [], "gpus": 0, "cuda": cuda, "torch": "2.11.0"}
    last = probe({**told, "python": "3.12.1", "cpus": 4, "tmp_bytes": 1 << 30}, Site(gpus_per_node=2))[-1]
    assert last.verdict == "fail" and remedy in last.remedy and "--gpus-per-node 2" in last.remedy


@pytest.mark.parametrize(("error", "remedy"), [
    ("CUDA error: no kernel image is available for execution on the device", "torch 2.11.0 (CUDA 13.0) is for others"),
    ("RuntimeError: CUDA error: unknown error", "is its driver too old"),
])  # fmt: skip
def test_a_gpu_that_is_too_old_for_torch_is_told_from_a_driver_that_is(
    probe: Callable[..., list[Finding]], error: str, remedy: str
) -> None:
    told = {"host": "n1", "lacks": [], "gpu": "Tesla V100", "cuda": "13.0", "torch": "2.11.0"}
    last = probe({**told, "torch_error": f"{error}\nFor debugging consider"}, Site())[-1]
    assert last.what == f"torch on n1, on a Tesla V100: {error}" and last.remedy.startswith(remedy)


def test_a_drafted_profile_has_what_is_known_and_times_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "settle", lambda site, dry_run: site)
    monkeypatch.setattr(scheduler, "partitions", lambda: {"gpu": Partition("gpu", 1, True, time_limit="1-00:00:00")})
    monkeypatch.setattr(inquiry, "accounts", list)
    drafted = profile.draft(Site(partition="gpu", gpus_per_node=1))
    assert "time: 4h " in drafted and "account" not in drafted and "partition: gpu\n" in drafted
    monkeypatch.setattr(inquiry, "accounts", lambda: ["a", "b"])
    assert "# account: one of a, b\n" in profile.draft(Site(partition="gpu", gpus_per_node=1))


@pytest.mark.parametrize("more", [
    {}, {"sbatch": {"reservation": "kürs"}, "setup": ["module load cuda"], "sample": {"time": "1h", "qos": "short"}},
])  # fmt: skip
def test_a_drafted_profile_keeps_what_the_checks_were_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, object]
) -> None:
    monkeypatch.setattr(profile, "settle", lambda site, dry_run: site.model_copy(update={"gpus_per_node": "a100:1"}))
    monkeypatch.setattr(scheduler, "partitions", lambda: {"gpu": Partition("gpu", 1, True, time_limit="1-00:00:00")})
    monkeypatch.setattr(inquiry, "accounts", lambda: ["a", "b"])
    options = {"account": "b", "qos": "student", "constraint": "a100|h100", "time": "90m", "mem_per_cpu": "4G"}
    asked = build(Site, {"partition": "gpu", **options, **more}, "options")
    (tmp_path / "drafted.yaml").write_text(profile.draft(asked), encoding="utf-8")
    drafted = load_profile(str(tmp_path / "drafted.yaml"))
    assert build(Site, drafted, "profile") == asked.model_copy(update={"gpus_per_node": "a100:1"})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SLURM that would take every job, with one partition."""
    monkeypatch.setattr(cluster, "settle", lambda site, dry_run: site)
    monkeypatch.setattr(scheduler, "available", lambda name: True)
    monkeypatch.setattr(scheduler, "cluster_name", lambda: "lab")
    monkeypatch.setattr(scheduler, "partitions", lambda: {"gpu": Partition("gpu", 2, True)})
    monkeypatch.setattr(scheduler, "fitting", lambda job: job)
    monkeypatch.setattr(inquiry, "version", lambda: "slurm 24.11.5")
    monkeypatch.setattr(inquiry, "try_out", lambda job: None)
    monkeypatch.setattr(inquiry, "settings", lambda *keys: {})
    monkeypatch.setattr(inquiry, "of_partition", lambda name: {})
    monkeypatch.setattr(inquiry, "most_submitted", lambda qos: None)


def found(site: Site) -> list[Finding]:
    return list(cluster.cluster(site, Path("/nowhere"), 1))


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(("size", "told"), [(1001, "1001 tasks"), (8, "8 tasks"), (1, "off")])
def test_the_most_tasks_of_an_array_are_told_as_a_submission_takes_them(
    monkeypatch: pytest.MonkeyPatch, size: int, told: str
) -> None:
    monkeypatch.setattr(inquiry, "settings", lambda *keys: {"MaxArraySize": str(size)})
    assert told in next(f.what for f in found(Site(time="1h")) if "arrays " in f.what)


@pytest.mark.usefixtures("asked")
def test_a_full_queue_is_no_reason_to_change_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def remedies(words: str) -> set[str]:
        monkeypatch.setattr(inquiry, "try_out", Mock(side_effect=scheduler.SchedulerError(words)))
        return {f.remedy for f in found(Site(gpus_per_node=1)) if f.verdict == "fail"}

    (wait,) = remedies("sbatch: error: QOSMaxSubmitJobPerUserLimit\n  error: Job violates accounting/QOS policy")
    assert "squeue --me" in wait and "--partition" not in wait
    (change,) = remedies("sbatch: error: Job violates accounting/QOS policy")
    assert "--constraint" in change


@pytest.mark.parametrize(("setup", "told"), [
    ("modul load x", ["modul: command not found", "setup failed on n1 (exit code 127): modul load x"]),
    ("exit 3", ["setup failed on n1: it ended the shell (exit code 3), at the line: exit 3"]),
    ("return 0", ["setup failed on n1: it ended the shell (exit code 1), at the line: return 0"]),
])  # fmt: skip
def test_a_setup_line_that_would_end_a_job_ends_the_probe_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: str, told: list[str]
) -> None:
    def run_here(job: Job, home: dict[str, str], script: Path, asked: Path, log: Path) -> str:
        env = {"DDPM_HOME": str(PROJECT), "DDPM_PYTHON": "echo", "PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "n1"}
        with log.open("w") as out:
            done = subprocess.run(["bash", str(script), str(asked)], env=env, stdout=out, stderr=out)
        assert done.returncode != 0
        return "17"

    monkeypatch.setattr(node, "settle", lambda site, dry_run: site)
    monkeypatch.setattr(inquiry, "submit_probe", run_here)
    monkeypatch.setattr(scheduler, "look_up", lambda jobs: {})
    monkeypatch.setattr(node, "POLL_S", 0)
    (found,) = node.probe(Site(setup=("export A=1", setup)), tmp_path, patience_s=60)
    assert found.verdict == "fail" and all(line in found.what for line in told) and "`setup`" in found.remedy


def test_a_probe_that_could_not_even_begin_a_log_asks_whether_nodes_see_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "settle", lambda site, dry_run: site)
    monkeypatch.setattr(inquiry, "submit_probe", lambda *of_it: "17")
    monkeypatch.setattr(scheduler, "look_up", lambda jobs: {})
    monkeypatch.setattr(node, "POLL_S", 0)
    (found,) = node.probe(Site(), tmp_path, patience_s=60)
    assert found.verdict == "fail" and f"do nodes see {tmp_path}?" in found.remedy


@pytest.mark.parametrize(("version", "verdict"), [
    ("slurm-wlm 20.11.4", "pass"), ("slurm 24.05.0-0rc1", "pass"), ("slurm 20.02.7", "warn"), ("slurm 9.11.0", "warn")
])  # fmt: skip
def test_a_slurm_older_than_any_that_was_tried_is_told(
    monkeypatch: pytest.MonkeyPatch, version: str, verdict: str
) -> None:
    monkeypatch.setattr(scheduler, "available", lambda name: True)
    monkeypatch.setattr(scheduler, "cluster_name", lambda: "lab")
    monkeypatch.setattr(inquiry, "version", lambda: version)
    _, found, *_ = itertools.islice(cluster.cluster(Site(), Path("runs"), 1), 2)
    assert (found.verdict, found.what) == (verdict, f"SLURM answers: {version}, cluster lab")
    assert found.remedy.startswith("20.11 is the oldest") == (verdict == "warn")


@pytest.mark.usefixtures("asked")
def test_the_gpus_that_jobs_ask_for_are_told_from_those_that_a_node_has() -> None:
    def told(site: Site) -> str:
        return next(f.what for f in found(site) if f.what.startswith("partition "))

    whole = "partition gpu, the default: jobs ask for 1 GPU a node, of 2 that a node has (--gpus-per-node)"
    assert told(Site(gpus_per_node=1)) == whole
    assert told(Site(partition="gpu", gpus_per_node=2)) == "partition gpu: jobs ask for 2 GPUs a node"


def test_a_node_tells_of_itself_though_it_lacks_the_login_nodes_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # its import takes long
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "on-the-login-node"))
    assert node_report.report(tmp_path / "asked.json")["tmp_bytes"] > 0


def test_a_user_whom_this_machine_does_not_know_by_name_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(of: object) -> None:
        raise KeyError(of)

    for name in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, name, unknown)
    for variable in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "SSH_CONNECTION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, "create_connection", Mock())
    config = Config(name="x", data=Data(name="digits"))
    assert {finding.verdict for finding in files.storage(config, tmp_path, tmp_path / "cache", None)} == {"pass"}
    monkeypatch.setattr(slurm, "run", lambda argv, **_: argv[4])
    assert inquiry.accounts() == [f"user={os.getuid()}"]
    assert environment.ssh_words().startswith(f"{os.getuid()}@")
