"""launch/sweep.py: points from words, named by what differs; all queued, or told which are not, and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.data import array_file
from ddpm.errors import RequestError
from ddpm.run.events import EventLog
from ddpm.run.files import read_json
from ddpm.run.paths import NAME_RE, RunDir
from launch import submit, sweep
from launch.beginning import Here
from launch.cluster import environment, scheduler, slurm, slurm_questions
from launch.queue.naming import of_point, of_sweep
from launch.submission import Asked
from tests.cli.harness import TINY
from tests.unit.queue.test_submitting import TOO_MANY, Cluster


def read(more: list[str]) -> Config:
    return reading.of_text(TINY, Path("tiny.yaml"), more)


def names(*words: str, given: tuple[str, ...] = ()) -> list[str]:
    return [config.name for config, _ in sweep.configs([*words], [*given], read)]


def test_a_sweep_is_every_combination_named_by_what_differs_and_a_list_is_one_value() -> None:
    found = sweep.configs(["train.lr=1e-3, 2e-3", "model.channel_mults=[1],[1,2]", "seed=7"], [], read)
    assert [config.name for config, _ in found] == [
        "tiny-lr_1e-3-channel_mults_1-seed_7", "tiny-lr_1e-3-channel_mults_1-2-seed_7",
        "tiny-lr_2e-3-channel_mults_1-seed_7", "tiny-lr_2e-3-channel_mults_1-2-seed_7",
    ]  # fmt: skip
    config, record = found[-1]
    assert (config.train.lr, config.model.channel_mults, config.seed) == (2e-3, (1, 2), 7)
    assert record == {
        "name": "tiny-lr-channel_mults-seed", "values": {"train.lr": 2e-3, "model.channel_mults": [1, 2], "seed": 7}
    }  # fmt: skip


def test_names_tell_keys_of_one_last_word_apart_and_are_never_too_long() -> None:
    assert of_sweep("a", ["sample.steps", "data.name"]) == "a-steps-name"
    assert of_point("a", {"sample.batch": "1", "sample.seed": "2", "seed": "3"}) == "a-batch_1-sample.seed_2-seed_3"
    far = [of_point("a", {"data.path": "x" * 300 + end}) for end in "12"]
    assert len({*far}) == 2 and all(NAME_RE.fullmatch(name) for name in far)


@pytest.mark.parametrize(("words", "given", "told"), [
    (["train.lr=1e-3,0.001"], (), "train.lr=1e-3 and train.lr=0.001 are the same run"),
    (["data.path=/a b,/a-b"], (), "would both be called tiny-path_a-b"),
    (["train.lr=1e-3,fast"], (), "at train.lr=fast: command line: train.lr = 'fast'"),
    (["train.lr=1,2]"], (), "not valid YAML"), (["train.lr=1] # ,2"], (), "not valid YAML"),
    (["train.lr=1,,2"], (), "an empty value"), (["train.lr=,"], (), "an empty value"),
    (["train.lr="], (), "no values"), (["train.lr"], (), "expected KEY=A,B"),
    (["train.lrr=1,2"], (), "did you mean 'train.lr'?"), (["name=a,b"], (), "named by what differs"),
    (["seed=1,2", "seed=3"], (), "swept twice"), (["seed=1,2"], ("seed=3",), "given besides"),
    (["seed=" + ",".join(map(str, range(1001)))], (), "1,001 runs; at most 1,000"),
    (["sample.shards=1,99"], (), "at sample.shards=99"),
])  # fmt: skip
def test_what_is_no_sweep_is_refused_in_words(words: list[str], given: tuple[str, ...], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        names(*words, given=given)
    assert told in str(caught.value)


# ---------------------------------------------------------------- into the queue


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    c = Cluster()
    monkeypatch.setattr(slurm, "run", c.run)
    monkeypatch.setattr(scheduler, "available", lambda command="sbatch": True)
    (tmp_path / "tiny.yaml").write_text(TINY)
    np.savez(tmp_path / "images.npz", images=np.arange(16 * 192, dtype=np.uint8).reshape(16, 8, 8, 3))
    words = ["data.name=images", f"data.path={tmp_path}/images.npz"]
    words += ["--partition", "gpu", "--via", "sbatch", "--root", str(tmp_path / "runs"), "--then", "sample,evaluate"]
    argv = ["submit.py", str(tmp_path / "tiny.yaml"), *words, "--sweep", "train.lr=1e-3,2e-3,4e-3"]
    monkeypatch.setattr(sys, "argv", argv)
    return c


def queued(cluster: Cluster) -> list[str]:
    words = (word.partition("=")[2] for command in cluster.of("sbatch") for word in command if "--job-name=" in word)
    return [word.removeprefix("tiny-lr_") for word in words]


def test_where_there_is_no_room_for_all_runs_it_is_told_which_are_queued_and_the_same_command_goes_on(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.room, cluster.otherwise = 2, TOO_MANY
    with pytest.raises(RequestError, match="QOSMaxSubmit") as caught:
        submit.main()
    assert "\nqueued: tiny-lr_1e-3, tiny-lr_2e-3\nnot queued: tiny-lr_4e-3\n" in str(caught.value)
    assert "without what follows training: tiny-lr_1e-3, tiny-lr_2e-3\n" in str(caught.value)
    runs = tmp_path / "runs"
    assert sorted(p.name for p in runs.iterdir() if p.name[0] != ".") == ["tiny-lr_1e-3", "tiny-lr_2e-3"]
    assert (read_json(runs / "tiny-lr_2e-3" / "run.json") or {})["sweep"]["name"] == "tiny-lr"
    before = len(queued(cluster))
    cluster.room, cluster.queue = 100, ["101 101 PENDING", "102 102 PENDING"]
    assert submit.main() == 0
    rest = [f"{lr}-{stage}" for lr in ("1e-3", "2e-3", "4e-3") for stage in ("sample", "evaluate")]
    assert queued(cluster)[before:] == ["4e-3-train", *rest]
    said = capsys.readouterr().out
    assert "in the queue already: train as job 101" in said and "status.py --compare tiny-lr --root" in said


def test_slurm_is_asked_once_for_all_runs_of_a_sweep_and_the_data_listed_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        array_file, "open_array", lambda path, of=array_file.open_array: opened.append(path) or of(path)
    )
    cluster.queue = [f"{job} {job} PENDING N/A Priority" for job in range(101, 110)]
    monkeypatch.setattr(slurm_questions, "FRESH_S", 3600.0)  # however slow this machine is
    for again in (False, True):
        assert submit.main() == 0
        asked = [" ".join(command) for command in cluster.commands if command[0] not in ("sbatch", "scancel")]
        about_jobs = [command for command in asked if command.startswith("squeue")]
        assert len(about_jobs) == (1 if again else 2)  # first of one, which may never start
        assert len({*asked}) == len(asked) and len(opened) == 1
        cluster.commands.clear()
        opened.clear()
    assert len(queued(cluster)) == 0


def test_a_run_of_a_sweep_that_would_never_start_is_taken_back_and_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.queue = ["101 101 PENDING N/A Priority", "102 102 PENDING N/A PartitionTimeLimit"]
    with pytest.raises(RequestError, match=r"at train.lr=0.002: SLURM took the first job, and would never start") as e:
        submit.main()
    assert "\nnot queued: tiny-lr_2e-3\n" in str(e.value)
    (cancelled,) = cluster.of("scancel")
    assert cancelled[:2] == ["scancel", "102"]


def test_runs_of_a_sweep_that_wait_alike_have_one_line(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.queue = [f"{job} {job} PENDING N/A AssocMaxJobsLimit" for job in range(101, 110)]
    assert submit.main() == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "AssocMaxJobsLimit" in line]
    assert [line.partition(":")[0] for line in told] == ["job 101 waits", "jobs 102, 103 wait"]


def test_jobs_that_a_run_of_a_sweep_had_before_are_not_taken_back_with_a_new_one(cluster: Cluster) -> None:
    assert submit.main() == 0
    cluster.queue = [f"{job} {job} RUNNING N/A None" for job in (101, 103, 106, 107)]  # without 102, which trained it
    cluster.queue += ["110 110 PENDING N/A PartitionTimeLimit"]
    with pytest.raises(RequestError, match="would never start"):
        submit.main()
    assert cluster.of("scancel") == [["scancel", "110"]]


def test_whatever_is_at_work_here_of_any_sweep_of_the_root_is_waited_for(tmp_path: Path) -> None:
    of = {"a-lr_1": "a-lr", "b-seed_1": "b-seed", "alone": ""}
    work: dict[str, subprocess.Popen[bytes]] = {}
    for name, swept in of.items():
        run = RunDir(tmp_path / name)
        run.events.mkdir(parents=True)
        record = {"sweep": {"name": swept, "values": {}}} if swept else {}
        run.run_json.write_text(json.dumps(record))
        work[name] = subprocess.Popen(["sleep", "300"], env={**os.environ, "DDPM_JOB": f"local-{name}"})
        told = {"stage": "train", "via": "local", "run": str(run.path), "pid": work[name].pid}
        EventLog(run, f"local-{name}", 0, environment.host()).append("submitted", **told)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("no JSON")
    try:
        assert sweep.at_work_here(tmp_path) == [(work[name].pid, f"local-{name}") for name in ("a-lr_1", "b-seed_1")]
        work["a-lr_1"].kill()
        work["a-lr_1"].wait()
        assert [pid for pid, _ in sweep.at_work_here(tmp_path)] == [work["b-seed_1"].pid]
    finally:
        for process in work.values():
            process.kill()
            process.wait()


def test_ctrl_c_while_a_sweep_here_is_watched_says_how_to_stop_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = []
    for seed in (1, 2):
        run, config = RunDir(tmp_path / f"tiny-seed_{seed}"), read([f"seed={seed}"])
        one = Asked(run, config, config, [], sweep={"name": "tiny-seed", "values": {"seed": seed}})
        here = Here(subprocess.Popen(["true"]), tmp_path / "log")
        points.append(sweep.Point(one, False, {"data": {"num_images": 10}}, here))
        assert here.process.wait() == 0
    monkeypatch.setattr(sweep.follow, "follow_process", lambda *_: 130)
    assert sweep._wait([point.asked for point in points], points, "/my runs") == 130
    assert "python launch/cancel.py tiny-seed --root '/my runs'" in capsys.readouterr().err
    assert sweep._wait([points[1].asked], points[1:], None) == 130 and capsys.readouterr().err == ""
