"""ddpm/training/telemetry.py: no metrics line twice and none missing, whatever happened to the writer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.errors import RunBusy
from ddpm.run.files import read_json, read_jsonl
from ddpm.run.paths import RunDir
from ddpm.training import telemetry
from ddpm.training.telemetry import Telemetry
from tests.training import make_config


def opened(run: RunDir, step: int, **options: Any) -> Telemetry:
    every = options.pop("every_steps", step or 1)
    config = make_config(train__total_steps=100, log__every_steps=every)
    usual = {"owner": {"job": "1", "restart": 0, "host": "h"}, "logged_step": 0, "may_publish": lambda: None}
    return Telemetry(config, run, step=step, **{**usual, **options})


def line(step: int) -> dict[str, Any]:
    return {
        **{"step": step, "images": step, "epoch": 0.0, "loss": 0.1 + step, "grad_norm": 1.0, "lr": 1e-3},
        **{"images_per_s": 1.0, "gpu_memory_gib": None},
    }


def steps(run: RunDir) -> list[int]:
    return [r["step"] for r in read_jsonl(run.metrics)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    class Board:
        def __getattr__(self, _: str) -> Any:
            return lambda *args, **kw: None

    monkeypatch.setattr(Telemetry, "board", property(lambda self: Board()))
    return RunDir(tmp_path)


def test_lines_past_the_resumed_step_are_dropped_and_written_again(run: RunDir) -> None:
    first = opened(run, 0)
    for step in (1, 2, 3):
        first.log(line(step))
    first.close()
    second = opened(run, 2)
    assert steps(run) == [1, 2]
    second.log(line(3))
    second.close()
    assert steps(run) == [1, 2, 3]


def test_a_torn_last_line_does_not_spoil_the_next(run: RunDir) -> None:
    first = opened(run, 0)
    first.log(line(1))
    first.close()
    with run.metrics.open("a") as f:
        f.write('{"step": 2, "lo')
    opened(run, 1).log(line(2))
    assert [json.loads(text)["step"] for text in run.metrics.read_text().splitlines()] == [1, 2]


def test_a_line_that_cannot_be_read_is_named_once_and_kept_aside(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(run, 0)
    for step in (1, 2, 3):
        first.log(line(step))
    first.close()
    lines = run.metrics.read_bytes().split(b"\n")
    run.metrics.write_bytes(b"\n".join([lines[0], b'{"loss": 1}', lines[1].replace(b"1.0", b'"x"', 1), *lines[2:]]))
    capsys.readouterr()
    opened(run, 3).close()
    told = capsys.readouterr().out
    assert told.count("line 2 of metrics.jsonl cannot be used (no step), nor 1 more") == 1
    assert steps(run) == [1, 3]
    aside = run.path / "metrics.unread"
    assert aside.read_bytes().startswith(b'{"loss": 1}\n{"step": 2,')
    opened(run, 3).close()
    assert "cannot be used" not in capsys.readouterr().out


@pytest.mark.parametrize(("there", "told"), [
    ([3, 2, 1], "metrics.jsonl has lines out of order: put in order"),
    ([1, 2, 3, 1, 2, 3], "metrics.jsonl has lines twice: put in order"),
])  # fmt: skip
def test_lines_that_are_out_of_order_or_twice_are_put_in_order_once(
    run: RunDir, capsys: pytest.CaptureFixture[str], there: list[int], told: str
) -> None:
    run.metrics.write_text("".join(json.dumps({**line(s), "time": "2026-11-20T09:00:00.000Z"}) + "\n" for s in there))
    opened(run, 3).close()
    assert steps(run) == [1, 2, 3] and told in capsys.readouterr().out
    opened(run, 3).close()
    assert capsys.readouterr().out == "" and not (run.path / "metrics.unread").exists()


def test_of_two_lines_of_a_step_the_last_stays_and_the_other_is_kept_aside(run: RunDir) -> None:
    two = [{**line(1), "time": "2026-11-20T09:00:00.000Z", "loss": loss} for loss in (0.5, 0.7)]
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in two))
    (run.path / "metrics.unread").mkdir()  # in the way
    opened(run, 1).close()
    assert read_jsonl(run.metrics) == two[1:] and read_jsonl(run.path / "metrics.unread" / "metrics.unread") == two[:1]


@pytest.mark.parametrize(("kept", "gap"), [([1, 2], "from 2 to 3"), ([1, 3], "from 1 to 3"), ([], "from 0 to 3")])
def test_lines_that_are_missing_before_the_resumed_step_are_told(
    run: RunDir, capsys: pytest.CaptureFixture[str], kept: list[int], gap: str
) -> None:
    run.metrics.write_text("".join(json.dumps({**line(s), "time": "2026-11-20T09:00:00.000Z"}) + "\n" for s in kept))
    first = opened(run, 3, logged_step=3, every_steps=1)
    first.close()
    assert f"metrics.jsonl lacks lines of the steps {gap}" in capsys.readouterr().out
    opened(run, 3, logged_step=3, every_steps=1, gap=first.gap).close()
    assert "lacks" not in capsys.readouterr().out  # after a rollback, the life has told it
    run.metrics.unlink()
    opened(run, 0).close()
    assert "lacks" not in capsys.readouterr().out


def test_what_stays_unwritable_is_told_when_it_begins(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.heartbeat.mkdir()
    t = opened(run, 0)
    for step in (1, 2, 3):
        t.heartbeat(step, {}, force=True)
    assert capsys.readouterr().out.count("heartbeat not written") == 1


def test_an_orphan_that_still_writes_adds_nothing_to_its_heirs_lines(run: RunDir) -> None:
    orphan = opened(run, 0)
    orphan.log(line(1))
    heir = opened(run, 1)
    orphan.log(line(2))
    heir.log(line(2))
    assert steps(run) == [1, 2]


def test_a_line_that_a_full_disk_refused_comes_with_the_next(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MetricsDisk(monkeypatch)
    t = opened(run, 0)
    t.log(line(1))
    disk.room = 30  # it takes a part
    t.log(line(2))
    t.log(line(3))
    with pytest.raises(OSError, match="No space"):
        t.sync()  # a checkpoint promises the lines before it
    disk.room = None
    t.log(line(4))
    assert [json.loads(text)["step"] for text in run.metrics.read_text().splitlines()] == [1, 2, 3, 4]


class MetricsDisk:
    """Under metrics.jsonl: once it has `room`, it takes so many bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        real = Path.open
        monkeypatch.setattr(Path, "open", lambda path, *how, **options: self.over(real(path, *how, **options), path))

    def over(self, file: Any, path: Path) -> Any:
        return _OnDisk(self, file) if path.name == "metrics.jsonl" and file.writable() else file


