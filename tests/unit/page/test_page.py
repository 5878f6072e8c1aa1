"""What a page is drawn from: text that stays text, axes, curves of few points, and where the time went."""

from __future__ import annotations

import json
import math
import random
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.run.files import sign
from ddpm.run.images import write_png
from ddpm.run.paths import RunDir
from ddpm.scoring.record import Score
from launch.page import curves, lives, page, pictures, recipe, scores, side_by_side
from launch.page.axes import across, scale
from launch.page.chart import MOST_POINTS, finite, smoothed, thinned
from launch.page.clock import clock
from launch.page.facts import Facts
from launch.page.markup import Column, Html, document, table, tag
from launch.page.words import duration
from launch.terminal import goodput
from launch.terminal.card import card
from launch.terminal.comparison import print_comparison
from tests.unit.terminal.rows import row

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m"


# ---------------------------------------------------------------- text


def test_any_text_stays_text_in_elements_attributes_tables_and_titles() -> None:
    shown = [
        tag("p", HOSTILE, title=HOSTILE),
        table([Column(HOSTILE)], [[HOSTILE]]),
        document(HOSTILE, HOSTILE, style=""),
    ]
    for html in shown:
        assert "<script" not in html and "\x1b" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;\\x1b[31m" in html
    assert tag("p", Html("<b>x</b>")) == "<p><b>x</b></p>"


def test_a_table_leaves_out_columns_in_which_nothing_stands() -> None:
    html = table([Column("a"), Column("b"), Column("c", True)], [["1", "", "2"], ["3", "", ""]])
    assert re.findall(r"<th(?: [^>]*)?>(.*?)</th>", html) == ["a", "c"]


@pytest.mark.parametrize(
    ("s", "told"),
    [(0, "0 s"), (0.4, "under 1 s"), (59, "59 s"), (61, "1 min 1 s"), (725, "12 min"), (3599.9, "1 h"),
     (7320, "2 h 2 min"), (86_399, "1 d"), (273_600, "3 d 4 h"), (1_000_000, "11 d")],
)  # fmt: skip
def test_an_amount_of_time_is_told_in_at_most_two_units(s: float, told: str) -> None:
    assert duration(s) == told


# ---------------------------------------------------------------- curves


@pytest.mark.parametrize(
    ("values", "log"), [((0.0, 1.0), False), ((3.0, 3.0), False), ((0.02, 1.1), True), ((1e-290, 1e290), True),
                        ((-2.0, 7e9), False), ((0.0281, 0.0283), True)],
)  # fmt: skip
def test_an_axis_has_some_ticks_and_holds_all_values(values: tuple[float, float], log: bool) -> None:
    axis = scale(values, 200, 0, log=log)
    assert 2 <= len(axis.ticks()) <= 8
    for value in (*values, *axis.ticks()):
        assert -1e-6 <= axis(value) <= 200 + 1e-6


def test_thinning_keeps_the_extremes_and_the_last_point() -> None:
    points = [(float(i), math.sin(i) + random.Random(i).random()) for i in range(30_000)]
    points[777], points[20_001] = (777.0, 99.0), (20_001.0, -99.0)
    few = thinned(points)
    assert len(few) <= MOST_POINTS and few[-1] == points[-1] and few == sorted(few)
    assert (777.0, 99.0) in few and (20_001.0, -99.0) in few
    assert thinned(points[:50]) == points[:50]


def test_the_running_mean_is_of_neighbours_and_falls_no_sooner_than_its_values() -> None:
    steps = [(float(i), 1.0 if i < 100 else 0.0) for i in range(1000)]
    mean = dict(smoothed(steps))
    assert mean[0.0] == 1.0 and mean[80.0] == pytest.approx(1.0) and mean[120.0] == pytest.approx(0.0, abs=1e-9)
    assert 0.4 < mean[100.0] < 0.6


def metrics(num: int, **odd: Any) -> list[dict[str, Any]]:
    draw = random.Random(0)
    lines = [
        {"step": 100 * i, "loss": draw.lognormvariate(-3.5, 0.1), "grad_norm": draw.random() + 0.1, "lr": 2e-4}
        for i in range(1, num + 1)
    ]
    lines[num // 2].update(odd)
    return lines


def test_the_curves_of_800_000_steps_are_small_and_those_of_none_are_nothing() -> None:
    html = "".join(curves.charts(metrics(8000)))
    assert len(html) < 200_000 and html.count("<svg") == 3
    assert [str(c) for c in curves.charts([])] == ["", "", ""]
    assert "one line in 20" in curves.charts(metrics(50), 20)[0] and "each line" in curves.charts(metrics(50))[0]


def test_the_loss_on_held_out_images_is_drawn_where_it_was_computed() -> None:
    loss, *_ = curves.charts(metrics(50, validation_loss=0.03))
    assert loss.count("<circle") == 1 and "held-out images: 0.03 at step 2,600" in loss
    assert "held-out" not in curves.charts(metrics(50))[0]


def test_a_loss_that_is_not_finite_is_counted_and_not_drawn() -> None:
    loss, *_ = curves.charts(metrics(50, loss=math.nan))
    assert "each line (1 not finite)" in loss and "nan" not in loss
    assert finite([(1, math.inf), (2, 0.0), (3, 1.0)], positive=True) == [(3, 1.0)]


# ---------------------------------------------------------------- life

BEGAN = 1_000_000_000


def stamp(s: float) -> str:
    return datetime.fromtimestamp(BEGAN + s, timezone.utc).isoformat(timespec="milliseconds")


def event(at: float, name: str, restart: int = 0, job: str = "7", **more: Any) -> dict[str, Any]:
    return {"event": name, "time": stamp(at), "job": job, "restart": restart, "host": "n1", **more}


def facts(tmp_path: Path, events: list[dict[str, Any]], **fields: Any) -> Facts:
    state = fields.pop("state", "complete")
    given = {"record": {}, "config": None, "config_text": "", "beat": {}, "metrics": [], "every": 1, "scores": []}
    return Facts(
        run=RunDir(tmp_path),
        row=row("r", state=state),
        events=events,
        damage=(),
        made=BEGAN + 2000,
        **{**given, **fields},
    )


def a_life() -> list[dict[str, Any]]:
    """Queued for 100 s, killed after a lost 30, queued for 400 s, finished; then sampled."""
    sign = {"job": "7", "restart": 0, "time": stamp(240)}
    return [
        event(0, "submitted", stage="train"),
        event(101, "allocated", since=stamp(100), step=0),
        event(110, "started", step=0),
        event(210, "checkpoint", step=50),
        event(642, "allocated", 1, since=stamp(640), last_sign=sign, step=50),
        event(650, "resumed", 1, step=50),
        event(750, "finished", 1, step=100),
        event(760, "stage_began", job="8", stage="sample"),
        event(800, "stage_done", job="8", stage="sample"),
    ]


def test_the_life_is_told_period_by_period_and_adds_up_to_goodput(tmp_path: Path) -> None:
    of = facts(tmp_path, a_life())
    found = [(p.kind, round(p.begin - BEGAN), round(p.end - BEGAN)) for p in lives.periods(of)]
    assert found == [
        ("queued", 0, 100), ("start_up", 100, 101), ("start_up", 101, 110), ("kept", 110, 210), ("lost", 210, 240),
        ("queued", 240, 640),
        ("start_up", 640, 642), ("start_up", 642, 650), ("kept", 650, 750), ("sample", 760, 800),
    ]  # fmt: skip
    spent = goodput.breakdown(of.events, {}, of.made)
    sums = {kind: sum(end - begin for k, begin, end in found if k == kind) for kind in goodput.KINDS}
    assert spent == pytest.approx(sums)
    drawn = lives.timeline(of)
    assert drawn.count("<rect") == 8 and "training that was lost: 30 s" in drawn and drawn.count('class="save"') == 1
    rows = re.findall(r"<tr>(.*?)</tr>", lives.lives_table(of))
    assert lives.number(of) == len(rows) - 1
    assert "without a word" in rows[1] and "finished" in rows[2] and "0 – 50" in rows[1] and "50 – 100" in rows[2]


def test_a_job_that_waits_still_is_drawn_until_now(tmp_path: Path) -> None:
    (waits,) = lives.periods(facts(tmp_path, [event(0, "submitted", stage="train")], state="queued"))
    assert (waits.kind, waits.begin, waits.end) == ("queued", BEGAN, BEGAN + 2000)
    assert lives.periods(facts(tmp_path, [event(0, "submitted", stage="train")], state="cancelled")) == []


def test_a_life_of_very_many_saves_and_lives_stays_small(tmp_path: Path) -> None:
    events = [event(0, "submitted", stage="train")]
    for life in range(2000):
        begin = 100.0 * life
        events += [
            event(begin + 1, "resumed", life, since=stamp(begin), step=life),
            event(begin + 50, "checkpoint", life, step=life),
        ]
        events.append(event(begin + 60, "requeued", life, reason="time_limit"))
    of = facts(tmp_path, events)
    assert len(lives.timeline(of)) < 600_000
    assert lives.lives_table(of).count("<tr>") == lives.MOST_LIVES + 1 and "1970 earlier lives" in lives.lives_table(of)


def test_what_nobody_worked_in_takes_little_of_the_axis() -> None:
    when = clock([(0, 100), (100_000, 100_100)])
    assert when(0) == 0 and when(100) == pytest.approx(when(50_000)) and when(100_100) == pytest.approx(1)
    assert 0.45 < when(100) < 0.5 < when(100_000) < 0.55
    ((place, took),) = when.breaks()
    assert took == 99_900 and when(100) < place < when(100_000)
    assert clock([(0, 100), (105, 200)]).breaks() == []


# ---------------------------------------------------------------- scores, config, pictures


def score(name: str, step: int, value: float, num: int = 5000, **more: Any) -> Score:
    record = {
        "fid": value, "fid_interval": [value - 0.1, value + 0.1], "num_samples": num, "nfe": 100, "seed": 0,
        "reference": {"name": "cifar10", "split": "train", "digest": "d" * 64},
        "extractor": {"name": "inception", "weights_sha256": "6" * 64}, "dimensions": 2048,
        "checkpoint": {"step": step, "sha256": f"{step:064d}", "weights": "ema"},
        "sampler": {"name": "ddim", "steps": 100, "eta": 0.0, "guidance": None}, **more,
    }  # fmt: skip
    return Score(name, Path(f"{name}.json"), record)


def test_scores_that_differ_in_their_step_alone_are_a_curve_and_a_table_of_their_own() -> None:
    milestones = [score(f"milestone5000-step{step}", step, 9 - step / 100) for step in (300, 200, 100)]
    final = score("final", 300, 4.26, 50_000)
    other = score("other", 300, 4.5, 50_000, nfe=20)
    assert [[s.name for s in of] for of in scores.by_step([final, other, *milestones]).values()] == [
        [f"milestone5000-step{step}" for step in (100, 200, 300)]
    ]
    html = scores.tables([final, other, *milestones])
    assert html.index("4.26") < html.index("FID † by step") < html.index("<b>6.0")
    assert "under 10,000 samples" in html and "6666" in html and "4.16 – 4.36" in html


def test_a_sampler_is_told_with_all_that_is_not_usual_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    guided = {"name": "ancestral", "guidance": 1.5, "variance": "fixed_small", "clip_x_0": False}
    said = "ancestral (fixed_small, unclipped, guided 1.5)"
    of = score("paper", 300, 4.26, 50_000, sampler=guided, created=stamp(0))
    manifest = {"step": 300, "images": 1, "sha256": "0", "created": stamp(0)}
    assert f"<td>{said}</td>" in scores.tables([of])
    assert f"| {said} |" in card(Config(), {}, manifest, "0", [of], name="x")
    print_comparison({"paper": of.record, "other": score("other", 300, 4.5, 50_000).record}, as_json=False)
    told = capsys.readouterr().out
    assert f" {said} " in told and " 4.16 to 4.36 " in told


def test_a_card_tells_of_classes_guidance_and_the_average_where_there_are_any() -> None:
    manifest = {"step": 200, "images": 400, "sha256": "0", "created": "then"}
    tree = {"data": {"name": "images", "path": "x"}, "model": {"num_classes": 2}}
    train = {"label_dropout": 0.1, "ema_warmup": True, "warmup_steps": 0}
    told = card(Config.model_validate({**tree, "train": train}), {}, manifest, "0", [], name="x")
    assert "labels=model.classes[0]" in told and "guidance=1.5" in told
    assert "| labels | dropped with probability 0.1, for guidance |" in told
    assert "| average | decay 0.9999, warmed up |" in told
    plain = card(Config(), {}, manifest, "0", [], name="x")
    assert "labels" not in plain and "guidance" not in plain and "| average | decay 0.9999 |" in plain


def test_what_each_class_scores_stands_under_its_name() -> None:
    by_class = score("conditional", 300, 4.26, 50_000, fid_per_class=[12.34, None, 7.0])
    odd = score("odd", 300, 4.5, 50_000, fid_per_class="none")
    html = scores.tables([by_class, odd, score("plain", 100, 5.0)], ["cat", "dog & <b>"])
    assert "Class by class" in html and "dog &amp; &lt;b&gt;</th>" in html
    row = re.findall(r"<tr><td>conditional</td><td[^>]*>12.3</td><td[^>]*>–</td><td[^>]*>7.00</td></tr>", html)
    assert len(row) == 1 and re.findall(r"<th[^>]*>2</th>", html)  # a class that has no name
    assert "Class by class" not in scores.tables([odd], ["cat"])


def test_a_score_that_is_no_score_of_ours_is_counted_beside_the_others() -> None:
    odd = [
        score("odd", 1, 5.0, **{key: value}) for key, value in (("checkpoint", None), ("manifold", 3), ("sampler", 3))
    ]
    html = scores.tables([score("good", 1, 4.0), *odd])
    assert "good" in html and "3 in eval/ of another form, not shown" in html


def test_a_config_is_compared_with_the_recipe_that_its_command_named() -> None:
    def named(*words: str) -> str | None:
        found = recipe.recipe_of({"command": ["python", "launch/submit.py", *words]})
        return None if found is None else found.name

    assert named("configs/quickstart.yaml", "--cluster", "local") == "quickstart.yaml"
    assert named("--partition", "gpu") == "cifar10.yaml"
    assert named("mine.yaml") is None and named("elsewhere/cifar10.yaml") is None and recipe.recipe_of({}) is None
    first = ["python", "launch/submit.py", "configs/quickstart.yaml"]
    later = recipe.recipe_of({"command": ["python", "launch/submit.py", "runs/x"], "first_command": first})
    assert later is not None and later.name == "quickstart.yaml"
    other = Config(name="a").model_copy(update={"seed": 3})
    assert reading.differences(other, Config(name="b")) == [("name", "a", "b"), ("seed", 3, 0)]


def test_what_was_changed_in_the_config_of_a_begun_run_is_shown(tmp_path: Path) -> None:
    change = {"step": 1200, "keys": {"train.deterministic": ["auto", False], "log.wandb": [None, "mine"]}}
    html = recipe.origin(facts(tmp_path, [], record={"changes": [change]}))
    assert "from step 1,200 on train.deterministic false, before auto; from step 1,200 on log.wandb mine" in html


def test_runs_side_by_side_begin_with_the_best_and_show_what_differs(tmp_path: Path) -> None:
    def run(name: str, lr: float, loss: float, *of: Score) -> Facts:
        config = reading.of_text(f"train: {{lr: {lr}, warmup_steps: 10}}", tmp_path / f"{name}.yaml")
        rest = {"time": stamp(0), "epoch": 0, "grad_norm": 1.0, "lr": lr, "images_per_s": 1.0}
        lines = [{"step": step, "loss": loss, **rest} for step in (100, 200)]
        made = RunDir(tmp_path / name)
        made.eval.mkdir(parents=True)
        made.config.write_text(config.to_yaml())
        made.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        for one in of:
            there = {**one.record, "checkpoint": None}  # of a run that has none
            made.score(one.name).write_text(json.dumps(sign(there)))
        return facts(made.path, [], config=config, metrics=lines, scores=list(of))

    runs = [
        run("c", 4e-4, 0.3),
        run("b", 2e-4, 0.2),
        run("a", 1e-4, 0.4, score("s", 200, 5.0, 50_000, fid_interval=[4.8, 5.2])),
    ]
    html = side_by_side.of_runs(runs, tmp_path / "comparison.html")
    lines = re.findall(r"<tr><td>([abc])</td><td[^>]*>(.*?)</td>", html)
    assert lines == [("a", "0.0001"), ("b", "0.0002"), ("c", "0.0004")]
    assert "5.0 ± 0.2" in html and "from step 4 on" in html and "This cannot be shown" not in html


def test_of_a_model_of_classes_it_is_told_whose_samples_a_grid_has(tmp_path: Path) -> None:
    record = {"labels": {"classes": {"cat": 60, "dog": 60}}}
    config = Config.model_validate({"data": {"name": "images", "path": "x"}, "model": {"num_classes": 2}})
    write_png(RunDir(tmp_path).grid(1), np.zeros((8, 8, 3), np.uint8))
    assert "in turn, row by row, without guidance: cat, dog." in page.of_run(
        facts(tmp_path, [], record=record, config=config)
    )
    assert "row by row" not in page.of_run(facts(tmp_path, [], record=record, config=Config()))


def test_of_many_grids_some_are_shown_smaller_and_the_rest_and_the_broken_are_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 10):
        write_png(run.grid(step), np.zeros((1200, 8, 3), np.uint8))
    run.grid(9).write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    html = pictures.grids(run)
    assert html.count("<img") == pictures.MOST - 1 and f'height="{pictures.MOST_PIXELS}"' in html
    assert "step 1<" in html and "3 more of other steps" in html and "step-000000009.png cannot be shown" in html
    assert pictures.spread([1, 2, 3, 4, 5, 6, 7], 3) == [1, 4, 7]
    assert across([0, 0], 0, 1).high > 0
