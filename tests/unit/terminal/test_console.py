"""launch/terminal: how scripts leave, and how long they follow a job."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch

from ddpm.config.reading import load
from ddpm.errors import DoNotRetry, NodeUnfit, RequestError
from ddpm.run import generations
from ddpm.run.events import EventLog
from ddpm.run.files import DamagedFile, now
from ddpm.run.paths import RunDir
from launch import recover, submission
from launch.cluster import scheduler, slurm
from launch.life.decision import Evidence, decide
from launch.queue import chain
from launch.terminal import console, faults, follow, inspection, streams
from launch.terminal.results import print_score, why_not
from tests.cli.harness import TINY

RUNNING = scheduler.Shown("RUNNING", 0, may_requeue=True, partition="", qos="", time_limit="", queued_at=None)
MISTAKEN = Evidence("train", 1, shown=RUNNING, mistaken=True)


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ESHUTDOWN, 3), (errno.EIO, 3)])
def test_only_a_reader_that_has_read_enough_ends_a_script_well(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise OSError(number, "it is so")

    with pytest.raises(SystemExit) as left:
        console.run_script(main)
    assert left.value.code == code
    assert capsys.readouterr().err == ("error: it is so\n" if code else "")


def test_an_error_stands_after_what_was_printed_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(log)))  # type: ignore[type-var]
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(log, write_through=True))

    def main() -> int:
        print("run: a")
        raise RequestError("no more")

    with pytest.raises(SystemExit):
        console.run_script(main)
    assert log.getvalue() == b"run: a\nerror: no more\n"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("told", "encoding"), [("ISO-8859-1", "iso8859-1"), ("ARMSCII-8", "utf-8"), ("", "utf-8")])
def test_a_terminal_gets_its_own_encoding_unless_python_lacks_that(
    monkeypatch: pytest.MonkeyPatch, told: str, encoding: str
) -> None:
    monkeypatch.setattr("locale.nl_langinfo", lambda _: told)
    out = Terminal(io.BytesIO(), encoding="utf-8")
    flags = SimpleNamespace(utf8_mode=1)
    monkeypatch.setattr(streams, "sys", SimpleNamespace(flags=flags, stdin=out, stdout=out, stderr=sys.stderr))
    streams.make_safe()
    assert out.encoding == encoding


def test_a_score_is_a_few_lines_on_a_terminal_and_json_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"fid": 137.37941234567, "fid_interval": [136.0, 139.0], "num_samples": 50_000, "nfe": 100, "seed": 2**60}
    record |= {"reference": {"name": "x", "split": "train"}, "extractor": {"name": "inception"}, "kid": 0.123456789}
    print_score(record, None, as_json=False)
    assert json.loads(capsys.readouterr().out) == record
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_score(record, None, as_json=True)
    assert json.loads(capsys.readouterr().out) == record
    print_score(record, None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FID 137, 50,000 vs train" and lines[1].split() == ["95", "%", "136", "to", "139"]
    assert lines[2].split() == ["kid", "0.123"] and len(lines) == 3
    for classes, told in ((("a cat", "eel"), "a cat 130, eel -"), ((), "0 130, 1 -")):
        print_score({**record, "fid_per_class": [130.4, None]}, None, as_json=False, classes=classes)
        assert capsys.readouterr().out.splitlines()[-1] == f"  {'by class':18}{told}"


def test_that_the_same_command_goes_on_is_said_only_where_no_failure_says_what_to_do_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "my runs" / "tiny")
    run.events.mkdir(parents=True)
    run.config.write_text(TINY)
    log = EventLog(run, "17", 0, "n1")
    log.append("submitted")
    assert submission.outcome(run, load(run.config), []) == 1
    told = capsys.readouterr().err
    assert "of 400, and no job of it has said a word" in told and f"nodes may not see {run.path.parent}:" in told
    run.logs.mkdir()
    (run.logs / "train-17.out").write_text("[batch] begun\n")
    assert submission.outcome(run, load(run.config), []) == 1
    logs = f"python launch/logs.py '{run.path}' says"
    ended = "job 17 ended without a word: SLURM does not say why; submit it again to go on"
    assert f"at step 0 of 400: {ended}; {logs} more" in capsys.readouterr().err
    log.append("submitted", stage="sample+evaluate")
    log.append("failed", stage="train", exit_code=1, reason=(why := decide(MISTAKEN).why))
    assert why_not(run, "sample").endswith("the same command goes on")
    assert submission.outcome(run, load(run.config), []) == 1
    assert "submit again with --code new" in why and f"400: {why}; {logs} more\n" in capsys.readouterr().err


def inspected(run: RunDir, what: str) -> inspection.Line:
    (line,) = (line for line in inspection.look(run) if line.what == what)
    return line


def test_what_torch_advises_where_it_loads_a_checkpoint_not_is_not_passed_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    run.ema_weights(3).write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    run.manifest(3).touch()
    torch.save({"ema": {"a": object}}, run.checkpoint(3))
    found = inspected(run, f"checkpoints/{run.ema_weights(3).name}")
    assert found[::2] == ("damaged", "cannot be compared with its checkpoint: Weights only load failed")


def test_lines_that_metrics_lack_are_told_where_the_run_is_checked(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    run.config.write_text(TINY)
    run.manifest(400).touch()
    every = load(run.config).log.every_steps
    of = dict.fromkeys(("epoch", "loss", "grad_norm", "lr", "images_per_s"), 1)
    lines = [json.dumps({"step": step, "time": now(), **of}) + "\n" for step in range(every, 401, every)]
    run.metrics.write_text("".join(lines))
    assert inspected(run, "metrics.jsonl") == ("holds", "metrics.jsonl", f"{len(lines)} lines")
    run.metrics.write_text("".join(lines[:-2]))
    assert f"lacks lines of the steps from {400 - 2 * every} to 400" in inspected(run, "metrics.jsonl").why


def test_progress_counts_the_shards_of_the_set_that_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    run.heartbeat.write_text(
        '{"time": "2026-11-27T00:00:00.000Z", "job": "1", "restart": 0, "step": 9, "total_steps": 9}'
    )
    made = run.sample_set("s")
    made.path.mkdir(parents=True)
    made.request.write_text('{"shards": 4, "num_samples": 402}')
    made.shard_manifest(0, 4).touch()
    follow.Follower(run).show("17:RUNNING")
    assert re.match(r"17:RUNNING  shards 1/4  100 of 402 images(, |$)", capsys.readouterr().out)
    for index in (1, 2, 3):
        made.shard_manifest(index, 4).touch()
    follow.Follower(run).show("17:RUNNING")  # something else than the set, which is whole
    shutil.rmtree(made.path)
    follow.Follower(run).show("17:RUNNING")
    run.heartbeat.unlink()  # as before training's first step, or of a model that was trained elsewhere
    follow.Follower(run).show("17:RUNNING")
    assert capsys.readouterr().out == "17:RUNNING\n17:RUNNING\n17:RUNNING\n"


def test_one_set_is_waited_for_and_told_of_whatever_else_of_the_run_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    for job, stage, name in (("17", "sample", "fast"), ("18", "sample", "paper"), ("19", "evaluate", "fast"),
                             ("20", "train", ""), ("21", "sample", "fast")):  # fmt: skip
        EventLog(run, job, 0, "n1", prefix="submit-").append("submitted", stage=stage, set=name)
    for name, age_s in (("fast", 10), ("paper", 0)):
        made = run.sample_set(name)
        made.path.mkdir(parents=True)
        made.request.write_text('{"shards": 4, "num_samples": 402}')
        os.utime(made.request, (time.time() - age_s,) * 2)
    run.sample_set("fast").shard_manifest(0, 4).touch()
    asked: list[list[str]] = []

    def queued(jobs: list[str]) -> dict[str, str]:
        asked.append(jobs)
        return dict.fromkeys(jobs, "RUNNING") if len(asked) < 2 else {}

    monkeypatch.setattr(scheduler, "queued", queued)
    monkeypatch.setattr(follow, "POLL_S", 0)
    follow.follow_jobs(run, ["17"], [("sample", "fast")])
    assert {tuple(jobs) for jobs in asked} == {("17", "21")}
    assert re.match(
        r"sample 17 running, sample 21 running  shards 1/4  100 of 402 images(, |$)", capsys.readouterr().out
    )
    asked.clear()
    follow.follow_jobs(run, ["20"])
    assert capsys.readouterr().out.startswith("sample 17 running, sample 18 running and 3 more")
    assert asked[0] == ["17", "18", "19", "20", "21"]
    follow.Follower(run).show("20:RUNNING", ("train", ""))
    assert "shards" not in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """squeue's, in turn: job 17 is pre-empted, for longer than a few questions, comes back, and ends."""
    lives = ["RUNNING", *["COMPLETING"] * 9, "PENDING", "RUNNING", "COMPLETING"]
    lines = iter([*(f"17 17 {state}" for state in lives), "", "", ""])
    monkeypatch.setattr(slurm, "run", lambda argv: next(lines))
    monkeypatch.setattr(follow, "POLL_S", 0)
    return lines


