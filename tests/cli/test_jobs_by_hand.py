"""`python -m launch.jobs` as a person may start it: in a terminal that closes, under limits, on damaged files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.cli.harness import Shell, events, read, wait_for

LONG = "train.total_steps=1000000"


def started(shell: Shell, run: Path, **options: Any) -> subprocess.Popen[str]:
    """Training in the foreground, at work."""
    argv, usual = shell.command("jobs", "train", str(run))
    job = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **{**usual, **options})
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), "a step")
    return job


def test_a_terminal_that_closes_ends_a_job_with_a_save(shell: Shell) -> None:
    shell.submit("--prepare", LONG)
    run = shell.root / "tiny"
    job = started(shell, run)
    for _ in range(2):  # the shell says so, and the kernel
        job.send_signal(signal.SIGHUP)
    assert job.wait(60) == 75, job.communicate()
    last = events(run)[-2:]
    assert [e["event"] for e in last] == ["stop_requested", "checkpoint"] and last[0]["reason"] == "interrupted"
    assert last[1]["step"] > 0 and (run / "checkpoints" / f"step-{last[1]['step']:09d}.json").exists()


def test_under_nohup_a_job_goes_on(shell: Shell) -> None:
    shell.submit("--prepare", LONG)
    run = shell.root / "tiny"
    job = started(shell, run, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    job.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75


def test_what_was_to_follow_a_training_that_stop_ended_does_not_fail(again: Shell) -> None:
    run = again.root / "tiny"
    (run / "checkpoints" / "step-000000400.json").unlink()  # as if it had ended at 200
    (run / "STOP").touch()
    for job in (["sample", str(run), "new", "--shards", "0-1"], ["evaluate", str(run), "new"]):
        done = again("jobs", *job)
        assert done.returncode == 0 and f"{run}/STOP ends this too" in done.stdout, done.stdout + done.stderr
    assert not [e for e in events(run) if e["event"] == "failed"] and not (run / "samples" / "new").exists()


def limited(shell: Shell, kind: int, most: int, script: str, *args: str, user: int | None = None) -> str:
    """What a command says that fails for its limit, in a line."""
    argv, options = shell.command(script, *args)
    options["preexec_fn"] = lambda: (user and os.setuid(user), resource.setrlimit(kind, (most, most)))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_a_limit_of_the_shell_is_named(shell: Shell) -> None:
    shell.submit("--prepare")
    run = str(shell.root / "tiny")
    memory = 1_500_000 * 1024
    assert "1500000 KiB of memory (ulimit -v)" in limited(shell, resource.RLIMIT_AS, memory, "jobs", "train", run)
    assert "1500000 KiB of memory (ulimit -v)" in limited(
        shell, resource.RLIMIT_AS, memory, "submit", "tiny.yaml", "--cluster", "local", "--wait"
    )
    said = limited(shell, resource.RLIMIT_FSIZE, 100 * 1024, "submit", "tiny.yaml", "--cluster", "local", "--wait")
    assert "warning: this shell allows a process 100 KiB of a file (ulimit -f): raise it" in said
    assert "failed: a checkpoint has " in said and "step=" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can be another user, whom the limit binds")
def test_a_limit_of_processes_is_named(shell: Shell) -> None:
    shell.submit("--prepare")
    for path in [shell.root, *shell.root.rglob("*")]:
        path.chmod(0o777)
    for path in shell.root.parents:  # pytest's own folders are closed to others
        if path.name.startswith(("pytest-", "test_")):
            path.chmod(0o755)
    said = limited(shell, resource.RLIMIT_NPROC, 1, "jobs", "train", str(shell.root / "tiny"), user=65534)
    assert "1 processes and threads (ulimit -u)" in said


BUSY = {
    "from launch.terminal import console\nconsole.run_script(lambda: [0 for _ in iter(int, 1)])": (3, "error: "),
    "from launch.life.preemption import StopFlag\nstop = StopFlag()\nstop.install()\nwhile not stop(): pass\n"
    "assert stop() == 'interrupted'": (0, "Z "),
}


@pytest.mark.parametrize("busy", BUSY, ids=["a script ends", "a job is told to save"])
def test_what_has_used_the_cpu_time_of_its_shell_says_so(shell: Shell, busy: str) -> None:
    code, before = BUSY[busy]
    options = shell.command("jobs")[1] | {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_CPU, (4, 4))}
    done = subprocess.run([sys.executable, "-c", busy], capture_output=True, text=True, timeout=240, **options)
    said = f"{before}this shell allows a process 4 s of CPU time (ulimit -t): raise it, or do this in a job"
    assert done.returncode == code and said in done.stdout + done.stderr, done.stdout + done.stderr


# ---------------------------------------------------------------- damage


def no_folder(name: str) -> Callable[[Path], Any]:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return change


def no_file(name: str) -> Callable[[Path], Any]:
    def change(run: Path) -> None:
        shutil.rmtree(run / name)
        (run / name).touch()

    return change


def lines(run: Path) -> None:
    for path in [*(run / "events").iterdir(), run / "metrics.jsonl"]:
        with path.open("a") as f:
            f.write('{"event": 7}\n\0\n')


LIVED_WITH: dict[str, tuple[Callable[[Path], Any], str]] = {
    "heartbeat": (no_folder("heartbeat.json"), "heartbeat not written"),
    "tb": (no_file("tb"), "tensorboard not written"),
    "grids": (no_file("grids"), "grid not written"),
    "lines": (lines, "cannot be used"),
}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{name: (no_folder(name), f"{name} is a directory, where") for name in ("metrics.jsonl", "lock")},
    "run.json": (no_folder("run.json"), "Is a directory: .*run.json"),
    **{name: (no_file(name), f"Not a directory: .*{name}") for name in ("events", "checkpoints")},
    "config": (lambda run: (run / "config.yaml").write_text(""), r"config\.yaml is empty: restore it"),
    "lr": (
        lambda run: (run / "config.yaml").write_text(
            (run / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.01")
        ),
        r"config\.yaml was changed: .* restore the file, or move it away \(mv .*\), and submit .* anew: python ",
    ),
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A run that has 60 of its 80 steps."""
    shell = Shell(tmp_path_factory.mktemp("half"))
    done = shell.submit("--wait", "train.total_steps=60")
    assert done.returncode == 0, done.stderr
    config = shell.root / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace("total_steps: 60", "total_steps: 80"))
    return shell


