"""launch/queue/{notify,ending}.py: who is told of a run's end, and that telling harms nothing."""

from __future__ import annotations

import argparse
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.section import build
from ddpm.errors import RequestError
from ddpm.run.events import read_events
from ddpm.run.files import DamagedFile, sign, write_json
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.cluster.environment import JobEnvironment
from launch.cluster.options import add_options, load_profile, resolve
from launch.cluster.site import Notify, Site
from launch.queue import ending, notify
from tests.training import make_config

HERE = JobEnvironment("slurm", "17", 0, "n1", 0, 1, 0, "", 0, 1, None, "2026-11-20T09:00:00.000Z")
SECRET = "T0P-S3CRET"


class Ears:
    """A webhook, and SLURM's followers and mails."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.answer = 200
        self.follows: list[str] = []
        self.mails: list[tuple[str, str]] = []
        self.url = ""


@pytest.fixture
def ears(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ears]:
    ears = Ears()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ears.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(ears.answer)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    ears.url = f"http://127.0.0.1:{server.server_port}/{SECRET}"
    monkeypatch.setattr(scheduler, "followers", lambda job: ears.follows)
    monkeypatch.setattr(scheduler, "mail_at_end", lambda job, address: ears.mails.append((job, address)))
    monkeypatch.setattr(ending, "finished_step", lambda run, config: 8 if (run.path / "done").exists() else None)
    yield ears
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(run: RunDir) -> RunDir:
    for path in (run.logs, run.events, run.eval):
        path.mkdir()
    run.config.write_text(make_config().to_yaml())
    (run.path / "done").touch()
    return run


def asked(run: RunDir, **how: Any) -> None:
    notify.keep(run, build(Notify, how, "test"))


def notified(run: RunDir) -> list[tuple[str, list[str]]]:
    return [(e["what"], e["by"]) for e in read_events(run) if e["event"] == "notified"]


def test_a_finished_run_is_told_once_by_each_way_and_recorded(run: RunDir, ears: Ears, tmp_path: Path) -> None:
    out = tmp_path / "a file; touch x"
    asked(run, mail="me@x.org", url=ears.url, command=["tee", "--", str(out)])
    for _ in range(2):  # as SLURM 24.11 starts a completed job once more
        ending.of_success(run, HERE, "train", "")
    assert [h["text"] for h in ears.heard] == [f"run run has finished: step 8; {run.path}"]
    assert out.read_text() == ears.heard[0]["text"] + "\n" and ears.mails == [("17", "me@x.org")]
    assert notified(run) == [("has finished", ["mail", "command", "url"])]


def of_a_set(run: RunDir, name: str, *, shards: int, done: int, score: bool = False) -> None:
    where = run.sample_set(name)
    where.path.mkdir(parents=True)
    write_json(where.request, {"shards": shards})
    for index in range(done):
        where.shard_manifest(index, shards).touch()
    if score:
        of = {"num_samples": 9, "nfe": 4, "reference": {"name": "r"}, "extractor": {"name": "e"}}
        write_json(run.score(name), {"frechet_distance": 2.0, "sampler": {"name": "ddim"}, **of})


def of_another_runs_checkpoint(run: RunDir) -> None:
    of_a_set(run, "s", shards=1, done=1, score=True)
    run.checkpoints.mkdir()
    write_json(run.manifest(5), sign({"sha256": "a" * 64}))
    score = json.loads(run.score("s").read_text())
    write_json(run.score("s"), {**score, "checkpoint": {"step": 5, "sha256": "b" * 64}}, replace=True)


ENDS: dict[str, tuple[Callable[[RunDir, Ears], object], str, str, bool]] = {
    "trained": (lambda run, ears: None, "train", "", True),
    "trained, and samples follow": (lambda run, ears: ears.follows.append("18"), "train", "", False),
    "trained in part": (lambda run, ears: (run.path / "done").unlink(), "train", "", False),
    "stopped by its owner": (lambda run, ears: run.stop_file.touch(), "train", "", False),
    "all shards": (lambda run, ears: of_a_set(run, "s", shards=2, done=2), "sample", "s", True),
    "a task of several": (lambda run, ears: of_a_set(run, "s", shards=2, done=1), "sample", "s", False),
    "scored": (lambda run, ears: of_a_set(run, "s", shards=1, done=1, score=True), "evaluate", "s", True),
    "scored by another run": (lambda run, ears: of_another_runs_checkpoint(run), "evaluate", "s", False),
    "shards to be made again": (lambda run, ears: of_a_set(run, "s", shards=2, done=1, score=True), "evaluate", "s",
                                False),
    "not scored yet": (lambda run, ears: of_a_set(run, "s", shards=1, done=1), "evaluate", "s", False),
    "a milestone": (lambda run, ears: of_a_set(run, "milestone9-s", shards=1, done=1, score=True), "evaluate",
                    "milestone9-s", False),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_run_is_that_of_the_last_that_was_asked_for(run: RunDir, ears: Ears, end: str) -> None:
    arrange, stage, name, tells = ENDS[end]
    arrange(run, ears)
    asked(run, mail="me@x.org")
    ending.of_success(run, HERE, stage, name)
    assert bool(ears.mails) is tells


FAILURES: dict[str, tuple[Callable[[RunDir, Ears], object], str, int, bool]] = {
    "training, and what follows it": (lambda run, ears: ears.follows.append("18"), "train", 1, True),
    "for want of a training": (lambda run, ears: (run.path / "done").unlink(), "evaluate", 78, False),
    "samples that an evaluation makes again": (lambda run, ears: ears.follows.append("18"), "sample", 1, False),
    "samples alone": (lambda run, ears: None, "sample", 1, True),
    "another job has the run": (lambda run, ears: None, "train", 76, False),
    "after STOP": (lambda run, ears: run.stop_file.touch(), "train", 1, False),
}


@pytest.mark.parametrize("end", FAILURES)
def test_of_a_chain_that_failed_the_cause_is_told_alone(run: RunDir, ears: Ears, end: str) -> None:
    arrange, stage, code, tells = FAILURES[end]
    arrange(run, ears)
    asked(run, url=ears.url)
    for _ in range(2):  # tasks of an array
        ending.of_failure(run, HERE, stage, "s", code, "no more\x1b[2J memory\n" + "x" * 9999)
    assert len(ears.heard) == tells
    assert not tells or (ears.heard[0]["text"].isprintable() and len(ears.heard[0]["text"]) < 2000)


def test_a_job_that_is_held_is_told(run: RunDir, ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(run, url=ears.url)
    state = scheduler.Queued("PENDING", "BeginTime")
    monkeypatch.setattr(scheduler, "look_up", lambda jobs: {"17": state})
    ending.of_hold(run, HERE, "train", "")
    assert not ears.heard
    monkeypatch.setattr(scheduler, "look_up", lambda jobs: {})
    ending.of_hold(run, HERE, "train", "")
    assert not ears.heard
    monkeypatch.setattr(scheduler, "look_up", lambda jobs: {"17": state})
    state = scheduler.Queued("COMPLETING", "JobHeldAdmin")
    ending.of_hold(run, HERE, "train", "")
    assert "is held: train job 17: the cluster's administrators hold it" in ears.heard[0]["text"]


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError("stale"), DamagedFile("torn"), RequestError("gone")])
def test_a_run_that_cannot_be_read_is_not_called_finished_and_its_failure_is_told(
    run: RunDir, ears: Ears, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked(run, mail="me@x.org")
    monkeypatch.setattr(ending, "finished_step", failing(error))
    ending.of_success(run, HERE, "train", "")
    assert not ears.mails
    ending.of_failure(run, HERE, "evaluate", "s", 1, "no memory")
    assert ears.mails


def test_where_slurm_does_not_answer_an_end_is_told_and_a_hold_is_not(
    run: RunDir, ears: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(run, mail="me@x.org")
    for question in ("look_up", "followers"):
        monkeypatch.setattr(scheduler, question, failing(scheduler.NoAnswer("away")))
    ending.of_hold(run, HERE, "train", "")
    assert not ears.mails
    ending.of_success(run, HERE, "train", "")
    assert ears.mails


def test_a_run_that_went_away_ends_without_a_word(run: RunDir, ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(run, mail="me@x.org")
    monkeypatch.setattr(ending, "is_told_to_stop", failing(OSError("stale")))
    for end in (ending.of_success, ending.of_hold):
        end(run, HERE, "train", "")
    ending.of_failure(run, HERE, "train", "", 1, "no memory")
    assert not ears.mails


def broken_url(run: RunDir, ears: Ears) -> None:
    asked(run, url=f"http://127.0.0.1:1/{SECRET}")


def refused_url(run: RunDir, ears: Ears) -> None:
    ears.answer = 403
    asked(run, url=ears.url)


def hangs(run: RunDir, ears: Ears) -> None:
    asked(run, command=["sh", "-c", "sleep 99", SECRET])


BROKEN: dict[str, tuple[Callable[[RunDir, Ears], object], str]] = {
    "nobody listens": (broken_url, "notify.url did not work: Connection refused"),
    "refused": (refused_url, "notify.url did not work: it answered 403"),
    "a command that fails": (lambda run, ears: asked(run, command=["false", SECRET]), "exit code 1"),
    "a command that is not there": (lambda run, ears: asked(run, command=[f"/{SECRET}"]), "No such file"),
    "a command that hangs": (hangs, "had not ended after 0.2 s"),
    "torn": (lambda run, ears: run.notify.write_text(f'{{"url": "{SECRET}'), "nobody is told .*: no JSON"),
    "by hand": (lambda run, ears: run.notify.write_text(f'{{"url": ["{SECRET}"]}}'), "nobody is told"),
    "a list": (lambda run, ears: run.notify.write_text(f'["{SECRET}"]'), "nobody is told"),
    "a folder": (lambda run, ears: run.notify.mkdir(), "nobody is told"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_told_is_a_line_of_the_log_without_a_secret(
    run: RunDir, ears: Ears, case: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "LIMIT_S", 0.2)
    arrange, told = BROKEN[case]
    arrange(run, ears)
    ending.of_success(run, HERE, "train", "")
    out = "".join(capfd.readouterr())
    assert len(out.splitlines()) == 1 and SECRET not in out and SECRET not in json.dumps(read_events(run))
    assert re.search(told, out), out


def test_a_secret_lies_in_one_file_that_its_owner_alone_reads(run: RunDir) -> None:
    site = build(Site, {"notify": {"url": f"https://chat.example/{SECRET}"}}, "test")
    notify.keep(run, site.notify)
    assert run.notify.stat().st_mode & 0o777 == 0o600 and SECRET in run.notify.read_text()
    assert SECRET not in json.dumps([site.model_dump(), site.at("sample").model_dump(exclude_defaults=True)])
    notify.keep(run, Notify())
    assert not run.notify.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": f"ftp://{SECRET}"},
        {"url": f"https://me:{SECRET}@chat.example/x"},
        {"url": f"https://chat.example:{SECRET}/x"},
        {"url": f"https://[{SECRET}"},
        {"url": f"https://x/{SECRET} y"},
        {"url": [SECRET]},
        {"url": f"file:///{SECRET}"},
        {"command": SECRET},
        {"command": ["a\n", SECRET]},
        {"command": ["", SECRET]},
        {"command": [1, SECRET]},
        {"mail": "a@b.c,d@e.f"},
        {"mail": "-oQ/tmp"},
        {"mail": "a b"},
        {"mail": "$(id)@x"},
    ],
)
def test_what_nobody_can_be_told_by_is_refused_without_repeating_it(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "site.yaml").write_text(json.dumps({"notify": wrong}))
    with pytest.raises(RequestError, match=rf"notify\.{next(iter(wrong))}") as e:
        build(Site, load_profile(str(tmp_path / "site.yaml")), "profile")
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("program", [SECRET, f"/{SECRET}", f"./{SECRET}", f"~/{SECRET}"])
def test_a_program_that_is_not_there_is_told_when_the_run_is_submitted(tmp_path: Path, program: str) -> None:
    profile = tmp_path / "site.yaml"
    parser = argparse.ArgumentParser()
    add_options(parser)

    def site(cluster: str, program: str) -> Site:
        profile.write_text(json.dumps({"notify": {"command": [program, "x"]}}))
        return resolve(parser.parse_args(["--profile", str(profile), "--cluster", cluster]))

    with pytest.raises(RequestError, match=r"notify\.command: .*; give the whole path") as e:
        site("local", program)
    told = [str(e.value)]
    if program[0] in "./~" and program[0] != "/":  # wherever the job runs
        with pytest.raises(RequestError, match=r"notify\.command: its path is not a whole one"):
            site("slurm", program)
    else:
        told += site("slurm", program).warnings()
        assert "unless the nodes have it" in told[1]
    assert SECRET not in " ".join(told)
    assert site("local", "tee").warnings() == site("slurm", shutil.which("tee") or "").warnings() == []


@pytest.mark.parametrize(
    "text",
    [
        "notify: https://x/SECRET",
        "notify: [SECRET]",
        "notify: {https://SECRET: null}",
        'notify: {url: "https://x/SECRET',
        "notify: {url: https://x/SECRET: y}",
        "notify: {url: https://x/SECRET}\nnotify: {}",
        'notify: {url: &a "https://SECRET", mail: *b}',
    ],
)
def test_a_profile_that_cannot_be_read_is_refused_without_repeating_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(RequestError) as e:
        build(Site, load_profile(str(tmp_path / "site.yaml")), "profile")
    assert "SECRET" not in str(e.value)