def test_a_job_that_slurm_puts_back_is_followed(tmp_path: Path, answers: Iterator[str]) -> None:
    follow.follow_jobs(RunDir(tmp_path), ["17"])
    assert list(answers) == []


def test_a_job_that_was_submitted_by_hand_is_followed(tmp_path: Path, answers: Iterator[str]) -> None:
    EventLog(RunDir(tmp_path), "17", 0, "n1").append("allocated")
    follow.follow_jobs(RunDir(tmp_path), ["16"])
    assert list(answers) == []


def test_a_job_that_does_not_come_to_its_end_is_not_followed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()
    monkeypatch.setattr(slurm, "run", lambda argv: f"17 17 {'RUNNING' if next(asked) < 5 else 'COMPLETING'}")
    monkeypatch.setattr(follow, "POLL_S", 0)
    follow.follow_jobs(RunDir(tmp_path), ["17"])
    assert next(asked) > 100


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/a"), r"^Too many open files: /a: .*open files.*"),
        (RuntimeError("can't start new thread"), r"^can't start new thread: .*processes and threads.*"),
        (MemoryError(), r"^out of memory: .*memory.*"),
        (ImportError("libtorch.so: failed to map segment from shared object"), r"^libtorch.so: failed.*memory.*"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"^No space left on device: /run\. Make room .*remove.py.*df -i",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a"), r"^Disk quota exceeded: /a\. Make room there"),
        (DamagedFile("step-1.pt: short"), r"^step-1.pt: short$"),
        (RuntimeError("of our own"), None),
        (ImportError("No module named x"), None),
        (ValueError("x"), None),
    ],
)
def test_what_is_no_fault_of_ours_has_words_and_what_is_keeps_its_traceback(error: Exception, told: str | None) -> None:
    said = faults.words(error, "/run")
    assert said is None if told is None else re.search(told, said or ""), said