@pytest.fixture
def damaged(half: Shell, shell: Shell) -> Shell:
    shutil.copytree(half.root, shell.root)
    return shell


def train(shell: Shell) -> subprocess.CompletedProcess[str]:
    return shell("jobs", "train", str(shell.root / "tiny"))


@pytest.mark.parametrize("what", LIVED_WITH)
def test_training_lives_with_it_and_says_so_once(damaged: Shell, what: str) -> None:
    damage, told = LIVED_WITH[what]
    damage(damaged.root / "tiny")
    done = train(damaged)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(damaged.root / "tiny" / "checkpoints" / "step-000000080.json")["step"] == 80
    said = [line for line in done.stdout.splitlines() if told in line]
    assert 1 <= len(said) <= 3 and len(set(said)) == len(said), said
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("what", REFUSED)
def test_training_refuses_it_in_a_sentence(damaged: Shell, what: str) -> None:
    damage, told = REFUSED[what]
    run = damaged.root / "tiny"
    damage(run)
    kept = {p: p.read_bytes() for d in ("checkpoints", "tb") for p in (run / d).glob("*")}
    done = train(damaged)
    (said,) = [line for line in done.stdout.splitlines() if "failed: " in line]
    assert done.returncode == 78 and re.search(told, said), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_a_changed_config_is_refused_before_there_is_a_checkpoint_by_every_script(shell: Shell) -> None:
    shell.submit("--prepare")
    REFUSED["lr"][0](shell.root / "tiny")
    assert train(shell).returncode == 78
    for script, *args in (("submit", "tiny.yaml"), ("submit", "tiny.yaml", "train.lr=0.01"), ("sample", "tiny")):
        assert "config.yaml was changed" in shell.refused(script, *args, "--cluster", "local")
    assert "config.yaml was changed" in shell("evaluate", "tiny").stderr


def test_training_needs_no_standard_streams(damaged: Shell) -> None:
    argv, options = damaged.command("jobs", "train", str(damaged.root / "tiny"))
    line = " ".join(f"'{word}'" for word in argv)
    done = subprocess.run(["/bin/sh", "-c", f"exec {line} >&- 2>&- <&-"], timeout=240, **options)
    assert done.returncode == 0
    assert (damaged.root / "tiny" / "checkpoints" / "step-000000080.json").exists()
    assert all(
        b"loss=" not in p.read_bytes()
        for p in (damaged.root / "tiny").rglob("*")
        if p.parent.name != "logs" and p.is_file()
    )


def test_a_full_disk_ends_a_job_with_a_sentence(damaged: Shell) -> None:
    argv, options = damaged.command("jobs", "train", str(damaged.root / "tiny"))
    options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 1 and f"failed: File too large: {damaged.root / 'tiny'}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_of_a_job_with_several_ranks_each_makes_its_share_of_the_shards_and_none_speaks_for_the_others(
    again: Shell,
) -> None:
    again("sample", "tiny", "--set", "two", "--shards", "3", "--num-samples", "12", "--prepare")
    run = again.root / "tiny"
    for rank, made in (("1", {1}), ("0", {0, 1, 2})):
        argv, options = again.command("jobs", "sample", str(run), "two", "--shards", "0-2")
        ranks = {"SLURM_JOB_ID": "17", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        env = options["env"] | {**ranks, "SLURM_STEP_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "1"}
        done = forked.run(argv, options["cwd"], env, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        there = {int(p.name.split("-")[1]) for p in (run / "samples" / "two").glob("shard-*.npz")}
        assert there == made and not list((run / "logs").glob(".exit*"))
    assert (run / "logs" / ".shard-17").read_text() == "0-2"
