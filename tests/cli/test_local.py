"""`--cluster local`: the whole flow on this machine, stopped, resumed, extended, sampled and scored."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddpm.run.files import sign
from ddpm.scoring.record import told
from tests.cli.harness import TINY_SET, Shell, end, events, is_alive, png, read, snapshot, wait_for, write_zip


def state(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"step-{step:09d}.pt", weights_only=True)


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """A state's tensors and numbers by their path."""
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{key}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, sub in enumerate(tree) for k, v in flat(sub, f"{key}/{i}").items()}
    return {key: tree}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    a, b = flat(one), flat(other)
    return [k for k in a.keys() | b.keys() if not np.array_equal(np.asarray(a.get(k)), np.asarray(b.get(k)))]


def images(run: Path, set_name: str) -> np.ndarray:
    return np.concatenate([np.load(p)["images"] for p in sorted((run / "samples" / set_name).glob("shard-*.npz"))])


# ---------------------------------------------------------------- what a finished run is


def test_a_finished_run_holds_what_the_design_promises(finished: Shell) -> None:
    run = finished.root / "tiny"
    config, record = yaml.safe_load((run / "config.yaml").read_text()), read(run / "run.json")
    assert config["name"] == "tiny" and config["train"]["total_steps"] == 400
    assert set(record) >= {"schema", "name", "created", "config_digest", "git", "versions", "command", "resolved"}
    assert record["schema"] == 1 and set(record["resolved"]) >= {"amp", "compile", "threads", "deterministic", "torch"}
    assert record["command"][-5:] == ["--cluster", "local", "--then", "sample,evaluate", "--wait"]

    lines = [yaml.safe_load(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, 401, 20))
    fields = {"step", "images", "epoch", "loss", "grad_norm", "lr", "images_per_s", "gpu_memory_gib", "time"}
    assert all(set(line) == fields for line in lines) and lines[-1]["images"] == 3200
    assert lines[-1]["epoch"] == pytest.approx(3200 / 1797) and lines[-1]["loss"] < lines[0]["loss"]

    manifest = read(run / "checkpoints" / "step-000000400.json")
    assert set(manifest) == {
        *("step", "images", "file", "bytes", "sha256", "config_digest", "world_size", "fence", "created"),
        *("ema_sha256", "run_id", "data_digest", "self_sha256"),
    }
    assert set(state(run, 400)) == {
        *("model", "ema", "optimizer", "scaler", "step", "images", "config_digest", "extra"),
    }
    for name in ("checkpoints/ema-000000400.safetensors", "grids/step-000000400.png", "lock", "fence"):
        assert (run / name).is_file(), name
    assert list((run / "tb").glob("events.*")) and list((run / "logs").glob("*.out"))
    assert {"time", "step", "job", "host"} <= set(read(run / "heartbeat.json"))
    assert not list(finished.root.rglob(".tmp-*"))


def test_events_tell_the_life_of_a_run(finished: Shell) -> None:
    happened = events(finished.root / "tiny")
    told = [e["event"] for e in happened]
    assert told.count("submitted") == 1  # which a quick job may precede
    trained = ["allocated", "started", "checkpoint", "checkpoint", "finished"]
    assert [t for t in told if t != "submitted"] == trained + ["stage_began", "stage_done"] * 2
    assert all({"event", "time", "job", "restart", "host"} <= set(e) for e in happened)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", e["time"]) for e in happened)
    assert happened[-1]["stage"] == "evaluate"
    (finish,) = (e for e in happened if e["event"] == "finished")
    assert finish["step"] == 400 and finish["world_size"] == 1


