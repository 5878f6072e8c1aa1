"""A run whose files are damaged: status shows it beside the others, and nothing answers with a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from ddpm.config import reading
from ddpm.run.paths import RunDir
from launch.page import facts, page
from launch.terminal.overview import describe
from launch.terminal.results import print_results
from tests.cli.harness import TINY_SET, Shell, as_a_user, snapshot

EVENT = {"event": "resumed", "time": "2100-01-01T00:00:00.000Z", "job": "9", "restart": 0, "host": "n1", "step": 4}
ODD: dict[str, Any] = {"none": None, "text": "x", "huge": 10**30, "below": -1, "nested": {"a": [{}]}, "true": True}
ODD |= {"list": [[]], "nul": "\0", "infinite": float("inf")}
Break = Callable[[Path], Any]


def event(**fields: Any) -> Break:
    line = json.dumps({k: v for k, v in {**EVENT, **fields}.items() if v != "gone"}) + "\n"
    return lambda run: (run / "events" / "9.0.jsonl").write_text(line)


def put(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda run: (run / name).write_bytes(data)


def append(name: str, content: str) -> Break:
    return lambda run: (run / name).write_bytes((run / name).read_bytes() + content.encode())


def record(file: str, **fields: Any) -> Break:
    """One JSON file with other values."""

    def change(run: Path) -> None:
        there = json.loads((run / file).read_text())
        (run / file).write_text(json.dumps({k: v for k, v in {**there, **fields}.items() if v != "gone"}))

    return change


def folder(name: str) -> Break:
    """A directory where a file should be."""

    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return change


def file(name: str) -> Break:
    """A file where a directory should be."""

    def change(run: Path) -> None:
        shutil.rmtree(run / name)
        (run / name).write_text("")

    return change


def gone(name: str) -> Break:
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def link(name: str) -> Break:
    """To what is not there, as where a disk is not mounted."""

    def change(run: Path) -> None:
        gone(name)(run)
        (run / name).symlink_to("/nowhere")

    return change


def replace(name: str, before: str, after: str) -> Break:
    def change(run: Path) -> None:
        assert before in (run / name).read_text()
        (run / name).write_text((run / name).read_text().replace(before, after))

    return change


def half(name: str) -> Break:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[: (run / name).stat().st_size // 2])


def old_score(run: Path, **changes: Any) -> None:
    """The score as it was written before there were signatures, of other samples than the set's."""
    there = json.loads((run / SCORE).read_text())
    kept = ("frechet_distance", "reference", "extractor", "checkpoint", "sampler", "nfe", "precision", "created")
    (run / SCORE).write_text(json.dumps({**{k: there[k] for k in kept}, **changes}))


