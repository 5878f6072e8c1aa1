"""logs.py, remove.py and export.py on runs that are done: everyday work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import ddpm
from tests.cli.harness import TINY_SET, Shell, snapshot


@pytest.fixture
def logs(again: Shell) -> Path:
    """Of a training with two lives and of two tasks of an array, the second written to last."""
    logs = again.root / "tiny" / "logs"
    life = "[batch] 2026-11-27T00:00:00Z job=17 restart={} stage=train\nsrun: launching\nstep={}\n"
    (logs / "train-17.out").write_text(life.format(0, 1) + "slurmstepd: error: *** JOB 17 ***\n" + life.format(1, 2))
    for task in (0, 1):
        (logs / f"sample-18_{task}.out").write_text(f"submitit INFO\nshard {task}\n")
    for age, path in enumerate(("sample-18_1", "sample-18_0", "train-17"), start=-10):
        os.utime(logs / f"{path}.out", (2e9 - age, 2e9 - age))
    return logs


def test_logs_are_of_what_ran_last_without_what_slurm_says(again: Shell, logs: Path) -> None:
    done = again("logs", "tiny")
    assert done.stdout == "shard 1\n" and f"==> {logs}/sample-18_1.out <==" in done.stderr
    assert "(1 line of SLURM's own not shown: --all)" in done.stderr and "3 older" in done.stderr
    done = again("logs", "tiny", "--stage", "train")
    told = done.stdout.splitlines()
    assert [line for line in told if "[batch]" not in line] == ["step=1", "step=2"] and len(told) == 4
    assert again("logs", "tiny", "--stage", "train", "--all").stdout == (logs / "train-17.out").read_text()
    assert "scored" in again("logs", "tiny", "--stage", "evaluate").stdout  # here all stages share one


def test_logs_that_are_followed_go_on_in_the_next_jobs(again: Shell, logs: Path) -> None:
    argv, options = again.command("logs", "tiny", "-f", "--stage", "train")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(4)]
        with (logs / "train-17.out").open("a") as f:
            f.write("step=3\nsrun: error\nhalf")
        seen.append(process.stdout.readline())
        (logs / "train-19.out").write_text("step=4\n")
        seen += [process.stdout.readline() for _ in range(2)]
        assert process.wait(60) == 0  # as nothing of it is at work any more
        assert process.stdout.read() == "nothing of run tiny is queued or at work: complete at step 400\n"
    assert [line.strip() for line in seen if "[batch]" not in line] == [
        "step=1", "step=2", "step=3", f"==> {logs}/train-19.out <==", "step=4",
    ]  # fmt: skip


def test_without_a_word_logs_say_where_they_looked(again: Shell) -> None:
    shutil.rmtree(again.root / "tiny" / "logs")
    assert f"python launch/status.py {again.root}/tiny" in again.refused("logs", "tiny")


def test_removing_says_what_it_would_free_and_frees_it_with_yes(again: Shell) -> None:
    before = snapshot(again.root / "tiny")
    done = again("remove", "tiny", "--root", str(again.root))
    assert "checkpoints" in done.stdout and "in all" in done.stdout
    assert f"python launch/remove.py tiny --root {again.root} --yes" in done.stdout
    assert snapshot(again.root / "tiny") == before
    shutil.copytree(again.root / "tiny", again.root / "tiny-too")
    (again.root / "tiny-too" / "run.json").rename(again.cwd / "run.json")
    assert f"rm -r {again.root}/tiny-too" in again.refused("remove", "tiny*", "--yes")
    (again.cwd / "run.json").rename(again.root / "tiny-too" / "run.json")
    assert re.search(r"^all 2 runs: \S+ [KM]iB in \d+ files$", again("remove", "tiny*").stdout, re.M)
    done = again("remove", "tiny*", "--yes")
    assert done.returncode == 0 and done.stdout.endswith("removed tiny\nremoved tiny-too\n"), done.stdout + done.stderr
    assert [p.name for p in again.root.iterdir()] == [".cache"]


def test_a_run_that_another_one_reads_is_not_removed(again: Shell, tmp_path: Path) -> None:
    run, mine = again.root / "tiny", tmp_path / "mine"
    for path in (run, *(run / name for name in ("events", "logs", "samples", "eval"))):
        path.chmod(0o555)
    from ddpm.run.files import sign, write_json
    from ddpm.run.paths import RunDir
    from ddpm.run.records import read_run

    shutil.copytree(run, mine / "tiny")
    (mine / "tiny").chmod(0o755)
    write_json(mine / "tiny" / "run.json", sign({**read_run(RunDir(run)), "reads": str(run)}), replace=True)
    assert f"is read by {mine}/tiny" in again.refused("remove", str(run), "--yes", "--root", str(mine))
    shutil.rmtree(mine / "tiny" / "checkpoints")
    (mine / "tiny" / "checkpoints").symlink_to(run / "checkpoints")
    (mine / "tiny" / "run.json").write_text("{")  # its links tell it then
    assert f"is read by {mine}/tiny" in again.refused("remove", str(run), "--yes", "--root", str(mine))
    assert run.exists()


def test_what_is_exported_gives_the_runs_samples_anywhere_and_tells_its_scores(finished: Shell, tmp_path: Path) -> None:
    before, dest = snapshot(finished.root), tmp_path / "model"
    done = finished("export", "tiny", str(dest))
    assert done.returncode == 0 and snapshot(finished.root) == before, done.stdout + done.stderr
    assert sorted(p.name for p in dest.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    theirs, ours = ddpm.load(dest), ddpm.load(finished.root / "tiny")
    assert theirs.step == 400 and np.array_equal(theirs.sample(8), ours.sample(8))
    text = (dest / "README.md").read_text()
    record = (finished.root / "tiny" / "eval" / f"{TINY_SET}.json").read_text()
    assert "| ddim | 4 | 25 vs train | pixels |" in text and str(finished.root) not in text
    assert (
        "fewer samples than the 768 dimensions" in text and str(finished.root) not in (dest / "config.yaml").read_text()
    )
    assert ddpm.load(dest).config.digest() in text and record
    assert "exists" in finished.refused("export", "tiny", str(dest))
    assert "no folder" in finished.refused("export", "tiny", str(tmp_path / "a" / "b"))
    assert "it has [200, 400]" in finished.refused("export", "tiny", str(tmp_path / "c"), "--step", "7")
