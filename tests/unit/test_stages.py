"""`python -m tools.gpu`: its stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.terminal import console
from tests.conftest import PROJECT
from tools.gpu import __main__ as gpu


@pytest.mark.parametrize(("words", "told"), [
    (["--stages", "benhc"], "benhc; there are: checks, bench, run"),
    (["--rows", "quick", "lop"], "no row lop;"),
    (["--minutes", "0"], "--minutes 0: give a number above 0"),
    (["--stages", "run"], "--stages run: needs images"),
    (["--data", "nowhere.zip"], "--data nowhere.zip: does not exist;"),
    (["--data", "README.md"], "README.md: neither a folder, nor a .zip"),
    (["--data", "slurm"], "slurm: no images in this folder"),
    (["--out", "/dev/null/here"], "--out /dev/null/here: Not a directory;"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_any_minute_is_spent(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), *words])
    for stage in (gpu.checks, gpu.bench, gpu.trial.run):
        monkeypatch.setattr(stage.__module__ + "." + stage.__name__, lambda *_: pytest.fail("begun"))
    with pytest.raises(SystemExit) as left:
        console.run_script(gpu.main)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and told in err, err
    assert "Traceback" not in err and not out and not list(tmp_path.iterdir())


def test_figures_of_an_earlier_call_are_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench.json").write_text('{"rows": {"feed": {"notes": []}}}')
    monkeypatch.setattr(gpu, "bounded", lambda *_, **__: 0)  # there was no time for a row
    assert gpu.bench(tmp_path, 60, ["feed"]) == 1


def test_the_files_that_take_longest_and_say_most_are_begun_first_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gpu, "bounded", lambda commands, *_, **__: seen.extend(c[-1] for c in commands.values()))
    gpu.checks(tmp_path, 60)
    assert seen[: len(gpu.FIRST)] == [f"tests/gpu/test_{name}.py" for name in gpu.FIRST]
    assert sorted(seen) == sorted(str(f.relative_to(PROJECT)) for f in (PROJECT / "tests" / "gpu").glob("test_*.py"))


def test_without_images_for_the_run_the_bench_has_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--minutes", "10"])
    monkeypatch.setattr(gpu, "checks", lambda out, limit_s: 0)
    monkeypatch.setattr(gpu, "bench", lambda out, limit_s, rows: limits.append(limit_s) or 0)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.main() == 0
    assert limits == pytest.approx([600], abs=60)  # as long as this machine may take until there


def test_commands_that_no_interrupt_ends_are_killed_together_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "LEAVE_S", 2.0)
    deaf = ["/bin/sh", "-c", "trap '' INT; sleep 60; true"]
    waits: list[float] = []
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda it, timeout=None: waits.append(timeout) or wait(it, timeout))
    assert gpu.bounded({tmp_path / f"{i}.log": deaf for i in range(4)}, 1.0, at_once=4) == 124
    assert capsys.readouterr().out.count("interrupted, no time left: ") == 4
    assert len(waits) == 4 and sum(waits) < 2 * 2.0  # not 2 s for each


def test_whatever_a_check_comes_to_all_that_they_said_is_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A place that gives back few files gives back all of it."""
    monkeypatch.setattr(gpu, "LEAVE_S", 0.5)
    says = {"good": "echo all well", "bad": "echo broken; exit 3", "slow": "echo begun; exec sleep 60", "late": ""}
    logs = {tmp_path / "logs" / f"{name}.log": ["/bin/sh", "-c", says[name]] for name in says}
    (tmp_path / "logs").mkdir()
    assert gpu.bounded(logs, 6.0, at_once=1, into=tmp_path / "checks.log") == 124
    kept, shown = (tmp_path / "checks.log").read_text(), capsys.readouterr().out
    for told in ("-- good: exit code 0\nall well", "-- bad: exit code 3\nbroken", "-- slow: interrupted\nbegun"):
        assert told in kept and told in shown
    assert "no time left for late" in shown
    with (tmp_path / "logs" / "again.log").open("w") as log:
        log.write("all well")
    gpu.tell(tmp_path / "logs" / "again.log", "exit code 0", Path("/dev/full"))
    assert "/dev/full: No space left on device; it has" in capsys.readouterr().out


def test_what_checks_had_said_is_kept_where_they_are_ended_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM is told by an exception."""
    begun, sleep = tmp_path / "ranks.log", gpu.time.sleep

    def ended(seconds: float) -> None:
        sleep(seconds)
        if begun.read_text():
            sys.exit(143)

    monkeypatch.setattr(gpu.time, "sleep", ended)
    with pytest.raises(SystemExit, match="143"):
        gpu.bounded({begun: ["/bin/sh", "-c", "echo begun; exec sleep 60"]}, 60.0, into=tmp_path / "checks.log")
    assert (tmp_path / "checks.log").read_text() == "-- ranks: interrupted\nbegun\n\n"


def test_a_stage_that_breaks_takes_no_other_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--stages", "checks,bench"])
    monkeypatch.setattr(gpu, "checks", lambda out, limit_s: {}["broken"])
    monkeypatch.setattr(gpu, "bench", lambda out, limit_s, rows: 0)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.main() == 1
    assert json.loads((tmp_path / "stages.json").read_text()) == {"checks": 1, "bench": 0}
    assert "KeyError: 'broken'" in capsys.readouterr().err