SCORE, REQUEST, BEAT = f"eval/{TINY_SET}.json", f"samples/{TINY_SET}/request.json", "heartbeat.json"
NEWEST = "checkpoints/step-000000400"
DAMAGES: dict[str, tuple[Break, str]] = {
    **{f"event-without-{key}": (event(**{key: "gone"}), f"no {key}") for key in ("event", "time", "job", "restart")},
    **{f"event-time-{k}": (event(time=v), "time = ") for k, v in {**ODD, "date": "2026-13-77T99:00:00"}.items()},
    **{f"event-restart-{k}": (event(restart=v), "restart = ") for k, v in ODD.items()},
    **{f"event-job-{k}": (event(job=v), "job = ") for k, v in ODD.items() if k not in ("text", "nul")},
    **{f"event-sign-{k}": (event(last_sign=v), "last_sign = ") for k, v in ODD.items() if v is not None},
    **{f"event-step-{k}": (event(step=v), "step = ") for k, v in ODD.items() if v is not None},
    **{f"heartbeat-time-{k}": (record(BEAT, time=v), "time = ") for k, v in ODD.items()},
    **{f"heartbeat-step-{k}": (record(BEAT, step=v), "step = ") for k, v in ODD.items()},
    "event-nested": (put("events/9.0.jsonl", "[" * 200_000 + "\n"), "no JSON"),
    "event-digits": (put("events/9.0.jsonl", '{"step": ' + "9" * 9000 + "}\n"), "no JSON"),
    "event-nul": (put("events/9.0.jsonl", b"\0" * 4096 + b"\n"), "no JSON"),
    "event-no-utf8": (put("events/9.0.jsonl", b"\xff\xfe{}\n"), "no JSON"),
    "event-list": (put("events/9.0.jsonl", "[1]\n\n7\n"), "no JSON object"),
    "events-folder": (folder("events/9.0.jsonl"), "Is a directory"),
    "events-file": (file("events"), "Not a directory"),
    "events-gone": (gone("events"), "events/ tells nothing"),
    "metrics-no-step": (append("metrics.jsonl", '{"loss": 1}\n'), "no step"),
    "metrics-shortened": (half("metrics.jsonl"), "metrics.jsonl lacks lines"),
    "metrics-gone": (gone("metrics.jsonl"), "metrics.jsonl lacks lines"),
    "metrics-folder": (folder("metrics.jsonl"), "Is a directory"),
    "heartbeat-folder": (folder(BEAT), "Is a directory"),
    "heartbeat-half": (half(BEAT), "heartbeat.json cannot be used"),
    "score-text": (record(SCORE, frechet_distance="low"), "holds no score"),
    "score-unsigned": (record(SCORE, frechet_distance=1.5, self_sha256="gone"), "has no self_sha256"),
    "score-as-of-old": (lambda run: old_score(run, seed=1, num_samples=9), "says num_samples 9 instead of "),
    "score-folder": (folder(SCORE), "holds no score"),
    "scores-file": (file("eval"), "Not a directory"),
    "samples-file": (file("samples"), "Not a directory"),
    **{f"{name}-link": (link(name), "a link to /nowhere, where") for name in ("samples", "eval", "run.json")},
    "run-unknown-key": (record("run.json", launch={"colour": "red"}, self_sha256="gone"), "is signed no more"),
    "run-edited": (record("run.json", name="other"), "not as it was written"),
    "run-no-data": (record("run.json", data=[]), "data = […]"),
    "run-nested": (put("run.json", '{"a":' * 100_000), "nested"),
    "run-gone": (gone("run.json"), "is missing"),
    "run-folder": (folder("run.json"), "Is a directory"),
    "config-emptied": (put("config.yaml", ""), "config.yaml"),
    "config-changed": (replace("config.yaml", "lr: 0.001", "lr: 0.002"), "config.yaml was changed"),
    "config-older": (
        replace("config.yaml", "total_steps: 400", "total_steps: 300"),
        "says 300 steps, and 400 are saved",
    ),
    "config-gone": (gone("config.yaml"), "config.yaml"),
    "config-folder": (folder("config.yaml"), "config.yaml"),
    "checkpoint-short": (half(f"{NEWEST}.pt"), "is not whole"),
    "checkpoint-gone": (gone(f"{NEWEST}.pt"), "is missing beside its manifest"),
    "manifest-half": (half(f"{NEWEST}.json"), "not JSON"),
    "manifest-gone": (gone(f"{NEWEST}.json"), "events tell of a checkpoint at step 400"),
    "checkpoints-file": (file("checkpoints"), "Not a directory"),
    "request-shards": (record(REQUEST, shards={"a": 1}), ""),
}
"""Of a finished run: what is done to it, and what status says."""


