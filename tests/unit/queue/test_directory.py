"""launch/queue/directory.py: what a later submission may change of a run's record."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm.config import reading
from ddpm.config.yaml import dump_yaml, load_yaml
from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from ddpm.run.records import data_of, read_run
from launch import prepare
from launch.cluster.site import Notify, Site
from launch.queue import directory
from tests.training import make_config


def test_a_run_keeps_its_test_split_and_a_submission_with_another_is_refused(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), make_config()
    data = {"cache": str(tmp_path), "digest": "d"}

    def record(**test: str) -> dict[str, Any]:
        inputs = {"data": {**data, **({"test": test} if test else {})}, "labels": {}}
        return directory.describe(config, Site(), run, inputs)

    directory.create_run(run, config, record())
    for given, kept in (
        (record(key="k", digest="t"), "k"),  # from the first that validates on
        (record(), "k"),  # without validation
        (record(key="touched", digest="t"), "touched"),
    ):
        directory.update_run(run, config, given)
        assert data_of(run)["test"] == {"key": kept, "digest": "t"}
    frozen = run.run_json.read_bytes()
    with pytest.raises(RequestError, match=r"run run was validated on another test split \(digest t, now other\)"):
        directory.update_run(run, config, record(key="k2", digest="other"))
    assert run.run_json.read_bytes() == frozen


def test_a_run_of_other_code_gets_no_key_that_its_code_may_not_know(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), make_config()
    inputs = {"data": {"cache": str(tmp_path), "digest": "d"}, "labels": {}}
    directory.create_run(run, config, directory.describe(config, Site(), run, inputs))
    whole = load_yaml(run.config.read_text(), "")
    begun = {**whole, "log": {"every_steps": 3}, "train": {**whole["train"]}}
    del begun["evaluate"], begun["train"]["ema_warmup"]
    run.config.write_text(dump_yaml(begun))
    longer = make_config(train__total_steps=9, log__grid_images=7, log__grid_every_steps=10_000)
    directory.update_run(run, longer, directory.describe(longer, Site(), run, inputs))
    expected = {**begun, "log": {"every_steps": 3, "grid_images": 7}, "train": {**begun["train"], "total_steps": 9}}
    assert load_yaml(run.config.read_text(), "") == expected
    assert reading.of_run(run) == longer


def test_a_run_keeps_the_command_that_began_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = RunDir(tmp_path / "run"), make_config()
    inputs = {"data": {"cache": str(tmp_path), "digest": "d"}, "labels": {}}

    def submit(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["launch/submit.py", *words])
        record = directory.describe(config, Site(), run, inputs)
        (directory.update_run if run.path.exists() else directory.create_run)(run, config, record)

    submit("mine.yaml")
    submit("runs/run")
    submit("runs/run", "train.total_steps=9")
    record = read_run(run)
    assert record["first_command"][-1] == "mine.yaml" and record["command"][-1] == "train.total_steps=9"
    run.config.unlink()
    with pytest.raises(RequestError, match=r"restore it, or submit .* anew: python launch/submit.py mine.yaml$"):
        reading.of_run(run)


def test_a_lost_config_is_written_anew_by_a_submission_with_the_mathematics_that_it_had(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), make_config()
    inputs = {"data": {"cache": str(tmp_path), "digest": "d"}, "labels": {}}
    directory.create_run(run, config, directory.describe(config, Site(), run, inputs))
    for lose in (run.config.unlink, lambda: run.config.write_text("")):
        lose()
        with pytest.raises(RequestError, match="restore it, or submit"):
            prepare.check_existing(run, make_config(train__lr=0.5))
        assert prepare.check_existing(run, config) and "written anew" in prepare.told_of_changes(run, config)[0]
        directory.write_lost(run, config)
        assert reading.of_run(run) == config
    directory.write_lost(run, make_config(log__every_steps=2))  # none is lost
    assert reading.of_run(run) == config


def test_what_a_later_submission_changes_in_the_config_is_told_and_kept_with_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = RunDir(tmp_path / "run"), make_config()
    record = directory.describe(config, Site(), run, {"data": {"cache": str(tmp_path), "digest": "d"}, "labels": {}})
    directory.create_run(run, config, record)
    assert prepare.told_of_changes(run, config) == []
    changed = make_config(train__deterministic=False, log__every_steps=2)
    (line,) = prepare.told_of_changes(run, changed)  # nothing is trained yet: there are no bits to differ from
    assert line == "its config changes: train.deterministic=false (it was auto), log.every_steps=2 (it was 3)"
    monkeypatch.setattr(RunDir, "latest_step", lambda self: 7)
    assert prepare.told_of_changes(run, make_config(log__every_steps=2))[1:] == []
    for key, value in (("train__deterministic", True), ("train__compile", False), ("train__micro_batch", 1)):
        bits = prepare.told_of_changes(run, make_config(**{key: value}))[1]
        assert bits.startswith(f"with another {key.replace('__', '.')} the bits after step 7 are not those"), bits
    directory.update_run(run, changed, record)
    directory.update_run(run, changed, record)
    directory.update_run(run, config, record)
    first, second = read_run(run)["changes"]
    assert first["keys"] == {"train.deterministic": ["auto", False], "log.every_steps": [3, 2]} and first["step"] == 7
    assert second["keys"] == {"train.deterministic": [False, "auto"], "log.every_steps": [2, 3]}


@pytest.mark.parametrize("text", ["no JSON", '{"mail": 3}', "[]"])
def test_whom_to_tell_that_cannot_be_read_is_said_when_the_run_is_sent_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    run, config = RunDir(tmp_path / "run"), make_config()
    inputs = {"data": {"cache": str(tmp_path), "digest": "d"}, "labels": {}}
    directory.create_run(run, config, directory.describe(config, Site(), run, inputs), told=Notify(mail="me@x.org"))
    args = argparse.Namespace(cluster=None, partition=None, profile=None)
    assert directory.base_of(run, args)["notify"] == {"mail": "me@x.org"} and capsys.readouterr().err == ""
    run.notify.write_text(text)
    assert "notify" not in directory.base_of(run, args)
    told = capsys.readouterr().err
    assert f"warning: {run.notify} " in told and "nobody is told of the run's end" in told and "--profile" in told


def commit_of(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """As run.json of a run from that checkout tells it."""
    monkeypatch.setattr(directory, "PROJECT", checkout)
    found: str | None = directory.describe(make_config(), Site(), RunDir(checkout / "run"), {})["git"]
    return found


def test_the_commit_of_a_checkout_that_is_another_users_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert re.fullmatch("[0-9a-f]{40}", str(commit_of(tmp_path, monkeypatch)))


@pytest.mark.parametrize("said", ["detected dubious ownership in repository at", "unsafe repository"])
def test_where_an_old_git_does_not_read_such_a_checkout_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    (tmp_path / "git").write_text(f"#!/bin/sh\necho \"fatal: {said} '/x'\" >&2\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [commit_of(tmp_path, monkeypatch) for _ in range(2)] == [None, None]
    told = capsys.readouterr().err
    assert told.count("run.json will not say which commit") == 1
    assert f"git config --global --add safe.directory {tmp_path}\n" in told
