"""launch/prepare.py: what a submission packs, where there is no room for it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ddpm.config.reading import load
from ddpm.data import packed
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.events import EventLog
from ddpm.run.files import sign, write_json
from ddpm.run.paths import RunDir
from launch import beginning, prepare
from launch.cluster import code
from launch.cluster.scheduler import SchedulerError
from launch.cluster.site import Site
from launch.queue.directory import create_run
from launch.submission import Asked
from tests.cli.harness import TINY
from tests.training import make_config


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_its_place_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(packed, "pack", full)
    with pytest.raises(EnvironmentLacks, match=rf"No space left on device: {tmp_path}/\.cache\. Make room .* --root"):
        prepare.prepare_inputs(make_config(), Site(cluster="local"), tmp_path, [])


def test_a_run_is_idle_only_where_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs would go on with other code than they began with."""

    unanswered = Mock(side_effect=SchedulerError("squeue: no answer"))
    for in_queue, idle in ((lambda jobs: [], True), (lambda jobs: ["12", "13"], False), (unanswered, False)):
        monkeypatch.setattr(prepare, "in_queue", in_queue)
        assert prepare.is_idle(RunDir(tmp_path)) is idle


@pytest.mark.parametrize("place", ["code", "start"])
def test_a_new_run_that_meets_a_full_disk_while_it_is_begun_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"code": (code, "keep", full), "start": (beginning.local, "start", full)}[place])
    config, run = make_config(), RunDir(tmp_path / "run")
    inputs = {"data": {"digest": "d", "cache": "c", "num_images": 4}, "labels": {}}

    def begin() -> None:
        asked = Asked(run, config, config, [])
        beginning.begin(
            asked, Site(cluster="local"), inputs, None, existed=run.path.exists(), prepare_only=False, code_asked=None
        )

    with pytest.raises(OSError, match="No space"):
        begin()
    assert not run.path.exists()
    create_run(run, config, beginning.directory.describe(config, Site(cluster="local"), run, inputs))
    with pytest.raises(OSError, match="No space"):
        begin()
    assert run.config.exists() and run.run_json.exists()


def test_a_run_that_appears_while_another_of_its_name_is_begun_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a copy, or be begun by a host whose locks are its own."""

    def create(run: RunDir, *given: Any, **told: Any) -> None:
        run.checkpoints.mkdir(parents=True)
        create_run(run, *given, **told)

    monkeypatch.setattr(beginning.directory, "create_run", create)
    config, run = make_config(), RunDir(tmp_path / "run")
    inputs = {"data": {"digest": "d", "cache": "c", "num_images": 4}, "labels": {}}
    asked = Asked(run, config, config, [])
    with pytest.raises(OSError, match="not empty"):
        beginning.begin(asked, Site(cluster="local"), inputs, None, existed=False, prepare_only=False, code_asked=None)
    assert run.checkpoints.is_dir()


NEW_KEY = "    histogram_every_steps: int | None = Field(None, ge=1)\n"


def test_a_key_that_the_runs_own_code_does_not_know_is_refused_before_a_job_of_it_is_queued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, of_log = RunDir(tmp_path / "tiny"), "ddpm/config/train.py"
    for folder in (run.checkpoints, run.events, run.logs):
        folder.mkdir(parents=True)
    run.config.write_text(TINY)
    begun = load(run.config).to_yaml().replace(" histogram_every_steps: null,", "")
    assert run.config.write_text(begun) and "histogram" not in begun
    write_json(run.run_json, sign({"config_digest": load(run.config).digest(), "data": {"digest": "d", "cache": "c"}}))
    before = code.of_checkout()[of_log].decode()
    code.keep(run, {**code.of_checkout(), of_log: before.replace(NEW_KEY, "").encode()})
    assert NEW_KEY in before

    begun_with = run.config

    def submit(*words: str, code_asked: str = "kept", run: RunDir = run, data: str = "d") -> None:
        config = load(begun_with, words)
        inputs = {"data": {"digest": data, "cache": "c"}, "labels": {}}
        asked = Asked(run, config, config, [])
        beginning.write_down(asked, config, Site(cluster="local"), inputs, None, code_asked=code_asked)

    with pytest.raises(RequestError, match=r"--code 0123456789abcdef: .* has none"):
        submit(run=RunDir(tmp_path / "new"), code_asked="0123456789abcdef")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RequestError, match=r"its code .* unknown key .log.histogram_every_steps.*--code new"):
        submit("log.histogram_every_steps=10")
    assert run.config.read_text() == begun
    submit("train.total_steps=500")
    assert "total_steps: 500" in run.config.read_text() and "keeps its own" in capsys.readouterr().err
    old, packed = code.digest(code.of_run(run) or {}), run.code.read_bytes()
    with pytest.raises(RequestError, match="begun with other pixels"):
        submit("log.histogram_every_steps=10", code_asked="new", data="other")
    assert run.code.read_bytes() == packed
    submit("log.histogram_every_steps=10", code_asked="new")
    assert "histogram_every_steps: 10" in run.config.read_text()

    new = run.code.read_bytes()
    with pytest.raises(RequestError, match=f"its code {old}, .* unknown key .log.histogram_every_steps"):
        submit(code_asked=old)
    with pytest.raises(RequestError, match=rf"--code {'f' * 16}: .* has code-{old}\.zip; or give kept"):
        submit(code_asked="f" * 16)
    assert run.code.read_bytes() == new
    run.config.write_text(run.config.read_text().replace(" histogram_every_steps: 10,", ""))
    submit(code_asked=old)
    assert run.code.read_bytes() == packed and len(list(run.path.glob("code-*.zip"))) == 2
    assert f"from now on what it had before, {old}" in capsys.readouterr().out

    EventLog(run, "17", 0, "n1").append("submitted", code=code.digest(code.of_checkout()))  # before it went back
    with pytest.raises(RequestError, match=f"holds {old}, .* or take") as refused:
        submit()
    assert f"go on with what it holds, --code {old}, or" in str(refused.value)
    submit(code_asked=old)
