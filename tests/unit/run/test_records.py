"""ddpm/run/records.py: what is no good in a run's small files is left out and named, and never copied on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ddpm.run import files, records
from ddpm.run.events import EventLog, read_events, read_events_and_damage
from ddpm.run.files import DamagedFile, sign
from ddpm.run.paths import RunDir
from ddpm.run.records import (
    identity,
    missing_lines,
    parse_events,
    parse_metrics,
    read_heartbeat,
    read_run,
    skim_metrics,
    thin_metrics,
)

BEAT = {"time": "2026-11-20T09:00:00.000Z", "step": 3, "total_steps": 9, "job": "17", "restart": 0, "host": "n1"}


def test_where_a_run_has_lost_its_record_its_weights_are_a_way_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run")
    run.checkpoints.mkdir(parents=True)
    with pytest.raises(DamagedFile, match=r"run\.json is missing: restore it, or this is no run directory$"):
        read_run(run)
    run.manifest(4).write_text("{}")
    for lose in (lambda: None, lambda: run.run_json.write_text("{")):
        lose()
        with pytest.raises(DamagedFile, match=r"restore it, or begin another run .*--from '/.*/my run', with another"):
            read_run(run)


@pytest.mark.parametrize("bad", [{"time": "soon"}, {"time": 17}, {"restart": "x"}, {"job": None}, {"step": 1.5}])
def test_a_heartbeat_that_is_no_good_is_not_copied_into_an_event(tmp_path: Path, bad: dict[str, Any]) -> None:
    run = RunDir(tmp_path)
    for beat, sign_of_life in (
        (BEAT, {k: BEAT[k] for k in ("job", "restart", "time", "step")}),
        ({**BEAT, **bad}, None),
    ):
        run.heartbeat.write_text(json.dumps(beat))
        EventLog(run, str(beat.get("job")), 1, "n1", since=BEAT["time"]).append("allocated")
        assert read_events(run)[-1]["last_sign"] == sign_of_life
        for path in run.events.iterdir():
            path.unlink()
    assert read_heartbeat(run) == {}


def test_an_odd_field_that_not_every_event_has_is_left_out_and_the_event_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    EventLog(run, "17", 0, "n1").append("requeued", step=4, progress="far", reason="crash")
    events, damage = read_events_and_damage(run)
    assert [(e["reason"], "progress" in e) for e in events] == [("crash", False)]
    assert damage == ["line 1 of events/17.0.jsonl is odd (progress = 'far')"]


def test_a_torn_line_of_events_is_told_before_the_next_is_written_and_after(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = EventLog(run, "17", 0, "n1")
    log.append("started", step=0)
    with log.path.open("ab") as f:
        f.write(b'{"event": "check')
    assert read_events_and_damage(run)[1] == ["events/17.0.jsonl ends inside a line: what its life told last is lost"]
    log.append("resumed", step=4)
    events, damage = read_events_and_damage(run)
    assert [e["event"] for e in events] == ["started", "resumed"]
    assert damage == ["line 2 of events/17.0.jsonl cannot be used (no JSON)"]


@pytest.mark.parametrize(
    ("steps", "every", "saved", "logged", "told"),
    [
        ([], 100, 0, 0, ""),
        ([], 100, 99, 0, ""),
        ([], 100, 100, 0, "from 0 to 100"),
        ([100, 200, 300], 100, 350, 0, ""),
        ([100, 200, 250], 100, 250, 0, ""),  # the end of an earlier total
        ([100, 200, 300], 100, 400, 0, "from 300 to 400"),
        ([100, 200, 300], 100, 350, 350, "from 300 to 350"),
        ([100, 300, 400], 100, 400, 0, "from 100 to 300"),
        ([200, 400, 600, 650, 700], 50, 700, 0, ""),  # the config once said 200
        ([10, 20, 30, 60, 70, 110], 10, 119, 0, "from 30 to 60, nor of 1 more"),
        ([10, 30, 40, 60, 70, 90, 100], 10, 100, 0, "from 10 to 30, nor of 2 more"),  # never three in a row
    ],
)
def test_lines_of_metrics_that_are_missing_are_found(
    steps: list[int], every: int, saved: int, logged: int, told: str
) -> None:
    found = missing_lines([{"step": s} for s in steps], every, saved_step=saved, logged_step=logged)
    assert found == "" if not told else told in found


def test_a_loss_that_was_infinite_is_a_number_and_a_word_is_none() -> None:
    line = {**dict.fromkeys(("epoch", "loss", "grad_norm", "lr", "images_per_s"), float("inf")), "step": 1}
    line["time"] = BEAT["time"]
    good, bad = json.dumps(line), json.dumps({**line, "lr": "low"})
    records, odd, told = parse_metrics(f"{good}\n{bad}\n".encode())
    assert (len(records), odd) == (1, [bad.encode()]) and "line 2" in told and "lr = 'low'" in told


def test_a_run_json_that_was_changed_is_not_trusted_unless_it_was_never_signed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(DamagedFile, match=r"run\.json is missing"):
        read_run(run)
    record = {"name": "a", "data": {"cache": "/c", "key": "k", "digest": "d", "num_images": 3}}
    run.run_json.write_text(json.dumps(sign(record)))
    assert read_run(run)["data"]["num_images"] == 3
    run.run_json.write_text(json.dumps(sign(record)).replace('"a"', '"b"'))
    with pytest.raises(DamagedFile, match="not as it was written"):
        read_run(run)
    run.run_json.write_text(json.dumps(record))
    assert read_run(run) == record


def test_a_job_is_its_id_in_words_however_an_event_has_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    EventLog(run, "18", 0, "n1", prefix="submit-").append("submitted", successor_of=17)
    sign = {"job": 16, "restart": 0, "time": BEAT["time"]}
    EventLog(run, "17", 0, "n1").append("requeued", job=17, last_sign=sign)
    events, damage = read_events_and_damage(run)
    assert [(e["job"], e.get("successor_of")) for e in events] == [("17", None), ("18", "17")] and damage == []
    assert events[0]["last_sign"]["job"] == "16"


@pytest.mark.parametrize(
    "odd",
    [{"tasks": "four"}, {"preemption": {"qos normal": 1}}, {"bad_node": 3}, {"run": 1}, {"launch": "gpu"}, {"pid": -1}],
)
def test_what_a_submission_tells_is_of_its_kind_or_left_out(tmp_path: Path, odd: dict[str, Any]) -> None:
    run = RunDir(tmp_path)
    EventLog(run, "17", 0, "n1", prefix="submit-").append("submitted", **odd)
    events, damage = read_events_and_damage(run)
    assert not odd.keys() & events[0].keys() and len(damage) == 1


def test_an_event_that_is_not_whole_is_told_and_one_without_its_newline_is_whole() -> None:
    line = b'{"event": "finished", "job": "1", "restart": 0, "time": "2026-11-20T09:00:00.000Z"}'
    assert parse_events(line + b"\n" + line[:30], "events/1.0.jsonl") == (
        parse_events(line, "")[0],
        "events/1.0.jsonl ends inside a line: what its life told last is lost",
    )
    assert parse_events(line + b"\n" + line, "x")[1] == parse_events(line + b"\n", "x")[1] == ""


def curve(steps: range) -> list[str]:
    kept = {"time": "2026-11-20T09:00:00.000Z", "epoch": 1.0, "loss": 0.1, "grad_norm": 1.0, "lr": 1e-4}
    return [json.dumps({"step": step, **kept, "images_per_s": 2.0}) for step in steps]


def test_of_a_long_curve_the_end_is_read_alone(run: RunDir) -> None:
    run.metrics.write_text("\n".join([*curve(range(10, 30_010, 10)), '{"step": 3']))
    records, begin, wrong = skim_metrics(run)
    assert (begin, wrong, records[-1]["step"]) == (records[0]["step"] - 10, "", 30_000) and len(records) < 40
    assert missing_lines(records, 10, begin=begin, saved_step=30_000) == ""
    assert "from 30000 to 40000" in missing_lines(records, 10, begin=begin, saved_step=40_000)


def test_charts_of_a_long_curve_have_each_nth_line_the_last_ones_and_what_is_rare(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = curve(range(10, 30_010, 10))
    lines[1500] = lines[1500].replace('"loss": 0.1', '"loss": NaN')
    lines[2000] = lines[2000].replace('"loss"', '"validation_loss": 0.2, "loss"')
    lines[2001] = "no line"
    run.metrics.write_text("\n".join([*lines, '{"step": 3']))
    assert thin_metrics(run) == (thin_metrics(run)[0], 1) and len(thin_metrics(run)[0]) == 2999
    monkeypatch.setattr(records, "THINNED_LINES", 100)
    kept, every = thin_metrics(run)
    steps = [record["step"] for record in kept]
    assert every > 20 and len(steps) < 200 and steps == sorted(steps)
    assert {10 + 10 * i for i in range(0, 3000, every)} <= {*steps, 20_020} and steps[-10:] == [
        *range(29_910, 30_010, 10)
    ]
    assert {15_010, 20_010} <= set(steps) and kept[steps.index(20_010)]["validation_loss"] == 0.2


def test_a_run_without_a_curve_has_none_to_thin(run: RunDir) -> None:
    assert thin_metrics(run) == ([], 1)


@pytest.mark.parametrize(("lines", "told"), [
    (curve(range(10, 200, 10)), ""),  # short
    (curve(range(20, 30_010, 10)), ""),  # its first line is missing
    ([*curve(range(10, 30_010, 10)), *curve(range(10, 30_010, 10))], "metrics.jsonl has lines twice"),
    (curve(range(30_000, 0, -10)), "metrics.jsonl has lines out of order"),
    ([*curve(range(10, 29_980, 10)), "no line", *curve(range(29_990, 30_010, 10))], "line 2998 of metrics.jsonl"),
])  # fmt: skip
def test_of_one_that_is_short_or_odd_at_an_end_all_is_read(run: RunDir, lines: list[str], told: str) -> None:
    run.metrics.write_text("\n".join(lines) + "\n")
    records, begin, wrong = skim_metrics(run)
    said = {json.loads(line)["step"] for line in lines if line.startswith("{")}
    assert begin == 0 and [r["step"] for r in records] == sorted(said) and wrong.startswith(told)
    assert bool(wrong) == bool(told)


def test_a_run_json_is_read_once_for_all_that_asks_whose_it_is_and_again_when_it_changed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    really = records.usable
    monkeypatch.setattr(records, "usable", lambda run: read.append(run.name) or really(run))
    monkeypatch.setattr(files, "SETTLED_S", 0.0)
    for at, run_id in enumerate("ab"):
        run.run_json.write_text(json.dumps(sign({"run_id": run_id, "data": {"cache": "/c", "digest": "d"}})))
        os.utime(run.run_json, (at, at))  # file times are coarse
        identity(run)["run_id"] = "of one that asks"
        assert [identity(run) for _ in range(3)] == [{"run_id": run_id, "data_digest": "d"}] * 3
        assert len(read) == at + 1
