"""A run's page: made by the script as a user types it, and looked at in a real browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from ddpm.run.files import sign
from tests.browser import Browser, browser
from tests.cli.harness import TINY_SET, Shell, snapshot

HOSTILE = "<img src=x onerror=alert(1)>"


def changed(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(sign({**json.loads(path.read_text()), **fields})))


@pytest.fixture(scope="module")
def reported(finished: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A finished run with a page, a copy of it full of markup, with one too, and a page of both."""
    shell = Shell(tmp_path_factory.mktemp("reported"))
    run, hostile = shell.root / "tiny", shell.root / HOSTILE
    shutil.copytree(finished.root, shell.root)
    shutil.copytree(run, hostile)
    text = (hostile / "config.yaml").read_text()
    (hostile / "config.yaml").write_text(
        text.replace("path: null", f"path: '/{HOSTILE}'").replace("seed: 0", "seed: 1")
    )
    script = f"<script>hit()</script>{HOSTILE}"
    changed(hostile / "run.json", labels={"classes": {script: 1, "]]>": 2}}, git=script, versions={script: script})
    with (hostile / "events" / "9.0.jsonl").open("w") as file:
        time = "2100-01-01T00:00:00.000Z"
        file.write(
            json.dumps({"event": "resumed", "time": time, "job": script, "restart": 0, "host": script, "step": 4})
        )
    before = snapshot(shell.root)
    for args in (["tiny"], [str(hostile)], ["tiny", str(hostile)]):
        done = shell("report", *args)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    after = snapshot(shell.root)
    made = {f"{name}/report.html" for name in ("tiny", HOSTILE)} | {"comparison.html"}
    assert after.keys() - before.keys() == made and {k: after[k] for k in before} == before
    return shell


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def test_a_page_says_what_a_run_is_and_loads_nothing(reported: Shell) -> None:
    html = (reported.root / "tiny" / "report.html").read_text()
    assert len(html) < 300_000
    assert (
        re.findall(r'(?:src|href)="(?!data:)[^"]*"|url\(|@import|<script|<link(?! rel="icon" href="data:)', html) == []
    )
    for words in ("Fréchet distance", "25 vs train", TINY_SET, "finished", "Goodput", "digits", "model.base_channels"):
        assert words in html, words
    assert html.count("<svg") == 4 and "This cannot be shown" not in html  # three curves, and the timeline


def test_its_commands_are_those_that_made_it(reported: Shell) -> None:
    html = (reported.root / "tiny" / "report.html").read_text()
    blocks = re.findall(r'<pre class="command"[^>]*>(.*?)</pre>', html)
    typed = [shlex.split(unescape(re.sub("<[^>]*>", "", line))) for block in blocks for line in block.split("</div>")]
    (again,) = [words for words in typed if words[1:2] == ["launch/sample.py"]]
    same = reported("sample", *again[2:])
    assert same.returncode == 0 and f"sample set {TINY_SET} is complete" in same.stdout, same.stderr
    other = reported("sample", *[word if word != "25" else "24" for word in again[2:]])
    assert other.returncode == 2 and "num_samples is 25 there and 24 asked for" in other.stderr
    submitted = next(words for words in typed if words[1].endswith("submit.py"))
    assert submitted[2:] == ["tiny.yaml", "--cluster", "local", "--then", "sample,evaluate", "--wait"]


def test_a_comparison_of_runs_of_another_root_lies_beside_them(reported: Shell, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(reported.root / "tiny", tmp_path / "theirs" / name)
    done = reported("report", f"{tmp_path}/theirs/a", f"{tmp_path}/theirs/b")
    assert done.returncode == 0 and (tmp_path / "theirs" / "comparison.html").exists(), done.stdout + done.stderr


def test_a_page_goes_where_it_is_asked_to_and_over_nothing_but_pages(reported: Shell) -> None:
    done = reported("report", "tiny", "--out", "mine.html")
    assert done.returncode == 0 and (reported.cwd / "mine.html").is_file() and "file://" in done.stdout
    (reported.cwd / "mine.html").unlink()
    assert "must end in .html" in reported.refused(
        "report", "tiny", "--out", str(reported.root / "tiny" / "config.yaml")
    )
    assert "there is no folder" in reported.refused("report", "tiny", "--out", "nowhere/mine.html")
    assert "no run 'other'" in reported.refused("report", "other")


@pytest.mark.parametrize("page", ["tiny/report.html", f"{HOSTILE}/report.html", "comparison.html"])
def test_in_a_browser_a_page_is_whole_at_every_width_and_nothing_in_it_runs(
    reported: Shell, chromium: Browser, page: str, tmp_path: Path
) -> None:
    chromium.asked.clear()
    colours = set()
    for width, dark, scripts in ((1200, False, True), (390, True, True), (390, False, False)):
        chromium.open(reported.root / page, width, dark=dark, scripts=scripts)
        assert chromium.ask("document.documentElement.scrollWidth") <= width
        cut = chromium.ask("[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")
        assert width < 1200 or page.startswith(HOSTILE) or not cut
        assert chromium.ask("document.title") and "Fréchet distance" in chromium.ask("document.body.innerText")
        assert chromium.ask("document.querySelectorAll('script, [onerror]').length") == 0
        assert chromium.ask("[...document.images].every(i => i.complete && i.naturalWidth)")
        colours.add(chromium.ask("getComputedStyle(document.body).backgroundColor"))
    assert colours == {"rgb(255, 255, 255)", "rgb(22, 22, 22)"}
    asked = {url for url in chromium.asked if not url.startswith("data:")}
    assert asked == {(reported.root / page).as_uri()} and chromium.told == []
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
