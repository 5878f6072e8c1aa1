"""`python -m tools.bench`: figures are judged by their goals, pairs have their interval, and its rows run."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ddpm.config import schema
from tools.bench import __main__ as bench
from tools.bench import commands, figures, interval, machine, measure, training
from tools.bench.counting import Operations, launched, profiled
from tools.bench.figures import Figure, Result, ratio


@pytest.fixture(autouse=True)
def variables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that what the bench sets goes after it
        monkeypatch.delenv(name)


def test_a_pairs_ratio_has_its_median_and_an_interval_where_there_are_enough() -> None:
    found = ratio("a to b", [2.0, 4.0, 6.0, 9.0, 8.0, 1e9], [1.0, 2.0, 3.0, 3.0, 4.0, 1.0])
    assert (found.value, found.low, found.high) == (2.0, 2.0, 1e9)
    assert figures.interval([1.0] * 5) == (None, None)
    assert figures.interval(list(map(float, range(12)))) == (2.0, 9.0)  # 96 %, as tables of the sign test have it


@pytest.mark.parametrize(("value", "code"), [(1.2, 0), (1.1, 1), (float("nan"), 1)])
def test_a_goal_that_is_missed_is_shown_and_ends_with_1(
    value: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = bench.Row("made-up", "", lambda _: Result([Figure("speed", value, "x", at_least=1.15, limit=3.0)]))
    monkeypatch.setattr(bench, "ROWS", (row,))
    (tmp_path / "before").write_text(json.dumps({"rows": {"made-up": {"figures": {"speed": {"value": 0.6}}}}}))
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "now"), "--against", str(tmp_path / "before")])
    assert bench.main() == code
    shown = capsys.readouterr().out
    assert ("MISSED" in shown) == bool(code) and ">= 1.15" in shown and "(before 0.6, now" in shown
    assert json.loads((tmp_path / "now").read_text())["rows"]["made-up"]["figures"]["speed"]["at_least"] == 1.15


def test_the_last_row_has_all_the_time_that_is_left_and_others_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    def run(of: measure.Bench) -> Result:
        left.append(of.ends - time.monotonic())
        return Result()

    monkeypatch.setattr(bench, "ROWS", tuple(bench.Row(name, "", run) for name in "abcd"))
    monkeypatch.setattr(sys, "argv", ["bench", "--minutes", "10"])
    assert bench.main() == 0
    assert left == pytest.approx([200, 200, 300, 600], abs=20)  # as long as such rows and this machine may take


def test_a_row_for_which_there_is_no_time_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROWS", tuple(bench.Row(name, "", lambda _: pytest.fail("run")) for name in "ab"))
    monkeypatch.setattr(sys, "argv", ["bench", "--minutes", "0"])
    assert bench.main() == 0
    assert "no time left: a, b" in capsys.readouterr().out


@pytest.mark.long
def test_a_recipe_that_fails_is_named_those_that_are_compiled_come_last_and_only_where_there_is_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a GPU has kernels for some of them."""
    long = {"cifar10-accumulate", "celeba-64"}
    taken = []

    def measured(bench: measure.Bench, name: str, *overrides: str) -> Figure:
        taken.append(name)
        if name == "celeba-32":
            raise torch.OutOfMemoryError("not one image")
        return Figure(name, 1.0)

    def resolve(config: schema.Config, *_: object) -> SimpleNamespace:
        return SimpleNamespace(compile=config.name in long)

    monkeypatch.setattr(training, "_recipe", measured)
    monkeypatch.setattr(training, "resolve", resolve)
    for seconds in (3600, 60):
        found = training.recipes(measure.Bench(torch.device("cpu"), True, time.monotonic() + seconds))
        assert found.failed and "failed: celeba-32: OutOfMemoryError: not one image" in found.notes
        assert taken[:2] == ["celeba-128", "celeba-32"] and set(taken) == {f.name for f in found.figures} | {
            "celeba-32"
        }
        if seconds == 3600:
            assert taken[-2:] == sorted(long) and len(found.notes) == 1
        else:
            assert not long & set(taken) and {f"no time left for {name}" for name in long} < set(found.notes)
        taken.clear()