class _OnDisk:
    def __init__(self, disk: MetricsDisk, file: Any) -> None:
        self.disk, self.file = disk, file

    def write(self, data: bytes) -> int:
        if self.disk.room is None:
            return int(self.file.write(data))
        if not self.disk.room:
            raise OSError(28, "No space left on device")
        data, self.disk.room = data[: self.disk.room], max(0, self.disk.room - len(data))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class FullDisk:
    """Under TensorBoard's files: while `full`, a record gets there in part, or not at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tensorboard.compat.tensorflow_stub.io import gfile
        from tensorboard.summary.writer import event_file_writer

        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))  # in order of names
        self.full, self.room = False, 40
        real = gfile.LocalFileSystem._write

        def write(fs: Any, name: Any, content: bytes, mode: str) -> None:
            if self.full:
                real(fs, name, content[: self.room], mode)
                self.room = 0
                raise OSError(28, "No space left on device")
            real(fs, name, content, mode)

        monkeypatch.setattr(gfile.LocalFileSystem, "_write", write)


def shown(run: RunDir) -> dict[str, list[tuple[int, Any]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard), size_guidance={"images": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    images = {tag: [(e.step, e.width) for e in board.Images(tag)] for tag in board.Tags()["images"]}
    return {**scalars, **images}


@pytest.mark.parametrize("again_after_s", [0.0, 60.0])
@pytest.mark.parametrize("metrics_too", [False, True])
def test_a_full_disk_costs_tensorboard_nothing_that_this_life_has_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    metrics_too: bool,
    again_after_s: float,
) -> None:
    monkeypatch.setattr(telemetry, "BOARD_AGAIN_AFTER_S", again_after_s)
    run, disk = RunDir(tmp_path), FullDisk(monkeypatch)

    of_metrics = MetricsDisk(monkeypatch)
    earlier = opened(run, 0)
    for step in (1, 2, 3):
        earlier.log(line(step))
    earlier.close()
    t = opened(run, 2)  # the line of step 3 goes
    for step in range(3, 20):
        if step == 8:
            t.sync()
        if step == 10:
            disk.full = True
            of_metrics.room = 0 if metrics_too else None
        if step == 15:
            disk.full, of_metrics.room = False, None
        t.log({**line(step), "loss": step / 2})
        if step in (4, 12, 17):
            t.grid(step, np.full((8, step, 3), step, np.uint8))
        t.flush_board()
    t.close()
    assert steps(run) == list(range(1, 20))
    expected = [(1, 1.1), (2, 2.1), *((step, step / 2) for step in range(3, 20))]
    board = shown(run)
    assert board["train/loss"] == [(step, pytest.approx(loss)) for step, loss in expected]
    assert board["samples"] == [(step, step) for step in (4, 12, 17)]
    assert {tag for tag in board if tag != "samples"} == {
        f"train/{key}" for key in ("loss", "grad_norm", "lr", "images_per_s")
    }
    assert all([s for s, _ in board[tag]] == list(range(1, 20)) for tag in board if tag != "samples")
    out, err = capfd.readouterr()
    assert "tensorboard not written error=[Errno 28]" in out and "Traceback" not in out + err


def test_a_heartbeat_says_who_is_alive_and_where(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    t = opened(run, 0)
    t.heartbeat(3, {"loss": 0.5})
    t.heartbeat(4, {})  # within the same five seconds
    beat = read_json(run.heartbeat)
    assert beat is not None and (beat["step"], beat["job"], beat["loss"]) == (3, "1", 0.5)
    t.heartbeat(5, {}, force=True)
    assert (read_json(run.heartbeat) or {})["step"] == 5
    monkeypatch.setattr(telemetry, "HEARTBEAT_EVERY_S", 0)
    t.heartbeat(6, {})
    assert (read_json(run.heartbeat) or {})["step"] == 6


@pytest.mark.parametrize("gone", [False, True], ids=["an older copy", "removed"])
def test_lines_go_on_where_another_file_takes_the_place_of_the_one_they_went_to(
    run: RunDir, capsys: pytest.CaptureFixture[str], gone: bool
) -> None:
    earlier = opened(run, 0)
    earlier.log(line(1))
    earlier.close()
    t = opened(run, 1)
    copy = run.metrics.read_bytes()
    for step in (2, 3):
        t.log(line(step))
    run.metrics.unlink()
    if not gone:
        run.metrics.write_bytes(copy)
    capsys.readouterr()
    for step in (4, 5):
        t.log(line(step))
    assert steps(run) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("metrics.jsonl was replaced under this job") == 1
    t.close()


def test_a_file_that_was_replaced_is_whole_before_a_checkpoint_promises_its_lines(run: RunDir) -> None:
    t = opened(run, 0)
    for step in (1, 2):
        t.log(line(step))
    edited = [{**r, "loss": 0.5} for r in read_jsonl(run.metrics)][:1]
    run.metrics.unlink()
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in edited))
    t.sync()
    assert steps(run) == [1, 2]
    t.close()


def test_a_line_half_of_which_a_full_disk_took_is_whole_in_the_file_that_replaces_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = MetricsDisk(monkeypatch)
    t = opened(run, 0)
    disk.room = 30
    t.log(line(1))
    disk.room = None
    run.metrics.unlink()
    t.log(line(2))
    assert [json.loads(text)["step"] for text in run.metrics.read_text().splitlines()] == [1, 2]
    t.close()


def test_an_orphan_takes_nothing_along_once_it_may_not_publish(run: RunDir) -> None:
    def lost() -> None:
        if run.fence.exists():
            raise RunBusy("a later job has it")

    orphan = opened(run, 0, may_publish=lost)
    orphan.log(line(1))
    run.fence.touch()
    heir = opened(run, 0)
    before = run.metrics.read_bytes()
    with pytest.raises(RunBusy):
        orphan.log(line(2))
    assert run.metrics.read_bytes() == before
    heir.close()


def test_a_validation_loss_stands_in_the_log_line_of_its_step(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    t = opened(run, 0)
    t.log(line(1))
    t.log({**line(2), "validation_loss": 0.25})
    t.close()
    without, has = capsys.readouterr().out.splitlines()
    assert "validation" not in without and "loss=2.1000 validation_loss=0.2500" in has