@pytest.fixture(scope="module")
def damaged(finished: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A run for each damage, and a whole one."""
    shell = Shell(tmp_path_factory.mktemp("damaged"))
    shutil.copytree(finished.root / "tiny", shell.root / "whole")
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(finished.root / "tiny", shell.root / name)
        damage(shell.root / name)
    return shell


def test_status_shows_every_damaged_run_with_a_line_of_what_is_wrong(damaged: Shell) -> None:
    before = snapshot(damaged.root)
    done = damaged("status", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows.keys() == {"whole", *DAMAGES}
    assert rows["whole"]["problem"] is None
    told = {name: rows[name]["problem"] or "" for name in DAMAGES}
    assert {name: told[name] for name, (_, expected) in DAMAGES.items() if expected not in told[name]} == {}
    assert all(rows[name]["step"] == 400 for name in DAMAGES if name != "checkpoints-file" and "heartbeat" not in name)
    table = damaged("status")
    assert table.returncode == 0 and table.stderr == ""
    assert all(f"{name}: " in table.stdout for name, (_, told) in DAMAGES.items() if told)
    assert snapshot(damaged.root) == before


def test_a_damaged_run_has_a_page_that_tells_of_it(damaged: Shell) -> None:
    read_alike = ("event-", "heartbeat-")  # status reads them for both
    for name, (_, told) in ((n, d) for n, d in DAMAGES.items() if not n.startswith(read_alike)):
        run = RunDir(damaged.root / name)
        html = page.of_run(facts.read(run, describe(run, None)))
        assert "This cannot be shown" not in html and "make it again" in html, name
        assert told.casefold() in unescape(html).casefold(), name


def test_what_a_finished_chain_prints_names_a_score_of_other_samples(
    damaged: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("score-as-of-old", "score-unsigned"):
        run = RunDir(damaged.root / name)
        print_results(run, reading.of_run(run), ["sample", "evaluate"])
        out = capsys.readouterr().out
        assert "none that holds" in out and DAMAGES[name][1] in out and "Fréchet distance" not in out, out


def test_a_model_card_tells_no_score_of_other_samples(damaged: Shell, tmp_path: Path) -> None:
    done = damaged("export", "score-as-of-old", str(tmp_path / "model"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "None was computed of these weights." in (tmp_path / "model" / "README.md").read_text()


def test_a_run_that_lacks_what_is_exported_is_refused(damaged: Shell) -> None:
    for name, told in (
        ("checkpoints-file", "Not a directory: "),
        ("config-gone", "config.yaml is missing: restore it"),
    ):
        assert told in damaged.refused("export", name, "out")


def test_status_lists_the_events_of_damaged_runs(damaged: Shell) -> None:
    for how in ([], ["--json"]):
        done = damaged("status", "--events", *how)
        assert done.returncode == 0 and "Traceback" not in done.stderr
        assert "event-without-time: line 1 of events/9.0.jsonl cannot be used (no time)" in done.stderr
        assert done.stdout.count("finished") >= len(DAMAGES) - 3


def test_a_folder_of_another_user_is_a_line_beside_the_others(again: Shell) -> None:
    (again.root / "theirs").mkdir(mode=0)
    done = as_a_user(again, "status", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["tiny"]["state"] == "complete" and rows["tiny"]["problem"] is None
    assert rows["theirs"]["state"] == "unreadable"
    assert rows["theirs"]["problem"].startswith(f"Permission denied: {again.root / 'theirs'}")


@pytest.mark.parametrize("streams", [">&- 2>&- <&-", ">&-", "2>&-", "<&-"])
def test_closed_standard_streams_harm_nobody(again: Shell, streams: str) -> None:
    before = snapshot(again.root)
    argv, options = again.command("status")
    line = " ".join(f"'{word}'" for word in argv)
    done = subprocess.run(["/bin/sh", "-c", f"exec {line} {streams}"], capture_output=True, text=True, **options)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert snapshot(again.root) == before


READ_WHOLE = {
    **{"config.yaml": "config.yaml", "run.json": "run.json", BEAT: BEAT, "metrics.jsonl": "metrics.jsonl"},
    **{"events/9.0.jsonl": "events/9.0.jsonl", f"{NEWEST}.json": "step-000000400.json", SCORE: f"{TINY_SET}.json"},
}
"""Files of a run, and by which name it is told that one is damaged."""


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def of_six_gigabytes(path: Path) -> None:
    path.touch()
    os.truncate(path, 6 << 30)


@pytest.mark.parametrize("make", [a_fifo, endless, of_six_gigabytes])
def test_nobody_waits_for_what_lies_in_a_files_place_nor_reads_it_without_end(
    finished: Shell, shell: Shell, make: Break
) -> None:
    for file in READ_WHOLE:
        run = shell.root / file.replace("/", "-")
        shutil.copytree(finished.root / "tiny", run)
        (run / file).unlink(missing_ok=True)
        make(run / file)
    argv, options = shell.command("status", "--json")
    limited = ["/bin/sh", "-c", 'ulimit -v 6000000; exec "$@"', "sh", *argv]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = {row["name"]: row["problem"] or "" for row in json.loads(done.stdout)}
    assert [f for f, name in READ_WHOLE.items() if name not in told[f.replace("/", "-")]] == [], told


@pytest.mark.long
def test_a_job_ends_with_a_word_where_a_fifo_lies_in_a_files_place(again: Shell) -> None:
    run = again.root / "tiny"
    (run / f"{NEWEST}.json").unlink()  # else there is nothing to do
    for file in ("config.yaml", "run.json", "fence", "metrics.jsonl"):
        whole = (run / file).read_bytes()
        (run / file).unlink()
        a_fifo(run / file)
        done = again("jobs", "train", str(run))
        assert done.returncode == 78 and f"{file}: a FIFO, and no file" in done.stdout, done.stdout + done.stderr
        (run / file).unlink()
        (run / file).write_bytes(whole)