@pytest.mark.parametrize("place", [".", "nowhere/kept.json"])
def test_figures_that_could_not_be_kept_are_not_measured(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROWS", (bench.Row("made-up", "", lambda _: pytest.fail("measured")),))
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / place)])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert re.search(rf"--json {tmp_path / place}: .*; give a file", capsys.readouterr().err)


def test_a_full_disk_takes_no_figures_that_were_kept_and_later_rows_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def second(_: object) -> Result:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, most[1]))
        return Result(details={"much": "x" * (1 << 17)})

    def third(_: object) -> Result:
        assert list(json.loads((tmp_path / "kept").read_text())["rows"]) == ["first"]
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        return Result()

    rows = {"first": lambda _: Result(), "second": second, "third": third}
    monkeypatch.setattr(bench, "ROWS", tuple(bench.Row(name, "", run) for name, run in rows.items()))
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "kept")])
    try:
        assert bench.main() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert "kept: File too large; it has the rows before" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "kept").read_text())["rows"]) == list(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_rows_have_the_variables_of_jobs_and_what_is_started_for_a_cpu_sees_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(bench, "ROWS", (bench.Row("made-up", "", lambda _: (seen.update(os.environ), Result())[1]),))
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu"])
    assert bench.main() == 0
    assert (seen["CUBLAS_WORKSPACE_CONFIG"], seen["CUDA_VISIBLE_DEVICES"]) == (":4096:8", "")


def test_the_roofline_is_measured_with_the_threads_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(measure.Bench, "threads", before + 1)
    try:
        machine.measure(measure.Bench(torch.device("cpu"), True, 0))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kept", ["", "{}", '{"rows": {"feed": 3}}', '{"rows": {"feed": {"figures": {"a": "b"}}}}'])
def test_what_was_not_kept_by_json_is_no_measure(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_text(kept)
    monkeypatch.setattr(sys, "argv", ["bench", "feed", "--small", "--against", str(tmp_path / "f")])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "not what --json keeps" in capsys.readouterr().err


def test_a_row_that_fails_is_named_and_a_peer_that_is_not_there_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in ((ImportError("no module named peer"), 0), (RuntimeError("broken"), 1)):

        def run(_: object, error: Exception = error) -> Result:
            raise error

        monkeypatch.setattr(bench, "ROWS", (bench.Row("made-up", "", run),))
        monkeypatch.setattr(sys, "argv", ["bench"])
        assert bench.main() == code
        assert str(error) in capsys.readouterr().out


def test_operations_and_launches_are_put_down_to_their_parts() -> None:
    x = torch.ones(3)
    with Operations() as counted:
        y = x.view(3, 1) + 1  # a view starts nothing
        with counted.within("part"):
            y.mul_(2)
            y.sum().item()
    assert dict(counted.started) == {"rest": 1, "part": 3} and dict(+counted.waits) == {"part": 1}
    with profiled(torch.device("cpu")) as prof, Operations().within("part"):
        x.mul(2)
    assert launched(prof, ("aten::mul",)) == {"part": 1}


@pytest.mark.long
def test_rows_run_on_this_machine_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, kept = ["sampler", "checkpoint", "feed", "start"], tmp_path / "f.json"
    monkeypatch.setattr(sys, "argv", ["bench", *rows, "--small", "--device", "cpu", "--json", str(kept)])
    threads = torch.get_num_threads()
    try:
        assert bench.main() == 0
    finally:
        torch.set_num_threads(threads)
    told = json.loads(kept.read_text())
    assert list(told["rows"]) == rows and told["name"] and told["cores"]
    figures = {name: value for row in told["rows"].values() for name, value in row["figures"].items()}
    assert figures["ddim: operations of a step"]["value"] == 5
    for measured in ("verifying and loading it", "a first life, until its first step"):
        assert figures[measured]["value"] > 0
    shown = capsys.readouterr().out
    assert "starting at step 0" not in shown and "ancestral: operations" in shown


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (bench, ["trainning"]),
        (bench, ["--against", "/nowhere"]),
        (interval, ["--draws", "0"]),
        (commands, ["--images", "0"]),
    ],
)
def test_what_there_is_not_is_refused(
    script: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as refused:
        script.main()
    assert refused.value.code == 2 and words[-1] in capsys.readouterr().err