def test_a_sample_set_and_its_score_name_everything_they_follow_from(finished: Shell) -> None:
    run = finished.root / "tiny"
    where = run / "samples" / TINY_SET
    request, sha256 = read(where / "request.json"), read(run / "checkpoints" / "step-000000400.json")["sha256"]
    assert request["checkpoint"] == {"step": 400, "sha256": sha256}
    assert set(request) == {
        *("checkpoint", "weights", "sampler", "steps", "eta", "guidance", "seed", "num_samples", "shards", "batch"),
        *("precision", "class_plan", "digest"),
    }
    shard, manifest = np.load(where / "shard-00001-of-00002.npz"), read(where / "shard-00001-of-00002.json")
    assert shard["images"].dtype == np.uint8 and shard["images"].shape == (13, 8, 8, 3)
    assert shard["labels"].dtype == np.int64 and int(shard["first"]) == 12
    assert {"shard", "first", "num", "sha256", "request_digest", "self_sha256"} <= set(manifest)
    features = np.load(where / "features-pixels-00001-of-00002.npy")
    assert features.dtype == np.float32 and len(features) == 13
    assert not (where / "part").exists()

    score = read(run / "eval" / f"{TINY_SET}.json")
    assert "fid" not in score and score["frechet_distance"] > 0 and score["num_samples"] == 25
    assert score["reference"]["name"] == "digits" and score["reference"]["num_images"] == 1797
    assert set(score["reference"]) == {"name", "split", "num_images", "digest"}
    assert score["extractor"]["name"] == "pixels" and set(score["extractor"]) == {"name", "weights_sha256", "resize"}
    assert score["checkpoint"] == {"step": 400, "sha256": sha256, "weights": "ema"}
    assert score["sampler"] == {"name": "ddim", "steps": 4, "eta": 0.0, "guidance": None}
    assert score["nfe"] == 4 and score["seed"] == 0
    assert set(score) >= {"precision", "created", "command"}


def test_submitting_a_complete_run_again_says_so_and_changes_no_file(finished: Shell) -> None:
    before = snapshot(finished.root)
    done = finished.submit("--then", "sample,evaluate", "--wait")
    assert done.returncode == 0 and "run tiny is complete: 400 steps" in done.stdout
    assert "Fréchet distance" in done.stdout and "ddim 4, 25 vs train, pixels features: no FID" in done.stdout
    for stages in ([], ["--then", "sample"]):
        assert "is complete" in finished.submit(*stages).stdout
    for option, line in (("--dry-run", "# not kept"), ("--wait", "not kept")):
        done = finished.submit("log.every_steps=7", option)
        assert f"{line}, since nothing of the run is left to be made: log.every_steps\n" in done.stdout + done.stderr
        assert "its config changes" not in done.stdout
    assert "is complete" in finished("sample", "tiny").stdout
    assert snapshot(finished.root) == before


# ---------------------------------------------------------------- stopping and going on


def test_a_run_that_is_stopped_in_every_way_ends_with_the_weights_of_an_undisturbed_one(
    finished: Shell, shell: Shell
) -> None:
    run = shell.root / "tiny"

    def under_way(life: int) -> bool:
        """Whether that life has begun and taken a step of its own."""
        begun = [e for e in events(run) if e["event"] in ("started", "resumed")] if run.exists() else []
        beat = run / "heartbeat.json"
        return len(begun) == life and beat.exists() and read(beat)["job"] == begun[-1]["job"]

    # 1: ctrl-C while waiting ends the waiting alone; SIGTERM saves and ends the job
    argv, options = shell.command("submit", "tiny.yaml", "--cluster", "local", "--wait")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as waiting:
        wait_for(lambda: under_way(1), "the first step")
        (pid,) = (e["pid"] for e in events(run) if e["event"] == "submitted")
        os.killpg(pid, signal.SIGSTOP)  # or on a busy machine it may be done before it is left alone
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 130, said
    assert f"still running in the background (pid {pid})" in said and f"launch/cancel.py {run}" in said
    assert "Traceback" not in said
    os.killpg(pid, signal.SIGCONT)
    assert is_alive(pid)
    end(pid)

    # 2: a STOP file ends it with a save
    done = shell.submit()
    pid = int(re.search(r"as pid (\d+)", done.stdout).group(1))  # type: ignore[union-attr]
    wait_for(lambda: under_way(2), "the first step after the resume")
    (run / "STOP").touch()
    wait_for(lambda: not is_alive(pid), "the end of the job after STOP")

    # 3: submitting again means going on
    done = shell.submit("--wait")
    assert done.returncode == 0 and f"removed {run}/STOP" in done.stdout, done.stderr

    left_out = ("submitted", "allocated", "checkpoint")
    happened = [(e["event"], e.get("reason")) for e in events(run) if e["event"] not in left_out]
    assert happened == [
        ("started", None),
        ("stop_requested", "interrupted"),
        ("resumed", None),
        ("stop_requested", "STOP"),
        ("resumed", None),
        ("finished", None),
    ]
    stops = [e["step"] for e in events(run) if e["event"] in ("stop_requested", "resumed")]
    assert 0 < stops[0] == stops[1] < stops[2] == stops[3] < 400
    assert differing(state(run, 400), state(finished.root / "tiny", 400)) == []
    keys = ("step", "images", "epoch", "loss", "grad_norm", "lr")
    ours, theirs = (
        [{k: yaml.safe_load(line)[k] for k in keys} for line in (root / "metrics.jsonl").read_text().splitlines()]
        for root in (run, finished.root / "tiny")
    )
    assert ours == theirs