def test_a_job_that_could_not_write_why_it_failed_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    run, log = RunDir(tmp_path), tmp_path / "logs" / "local-1.out"
    run.logs.mkdir()
    log.write_text("torn")
    for told in ("", f". Disk quota exceeded: {run.logs}. Make room there"):
        assert follow.follow_process(run, subprocess.Popen(["false"]), log) == 1
        assert f"the job ended with exit code 1; its log: {log}{told}" in capsys.readouterr().err
        monkeypatch.setattr(tempfile, "TemporaryFile", full)


def test_what_cannot_be_read_now_is_no_damage_for_which_anything_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = (PermissionError(errno.EACCES, "Permission denied", "a"), OSError(errno.ESTALE, "Stale file handle", "a"))
    run, look = RunDir(tmp_path), inspection.look
    run.checkpoints.mkdir()
    run.manifest(1).touch()
    for error in (*errors, DamagedFile("a: torn"), IsADirectoryError(errno.EISDIR, "Is a directory", "a")):
        monkeypatch.setattr(inspection, "look", look)
        monkeypatch.setattr(generations, "verify", Mock(side_effect=error))
        line = inspected(run, "checkpoints/step-000000001")
        assert line.verdict == ("unread" if error in errors else "damaged"), line
        monkeypatch.setattr(inspection, "look", lambda run, line=line: iter([line]))
        assert recover.check(run, verbose=False) == 1
        said = capsys.readouterr().out
        assert ("--rebuild" in said) == (error not in errors) and ("readable" in said) == (error in errors), said


