"""launch/terminal/columns.py, view.py, history.py: lines that fit, what is told under them, and a life in few lines."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from ddpm.run.paths import RunDir
from launch.terminal import columns, history, streams, view
from launch.terminal.screen import Screen
from tests.unit.terminal.rows import PRIORITY, TOLD, of_every_kind, row


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_page_fits_and_every_column_on_it_is_whole(width: int) -> None:
    rows = of_every_kind()
    head, *lines = columns.lines(rows, width)[0]
    assert len(lines) == len(rows) and max(map(len, view.page(rows, width, details=False))) <= width
    shown = [column for column in columns.COLUMNS if column.name in head.split("  ") or f" {column.name}" in head]
    assert [column.name for column in shown][:3] == ["run", "state", "step"]
    for line, of in zip(lines, rows, strict=True):
        rest = line
        for column in shown:
            cell = next((said for form in column.forms if (said := form(of)) in rest), None)
            assert cell is not None, (column.name, line)
            rest = rest[rest.index(cell) + len(cell) :]
        assert rest.strip() == ""


@pytest.mark.parametrize(("width", "height"), [(60, 12), (80, 24), (120, 40)])
def test_a_screen_is_filled_and_the_chosen_run_is_on_it(width: int, height: int) -> None:
    screen = Screen(of_every_kind(), details=False)
    for row_ in screen.rows:
        lines = screen.lines(width, height)
        (chosen,) = [line for line in lines if line.startswith("\x1b[7m")]
        assert row_["name"] in chosen and len(lines) == height
        assert max(len(re.sub(r"\x1b\[\dm", "", line)) for line in lines) <= width
        screen.press("down")
    screen.press("s")
    assert "stop torn?" in screen.lines(width, height)[-1]
    screen.press("x")  # anything but y
    assert "q quit" in screen.lines(width, height)[-1] and not screen.left
    screen.press("q")
    assert screen.left


def test_nodes_on_which_lives_died_by_themselves_are_named_on_a_runs_page() -> None:
    error = "modul: command not found"
    page = view.page([row("cifar10", bad_nodes=["n1", "n7"], bad_nodes_error=error)], 80, details=True)
    assert page[-1] == f"cifar10: lives of it died by themselves on n1, n7: {error}"


def test_a_name_wider_than_the_terminal_is_shown_all_the_same() -> None:
    name = "x" * 100
    assert all(line.startswith((name, "run")) for line in columns.lines([row(name)], 60)[0])


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_each_score_is_shown_with_its_set_and_each_wait_with_its_reason_at_any_width(width: int) -> None:
    page = " ".join(" ".join(view.page(of_every_kind(), width, details=False)).split())
    assert "ddim100-step800000-seed0" in page and TOLD in page and "Priority" in page and "JobHeldUser" in page


def test_columns_for_which_there_is_no_room_are_named() -> None:
    rows = [row("a" * 30, jobs={"20": "RUNNING"}, stages={"20": "train"}), row("b")]
    *_, last = view.page(rows, 60, details=False)
    assert last.startswith("no room for ") and "restarts" in last and last.endswith(": --json has all")
    assert not any("no room" in line for line in view.page(rows, 200, details=False))


def test_a_terminal_that_obeys_no_escapes_is_sent_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    for kind, draws in (("xterm", True), ("screen.xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", kind)
        assert streams.draws(terminal) is draws
    assert not streams.draws(io.StringIO())


def test_a_run_whose_length_is_not_known_is_not_said_to_have_none() -> None:
    (_, line), _ = columns.lines([row("a", step=60, total_steps=0)], 80)
    assert "60/?" in line


def test_a_run_without_a_score_has_no_line_of_one() -> None:
    rows = [row("none"), row("scored", scores={"paper": {"fid": 3.17}}, scores_told={"paper": TOLD})]
    page = view.page(rows, 40, details=False)
    assert not any(line.strip() == "none:" for line in page) and any(line.startswith("scored: FID") for line in page)


def test_every_set_of_a_run_is_listed_and_each_job_with_its_stage() -> None:
    made = {"paper": {"step": 400, "told": "step 400, ancestral, 1000 steps, 25 images"},
            "cats": {"step": 200, "told": "step 200, ddim, 4 steps, 12 of 25 images"}}  # fmt: skip
    jobs = {"jobs": {"20": "RUNNING", "21": "PENDING"}, "stages": {"20": "train", "21": "sample"}}
    run = row("mine", sets=made, scores={"paper": {"fid": 3.17}}, scores_told={"paper": TOLD}, **jobs)
    page = view.page([run], 200, details=True)
    assert page[1:] == [page[1], "mine: cats: step 200, ddim, 4 steps, 12 of 25 images, no score",
                        f"mine: paper: {TOLD}, step 400"]  # fmt: skip
    assert "train 20 running, sample 21 pending" in page[1]


def test_jobs_that_wait_alike_have_one_line_and_a_set_that_is_begun_one() -> None:
    limit = {**PRIORITY, "reason": "AssocMaxJobsLimit", "next_step": "wait for one of them to end"}
    rows = [row(f"lr_{i}", jobs={f"{i}": "PENDING"}, waits=[{**limit, "job": f"{i}"}]) for i in range(1, 7)]
    told = "others are before it (AssocMaxJobsLimit): wait for one of them to end"
    assert view.page(rows, 200, details=False)[7:] == [f"jobs 1, 2, 3, 4 and 2 more wait: {told}"]
    assert view.page(rows[:1], 200, details=False)[2:] == [f"lr_1: job 1 waits: {told}"]
    both = [*rows[0]["waits"], {**limit, "job": "9"}]
    assert view.page([{**rows[0], "waits": both}], 200, details=False)[2:] == [f"lr_1: jobs 1, 9 wait: {told}"]
    run = row("mine", making={"set": "cats", "told": "0 of 25 images"})
    run["sets"] = {"cats": {"step": 200, "told": "step 200, ddim, 4 steps, 0 of 25 images"}}
    assert view.page([run], 200, details=True)[2:] == ["mine: cats: step 200, ddim, 4 steps, 0 of 25 images, no score"]
    run["making"]["told"] += ", 3.1 images/s, until 14:05"
    assert len(view.page([run], 200, details=True)) == 4


def test_the_first_score_is_shown_with_the_number_of_others() -> None:
    (_, line), _ = columns.lines([row("x", scores_told={name: f"told of {name}" for name in "acb"})], 200)
    assert line.endswith("told of a (a) +2")


def test_a_run_is_not_at_100_percent_before_it_is_done() -> None:
    (_, line), _ = columns.lines([row("a", step=799_999)], 80)
    assert " 99%" in line and "100%" not in line


def event(name: str, restart: int = 0, **fields: Any) -> dict[str, Any]:
    return {"event": name, "time": "2026-11-27T00:00:00.000Z", "job": "17", "restart": restart, **fields}


def test_saves_in_a_row_are_one_line_and_those_of_another_life_another(tmp_path: Path) -> None:
    events = [event("started"), *(event("checkpoint", step=k) for k in (10, 20, 30)), event("resumed", 1, step=30)]
    lines = list(history.lines(RunDir(tmp_path), [*events, event("checkpoint", 1, step=40)]))
    assert [line.split()[4] for line in lines] == ["started", "checkpoint", "resumed", "checkpoint"]
    assert "saves=3 step=10..30" in lines[1] and lines[3].endswith("step=40")


@pytest.mark.parametrize(("restart", "who"), [
    (0, "preempted"), (1, "requeued by hand"), (2, "scancel"), (3, "SIGTERM: preempted, cancelled or requeued"),
    (4, "scancel"),
])  # fmt: skip
def test_who_ended_a_life_is_what_slurm_says_of_it(restart: int, who: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    said = (" DUE TO PREEMPTION", " DUE TO JOB REQUEUE", " DUE to SIGNAL Terminated", None)
    word = "slurmstepd: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-27T00:00:00"
    lives = (
        f"[batch] x job=17 restart={i} host=n1\n{'' if w is None else f'{word}{w} ***'}\n" for i, w in enumerate(said)
    )
    (run.logs / "train-17.out").write_text("".join(lives))
    told = [
        event("stop_requested", restart, reason="preempted", step=9),
        *([event("cancelled", 4)] if restart == 4 else []),
    ]
    assert f"reason={who}" in next(iter(history.lines(run, told)))


def test_the_log_of_a_job_is_read_once_for_all_its_lives(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.logs.mkdir()
    said = "*** JOB 20 ON n1 CANCELLED AT 2026-11-20T09:00:00 DUE TO PREEMPTION ***"
    log = "".join(f"[batch] 2026-11-20 restart={k} n1\nslurmstepd: error: {said}\n" for k in range(50))
    (run.logs / "train-20.out").write_text(log)
    read: list[str] = []
    really = history.tail
    monkeypatch.setattr(history, "tail", lambda path, most: read.append(path.name) or really(path, most))
    base = {"event": "stop_requested", "reason": "preempted", "time": "2026-11-20T09:00:00.000Z", "job": "20"}
    told = [*history.lines(run, [{**base, "restart": k} for k in range(50)])]
    assert len(told) == 50 and all("reason=preempted" in line for line in told)
    assert read == ["train-20.out"]