def test_more_steps_extend_a_finished_run_from_where_it_is(again: Shell) -> None:
    run = again.root / "tiny"
    before = (run / "checkpoints" / "step-000000400.pt").read_bytes()
    asked = ["train.total_steps=440", "train.deterministic=false"]
    changes = "its config changes: train.total_steps=440 (it was 400), train.deterministic=false (it was auto)"
    assert f"# {changes}\n# with another train.deterministic" in again.submit(*asked, "--dry-run").stdout
    done = again.submit(*asked, "--wait")
    assert done.returncode == 0 and "complete: 440 steps" in done.stdout, done.stderr
    assert f"{changes}\nwith another train.deterministic the bits after step 400 are not" in done.stdout
    assert [(e["event"], e["step"]) for e in events(run) if e["event"] in ("resumed", "finished")] == [
        ("finished", 400),
        ("resumed", 400),
        ("finished", 440),
    ]
    assert (run / "checkpoints" / "step-000000400.pt").read_bytes() == before
    steps = [yaml.safe_load(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(20, 441, 20))


@pytest.mark.long
def test_a_run_that_ended_early_and_goes_on_is_scored_anew(shell: Shell) -> None:
    run, chain, bound = shell.root / "tiny", ["--then", "sample,evaluate", "--wait"], "train.early_stop_below=100"
    done = shell.submit(bound, *chain)
    assert done.returncode == 0 and "complete: 200 steps" in done.stdout, done.stdout + done.stderr
    assert read(run / "eval" / "ddim4-upto400-seed0.json")["checkpoint"]["step"] == 200
    before = snapshot(run)
    assert shell.submit(bound, *chain).stdout == done.stdout[done.stdout.index("run tiny is complete") :]
    assert "ddim4-upto400-seed0 is complete" in shell("sample", "tiny").stdout
    assert snapshot(run) == before

    done = shell.submit(*chain)
    assert done.returncode == 0 and "complete: 400 steps" in done.stdout, done.stdout + done.stderr
    score = read(run / "eval" / f"{TINY_SET}.json")
    assert score["checkpoint"]["step"] == 400 and told(score) in done.stdout
    before = snapshot(run)
    assert f"{TINY_SET}.json" in shell.submit(bound, "train.early_stop_below=100", *chain).stdout
    assert snapshot(run) == before


@pytest.mark.long
def test_a_finished_run_whose_last_checkpoint_is_damaged_is_trained_again_from_the_one_before(
    finished: Shell, again: Shell
) -> None:
    run = again.root / "tiny"
    last = run / "checkpoints" / "step-000000400.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    done = again.submit("--then", "sample,evaluate", "--wait")
    assert done.returncode == 0 and "complete: 400 steps" in done.stdout, done.stdout + done.stderr
    assert "the last checkpoint is damaged" in done.stdout and "sha256" in done.stdout
    assert [e["step"] for e in events(run) if e["event"] == "resumed"] == [200]
    assert last.read_bytes() == whole  # so that what was begun with it goes on
    assert "the last checkpoint" not in again.submit("--then", "sample,evaluate").stdout


@pytest.mark.long
def test_paths_are_those_of_where_the_command_was_typed(shell: Shell) -> None:
    write_zip(shell.cwd / "a.zip", {f"{i}.png": png(8, i) for i in range(12)})
    write_zip(shell.cwd / "b.zip", {f"{i}.png": png(8, i) for i in range(50, 60)})
    (shell.cwd / "site.yaml").write_text("data_cache: packed\n")
    words = ["data.name=images", "data.path=a.zip", "train.total_steps=20", "--profile", "site.yaml"]
    words += ["--then", "sample,evaluate", "--wait"]
    shown = shell.submit(*words, "evaluate.reference=b.zip", "--dry-run").stdout
    done = shell.submit(*words, "evaluate.reference=b.zip")
    assert done.returncode == 0 and "25 vs b.zip, pixels" in done.stdout, done.stdout + done.stderr
    frozen = (shell.root / "tiny" / "config.yaml").read_text()
    config = yaml.safe_load(frozen)
    assert (
        frozen in shown and (shell.cwd / "packed" / "data").is_dir() and not (shell.root / ".cache" / "data").exists()
    )
    assert (config["data"]["path"], config["evaluate"]["reference"]) == (f"{shell.cwd}/a.zip", f"{shell.cwd}/b.zip")

    shutil.rmtree(shell.cwd / "packed")  # a job that packs the data again finds it
    done = shell.submit(*words)
    assert done.returncode == 0 and "25 vs train, pixels" in done.stdout, done.stdout + done.stderr


@pytest.mark.long
def test_slurm_is_not_asked_about_a_run_of_this_machine(again: Shell) -> None:
    again.put("sbatch", "exit 1")
    again.put("squeue", 'echo "squeue: fatal: Could not establish a configuration source" >&2; exit 1')
    done = again.submit("train.total_steps=410", "--wait")
    assert done.returncode == 0, done.stderr
    done = again("sample", "tiny", "--set", "few", "--num-samples", "5", "--shards", "1", "--cluster", "local")
    assert done.returncode == 0, done.stderr
    assert again("evaluate", "tiny", "--set", "few", "--cluster", "local").returncode == 0


@pytest.mark.long
def test_two_ranks_see_the_same_images_and_compute_the_same_losses_to_rounding(finished: Shell, shell: Shell) -> None:
    done = shell.submit("train.total_steps=40", "--tasks-per-node", "2", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    run = shell.root / "tiny"
    assert read(run / "checkpoints" / "step-000000040.json")["world_size"] == 2

    def losses(root: Path) -> list[float]:
        return [yaml.safe_load(line)["loss"] for line in (root / "metrics.jsonl").read_text().splitlines()][:2]

    # float32 sums in another order, over 40 steps of Adam
    assert losses(run) == pytest.approx(losses(finished.root / "tiny"), rel=1e-3)


def test_a_job_that_fails_makes_waiting_fail_and_shows_the_log(shell: Shell) -> None:
    assert shell.submit("--prepare").returncode == 0
    (shell.root / "tiny" / "checkpoints").mkdir(exist_ok=True)
    no_state = {"step": 7, "file": "step-000000007.pt", "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    for suffix, content in ((".json", json.dumps(sign(no_state))), (".pt", "x")):
        (shell.root / "tiny" / "checkpoints" / f"step-000000007{suffix}").write_text(content)
    done = shell.submit("--wait")
    assert done.returncode == 1
    log = str(shell.root / "tiny" / "logs")
    assert "trainer.resume()" in done.stderr and "exit code 1" in done.stderr and log in done.stderr


# ---------------------------------------------------------------- samples and scores by hand


def test_another_sharding_of_the_same_request_has_the_same_bytes_and_unpacks_to_png(again: Shell) -> None:
    run = again.root / "tiny"
    done = again("sample", "tiny", "--set", "other", "--shards", "3", "--png")
    assert done.returncode == 0 and "other is complete: 25 images in 3 shards" in done.stdout, done.stderr
    ours = images(run, "other")
    assert ours.tobytes() == images(run, TINY_SET).tobytes()
    files = sorted((run / "samples" / "other" / "png").glob("*.png"))
    assert len(files) == 25
    assert (np.asarray(Image.open(files[13])) == ours[13]).all()


def test_only_a_missing_shard_is_made_again_and_with_the_same_bytes(again: Shell) -> None:
    where = again.root / "tiny" / "samples" / TINY_SET
    kept = (where / "shard-00001-of-00002.npz").stat().st_mtime_ns
    lost = (where / "shard-00000-of-00002.npz").read_bytes()
    for suffix in (".npz", ".json"):
        (where / f"shard-00000-of-00002{suffix}").unlink()
    done = again("sample", str(again.root / "tiny"))
    assert done.returncode == 0, done.stderr
    assert (where / "shard-00000-of-00002.npz").read_bytes() == lost
    assert (where / "shard-00001-of-00002.npz").stat().st_mtime_ns == kept
    log = max((again.root / "tiny" / "logs").glob("*.out"), key=lambda p: p.stat().st_mtime_ns).read_text()
    assert log.count("shard done") == 1


def test_a_set_with_a_gap_is_not_scored_and_the_repairing_command_is_named(again: Shell) -> None:
    run = again.root / "tiny"
    (run / "samples" / TINY_SET / "shard-00001-of-00002.json").unlink()
    done = again("evaluate", "tiny")
    assert done.returncode == 1
    assert f"python launch/sample.py {run} --set {TINY_SET}" in done.stderr and "(1)" in done.stderr


def test_evaluating_a_run_prints_the_score_as_json(again: Shell) -> None:
    path = again.root / "tiny" / "eval" / f"{TINY_SET}.json"
    before = read(path)
    path.unlink()
    done = again("evaluate", "tiny")
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout[done.stdout.index("{") :])
    assert printed == read(path) and printed["frechet_distance"] == before["frechet_distance"]


def test_a_trained_model_is_sampled_with_either_variance(again: Shell) -> None:
    run = again.root / "tiny"
    words = ["--sampler", "ancestral", "--steps", "5", "--num-samples", "4", "--shards", "1"]
    for variance in ([], ["--variance", "fixed_small"], ["--variance", "fixed_large"]):
        done = again("sample", "tiny", *words, *variance)
        assert done.returncode == 0, done.stderr
    large, small = "ancestral5-step400-seed0", "ancestral5-fixed_small-step400-seed0"
    assert {p.name for p in (run / "samples").iterdir()} == {TINY_SET, large, small}
    assert "variance" not in read(run / "samples" / large / "request.json")
    assert read(run / "samples" / small / "request.json")["variance"] == "fixed_small"
    assert not np.array_equal(images(run, small), images(run, large))
    assert "is complete" in again("sample", "tiny", "--set", small).stdout


def test_an_old_checkpoint_can_be_sampled_and_is_named(again: Shell) -> None:
    done = again("sample", "tiny", "--step", "200", "--prepare")
    assert done.returncode == 0 and "launch/sample.py" in done.stdout, done.stderr  # it was trained here
    assert read(again.root / "tiny" / "samples" / "ddim4-step200-seed0" / "request.json")["checkpoint"]["step"] == 200


def test_another_users_run_is_refused_without_a_traceback(again: Shell) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere. To enable: run the tests as an ordinary user")
    run = again.root / "tiny"
    run.chmod(0o555)
    try:
        done = again.submit("train.total_steps=440")
    finally:
        run.chmod(0o755)
    assert done.returncode == 3 and done.stderr.startswith("error: Permission denied")
