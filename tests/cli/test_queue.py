"""What is at work, or in the queue, is not begun a second time, nor changed under. SLURM's commands are played here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm.config.reading import load
from ddpm.run.files import sign, write_json
from ddpm.run.paths import RunDir
from launch.queue.waiting import is_told_to_stop
from tests.cli.harness import TINY_SET, Shell, events, is_alive, png, read, snapshot, wait_for, write_zip

SLURM = ("--cluster", "slurm", "--partition", "gpu", "--via", "sbatch")


@pytest.fixture
def slurm(shell: Shell) -> Path:
    """SLURM gives each job the number 101 and has it PENDING. Returns a file with the words of each sbatch, a line."""
    log = shell.cwd / "sbatch.log"
    shell.put("sbatch", f'echo "$*" >> {log}; echo 101')
    shell.put("squeue", 'echo "101 101 PENDING"')
    shell.put("sinfo", 'echo "gpu|gpu:2"')
    shell.put("scontrol", 'echo "MaxArraySize = 1001"')
    return log


def submissions(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_a_run_that_is_at_work_on_this_machine_is_not_changed_under_it(shell: Shell) -> None:
    run = shell.root / "tiny"
    done = shell.submit("train.total_steps=1000000")
    pid = int(re.search(r"as pid (\d+)", done.stdout).group(1))  # type: ignore[union-attr]
    wait_for(lambda: any(e["event"] == "started" for e in events(run)), "the start of training")
    os.killpg(pid, signal.SIGSTOP)  # so that it neither writes nor hears of STOP meanwhile
    try:
        (run / "STOP").touch()
        for words in (["--cluster", "local"], ["--cluster", "local", "--prepare"]):
            said = shell.refused("submit", "tiny.yaml", "train.total_steps=2000000", *words)
            assert f"pid {pid}" in said and f"python launch/cancel.py {run}; nothing is lost" in said
    finally:
        os.killpg(pid, signal.SIGCONT)
    wait_for(lambda: not is_alive(pid), "the end of the job, which STOP asks for")
    assert "removed" in shell.submit("train.total_steps=2000000", "--prepare").stdout


def test_what_is_cancelled_here_is_saved_and_nothing_follows_and_what_is_at_work_is_not_removed(shell: Shell) -> None:
    run = shell.root / "tiny"
    done = shell.submit("train.total_steps=1000000", "--then", "sample,evaluate")
    pid = int(re.search(r"as pid (\d+)", done.stdout).group(1))  # type: ignore[union-attr]
    wait_for(lambda: any(e["event"] == "started" for e in events(run)), "the start of training")
    refused = shell("remove", "tiny", "--yes")
    assert refused.returncode == 2 and f"pid {pid} on this machine" in refused.stderr and run.exists()
    assert f"python launch/cancel.py {run}" in refused.stderr
    done = shell("cancel", "tiny")
    assert done.returncode == 0 and f"told to save and leave: pid {pid}" in done.stdout, done.stdout + done.stderr
    (saved,) = re.findall(r"run tiny is at step (\d+)", done.stdout)
    assert (
        not is_alive(pid) and (run / "checkpoints" / f"step-{int(saved):09d}.json").exists() and (run / "STOP").exists()
    )
    told = [e["event"] for e in events(run)]
    assert "stop_requested" in told and "failed" not in told
    assert '"state": "stopped"' in shell("status", "tiny", "--json").stdout


def test_a_sweep_here_runs_one_after_the_other_and_the_same_command_leaves_what_waits_and_follows_it(
    shell: Shell,
) -> None:
    swept = ["train.total_steps=20", "--sweep", "seed=1,2"]
    begun = shell.submit(*swept)
    first, second = re.findall(r"as pid (\d+)", begun.stdout)
    assert f"once pid {first} has ended" in begun.stdout, begun.stderr
    done = shell.submit(*swept, "--wait")
    assert done.returncode == 0 and f"or waits to be, as pid {second}" in done.stdout, done.stdout + done.stderr
    times = {(e["event"], n): e["time"] for n in "12" for e in events(shell.root / f"tiny-seed_{n}")}
    assert times["finished", "1"] <= times["started", "2"]
    assert re.search(r"^run +seed +step +mean loss\ntiny-seed_. +. +20/20", done.stdout, re.M)
    again = shell.submit(*swept, "log.every_steps=7")
    assert again.stderr.count("not kept, since nothing of the run is left to be made: log.every_steps\n") == 2


def test_a_stopped_run_is_scored_and_stays_stopped(finished: Shell, again: Shell) -> None:
    """Only training submissions lift STOP; whatever else is at work, and one that comes later ends a score too."""
    run = again.root / "tiny"
    (run / "STOP").touch()
    before = (run / "STOP").stat().st_mtime_ns
    shutil.rmtree(run / "eval")
    done = again("evaluate", "tiny", "--set", TINY_SET, "--cluster", "local")
    assert done.returncode == 0 and json.loads(done.stdout)["num_samples"] == 25, done.stdout + done.stderr
    assert (run / "STOP").stat().st_mtime_ns == before and "STOP" not in done.stdout + done.stderr
    (score,) = [e for e in events(run) if e["event"] == "submitted" and "despite" in e]
    assert not is_told_to_stop(RunDir(run), score["job"])
    RunDir(run).renew_stop()
    assert is_told_to_stop(RunDir(run), score["job"])


def test_a_queued_job_that_a_stop_file_will_end_is_not_said_to_be_queued_and_no_more(shell: Shell, slurm: Path) -> None:
    stop = shell.root / "tiny" / "STOP"
    done = shell("submit", "tiny.yaml", *SLURM)
    assert done.returncode == 0 and "queued: train as job 101" in done.stdout and "STOP" not in done.stdout
    assert str(stop) not in shell("submit", "tiny.yaml", *SLURM).stdout
    stop.touch()
    done = shell("submit", "tiny.yaml", *SLURM)
    assert done.returncode == 0 and "in the queue already: train as job 101" in done.stdout and done.stderr == ""
    assert str(stop) in done.stdout and stop.exists() and len(submissions(slurm)) == 1
    done = shell("submit", "tiny.yaml", *SLURM, "--account", "other", "--time", "150")
    told = (
        "stays as it was submitted: account is not given there and other here; time is not given there and 2h30m here. "
    )
    assert done.returncode == 0 and told in done.stderr, done.stderr


def test_cancelling_takes_what_waits_out_of_the_queue_and_has_what_runs_save(shell: Shell, slurm: Path) -> None:
    shell("submit", "tiny.yaml", *SLURM)
    run, told, gone = shell.root / "tiny", shell.cwd / "scancel.log", shell.cwd / "gone"
    more = {"event": "submitted", "time": "2099-01-01T00:00:00.000Z", "job": "102", "restart": 0, "stage": "sample"}
    (run / "events" / "submit-102.0.jsonl").write_text(json.dumps(more) + "\n")
    shell.put("squeue", f"test -e {gone} || printf '101 101 RUNNING\\n102 102_[0-3] PENDING\\n'")
    shell.put("scancel", f'test -e {run}/STOP && echo "$*" >> {told}; case $* in *102) : > {gone};; esac')
    done = shell("cancel", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "told to save and leave: job 101\ncancelled: job 102\n" in done.stdout
    assert told.read_text().splitlines() == ["--state=PENDING 101 102"]
    twice = shell("cancel", "tiny", "../runs/tiny").stdout
    assert twice == "run tiny: nothing of it is queued or at work\n"


def test_milestones_that_training_asks_for_are_not_queued_behind_a_cancel_that_looked_before(
    again: Shell, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.life import training  # loads torch

    run = RunDir(again.root / "tiny")
    asked = {"cluster": "slurm", "partition": "gpu", "via": "sbatch"}
    write_json(run.run_json, sign({**read(run.run_json), "launch": asked}), replace=True)
    monkeypatch.setenv("PATH", str(again.bin))
    life: Any = SimpleNamespace(run=run, env=SimpleNamespace(is_scheduled=True))
    config = load(run.config, ["evaluate.milestones={num_samples: 25}"])

    def ended() -> int:
        process = training.score_milestones(life, config)
        assert process is not None
        run.renew_stop()  # while it looks
        return process.wait(60)

    assert ended() == 0 and submissions(slurm) == [] and "STOP" in (run.logs / "milestones.out").read_text()
    done = again("evaluate", "tiny", "--all-milestones")  # by hand, as whoever has stopped a run scores it
    assert done.returncode == 0 and len(submissions(slurm)) == 2, done.stdout + done.stderr


def test_what_waits_in_the_queue_is_not_removed(shell: Shell, slurm: Path) -> None:
    shell("submit", "tiny.yaml", *SLURM)
    assert "job 101 (pending)" in shell.refused("remove", "tiny", "--yes")
    shell.put("squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    told = shell.refused("remove", "tiny", "--yes", code=3)
    assert "cannot tell whether run tiny is at work while SLURM does not answer: is this the login node" in told
    assert (shell.root / "tiny").exists()


def test_samples_that_are_in_the_queue_are_said_to_be_where_a_score_is_asked_for(shell: Shell, slurm: Path) -> None:
    shell("submit", "tiny.yaml", *SLURM, "--then", "sample,evaluate")
    told = shell("evaluate", "tiny").stderr
    assert told == f"error: run tiny has no samples yet; they are in the queue: {TINY_SET} as job 101\n"
    shell.put("squeue", "exit 0")
    assert "has no samples yet: python launch/sample.py" in shell("evaluate", "tiny").stderr


def test_png_files_that_wait_for_shards_are_said_to_with_the_command_that_makes_them(again: Shell, slurm: Path) -> None:
    made = f"python launch/sample.py {again.root}/tiny --set cats --png makes them, once the shards are done"
    for how in (["--prepare"], [], []):
        done = again("sample", "tiny", "--set", "cats", "--shards", "1", "--png", *how, *SLURM)
        assert done.returncode == 0 and f"no PNG files yet: {made}" in done.stdout, done.stdout + done.stderr
    assert "PNG" not in again("sample", "tiny", "--set", "cats", *SLURM).stdout


def test_a_set_with_eta_is_another_set_than_the_one_without(again: Shell) -> None:
    samples = again.root / "tiny" / "samples"
    before = snapshot(samples / TINY_SET)
    done = again.submit("sample.eta=1", "--then", "sample", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in samples.iterdir()} == {TINY_SET, "ddim4-eta1-step400-seed0"}
    assert snapshot(samples / TINY_SET) == before
    assert read(samples / "ddim4-eta1-step400-seed0" / "request.json")["eta"] == 1
    assert "0 of 2 shards" in again("sample", "tiny", "--eta", "1", "--prepare").stdout


def test_a_set_with_eta_that_was_begun_under_the_name_of_one_without_goes_on_under_it(again: Shell) -> None:
    words = ["tiny", "--eta", "0.5", "--step", "200", "--prepare"]
    assert again("sample", *words, "--set", "ddim4-step200-seed0").returncode == 0
    assert "/samples/ddim4-step200-seed0: 2 of 2" in again("sample", *words).stdout
    assert not list(again.root.glob("tiny/samples/*eta*"))


def test_a_score_that_waits_in_the_queue_is_not_queued_a_second_time(again: Shell, slurm: Path) -> None:
    write_zip(again.cwd / "other.zip", {f"{i}.png": png(8, i) for i in range(3)})
    shutil.rmtree(again.root / "tiny" / "eval")
    done = again("evaluate", "tiny", *SLURM)
    assert done.returncode == 0 and "queued: evaluate as job 101" in done.stdout, done.stderr
    done = again("evaluate", "tiny", *SLURM, "--reference", "train")
    assert done.returncode == 0 and "in the queue already, as job 101" in done.stdout, done.stderr
    assert len(submissions(slurm)) == 1
    assert "queued: evaluate" in again("evaluate", "tiny", *SLURM, "--reference", "other.zip").stdout
    assert len(submissions(slurm)) == 2


@pytest.mark.parametrize("size", [0, 1])
def test_where_slurm_has_no_arrays_one_job_makes_all_shards(again: Shell, slurm: Path, size: int) -> None:
    again.put("scontrol", f'echo "MaxArraySize = {size}"')
    done = again("sample", "tiny", "--set", "many", "--shards", "3", *SLURM)
    assert done.returncode == 0, done.stderr
    (sent,) = submissions(slurm)
    assert sent.split()[-3:] == ["many", "--shards", "0-2"] and "--array" not in sent and "%a" not in sent


def test_no_more_tasks_are_queued_than_a_score_or_its_statistics_have_parts(again: Shell, slurm: Path) -> None:
    asked = again("evaluate", "tiny", *SLURM, "--save-stats", "train.npz", "--tasks", "500", "--dry-run", "--verbose")
    assert asked.returncode == 0 and "array" not in asked.stdout, asked.stdout + asked.stderr  # 1,797 images: one part
    asked = again("evaluate", "tiny", *SLURM, "--tasks", "500", "--dry-run", "--verbose")
    assert asked.returncode == 0 and "--array=0-1" in asked.stdout, asked.stdout + asked.stderr  # two shards


def test_a_set_whose_job_is_refused_does_not_forbid_the_next_try(again: Shell, slurm: Path) -> None:
    words = ["tiny", "--set", "later", *SLURM]
    again.put("sbatch", 'echo "sbatch: error: lua: ask for a type" >&2; echo "sbatch: error: Unspecified" >&2; exit 1')
    done = again("sample", *words, "--shards", "3")
    assert done.returncode == 2 and "lua: ask for a type" in done.stderr and "Unspecified" in done.stderr
    again.put("sbatch", "echo 101")
    done = again("sample", *words, "--shards", "2")
    assert done.returncode == 0 and "queued: later as job 101" in done.stdout, done.stderr


def test_of_three_submissions_at_once_one_queues_and_the_others_say_what_it_queued(shell: Shell) -> None:
    log = shell.cwd / "sbatch.log"
    shell.put("sbatch", f"/bin/sleep 0.5; echo x >> {log}; /usr/bin/wc -l < {log}")
    shell.put(
        "squeue", f"[ ! -f {log} ] || for n in $(/usr/bin/seq $(/usr/bin/wc -l < {log})); do echo $n $n PENDING; done"
    )
    shell.put("sinfo", 'echo "gpu|gpu:2"')
    shell.put("scontrol", 'echo "MaxArraySize = 1001"')
    argv, options = shell.command("submit", "tiny.yaml", *SLURM)
    three = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in three]
    assert [process.returncode for process in three] == [0, 0, 0], said
    assert len(submissions(log)) == 1
    told = sorted(re.findall(r"^(.*): train as job (\d+)", out, re.M)[0] for out, _ in said)
    assert told == [("in the queue already", "1")] * 2 + [("queued", "1")]