def test_a_folder_in_the_place_of_a_file_is_named_with_what_to_do() -> None:
    told = faults.words(IsADirectoryError(errno.EISDIR, "Is a directory", "samples/a/shard-0.npz"))
    assert told == "Is a directory: samples/a/shard-0.npz. A folder lies where a file belongs: move it away, then again"


def test_a_word_that_can_be_no_file_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^no run 'aaa"):
        console.find_run("a" * 300, str(tmp_path))


@pytest.mark.parametrize("quote", ["", "'"])
def test_a_command_that_mends_a_file_is_told_with_all_of_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quote: str
) -> None:
    mend = f"chmod u+rwX {quote}{tmp_path}/a{quote}"
    shut = inspection.Line("unread", "a", f"{tmp_path}/a is shut: {mend}")
    monkeypatch.setattr(inspection, "look", lambda run: iter([shut]))
    assert recover.check(RunDir(tmp_path), verbose=False) == 1
    assert capsys.readouterr().out.startswith(f"unread   a: a is shut: {mend}\n")


def test_ones_own_folder_that_is_shut_is_told_with_what_opens_it_and_any_other_may_be_open_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "my runs").mkdir(mode=0o500)
    error = PermissionError(errno.EACCES, "Permission denied", str(folder / "a" / "b"))
    monkeypatch.setattr(os, "geteuid", lambda: 61001)
    os.chown(folder, 61001, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "geteuid", os.getuid)
    assert faults.words(error) == f"Permission denied: {folder}/a/b. Its mode is 0500: chmod u+rwX '{folder}'"
    assert isinstance(faults.of_a_job(error, ""), DoNotRetry)
    folder.chmod(0o700)
    assert faults.words(error) == f"Permission denied: {folder}/a/b"
    assert isinstance(faults.of_a_job(error, ""), NodeUnfit)


@pytest.mark.parametrize("make", [Path.mkdir, Path.read_bytes])
def test_a_link_to_nothing_is_said_to_be_one_and_another_start_is_no_use(tmp_path: Path, make: Any) -> None:
    (tmp_path / "samples").symlink_to("/nowhere/at/all")
    with pytest.raises(OSError) as error:
        make(tmp_path / "samples")
    told = f"a link to /nowhere/at/all, where nothing is: {tmp_path / 'samples'}"
    assert faults.words(error.value) == told
    assert isinstance(faults.of_a_job(error.value, tmp_path), DoNotRetry)
    with pytest.raises(NotADirectoryError) as error:
        RunDir(tmp_path).sample_sets()
    assert faults.words(error.value) == told


def test_stop_that_is_a_directory_is_lifted_too_but_never_with_what_is_in_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stop_file.mkdir()
    chain.lift_stop(run)
    assert not run.stop_file.exists()
    (run.stop_file / "kept").mkdir(parents=True)
    with pytest.raises(RequestError, match=r"STOP forbids training and cannot be removed \(Directory not empty\)"):
        chain.lift_stop(run)
    assert (run.stop_file / "kept").exists()


def test_a_folder_of_another_trainer_is_no_run_into_which_nothing_may_go(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    console.check_outside_runs(tmp_path / "stats" / "fid.npz", "--save-stats")
    (tmp_path / "run.json").touch()
    with pytest.raises(RequestError, match="lies in run"):
        console.check_outside_runs(tmp_path / "stats" / "fid.npz", "--save-stats")
