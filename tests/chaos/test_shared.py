"""A run that users of one group share: two users, neither of them root, train it in turn, as their umasks let them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm.run.paths import RunDir
from tests.conftest import PROJECT, requires
from tools.chaos import lives

ALICE, BOB, GROUP = 61001, 61002, 61000
OPTIONS = ("train.total_steps=12", "checkpoint.every_steps=4", "log.every_steps=1")


def become(uid: int, umask: int) -> None:
    os.umask(umask)
    os.setgroups([])
    os.setgid(GROUP)
    os.setuid(uid)


def script(uid: int, umask: int, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A script, as that user runs it."""
    argv = [sys.executable, str(PROJECT / "launch" / f"{name}.py"), *args]
    return subprocess.run(
        argv, user=uid, group=GROUP, extra_groups=[], umask=umask, capture_output=True, text=True, timeout=240,
        env={**os.environ, "HOME": "/nonexistent"},
    )  # fmt: skip


def submit(uid: int, umask: int, root: Path) -> subprocess.CompletedProcess[str]:
    options = ["--cluster", "local", "--prepare", "--root", str(root), "--name", "run", *lives.TINY, *OPTIONS]
    return script(uid, umask, "submit", *options)


def life(run: RunDir, uid: int, umask: int, *more: Callable[[], object]) -> tuple[int, str]:
    """A life as that user; returns its exit code and its log."""
    log = run.path.parent.parent / f"log-{uid}"
    code = lives.ended(lives.life(run, lambda: [become(uid, umask), *(act() for act in more)], log=log))
    return code, log.read_text()


@pytest.fixture
def root() -> Iterator[Path]:
    requires(os.geteuid() == 0, "other users are needed", "run the tests as root")
    with lives.new_root() as where:
        where.chmod(0o755)
        shared = where / "runs"
        shared.mkdir()
        os.chown(shared, ALICE, GROUP)
        shared.chmod(0o2775)
        yield shared


@pytest.mark.long
def test_a_colleague_goes_on_with_a_run_under_a_umask_that_shares_it(root: Path) -> None:
    run = RunDir(root / "run")
    done = submit(ALICE, 0o002, root)
    assert done.returncode == 0, done.stdout + done.stderr
    code, log = life(run, ALICE, 0o002, lives.at_steps({6: lives.stop}))
    assert (code, run.latest_step()) == (75, 6), log
    done = submit(BOB, 0o002, root)
    assert done.returncode == 0, done.stdout + done.stderr
    code, log = life(run, BOB, 0o002)
    assert (code, run.latest_step()) == (0, 12), log
    here = [run.path, *run.path.rglob("*")]
    assert {p.stat().st_uid for p in here} == {ALICE, BOB} and {p.stat().st_gid for p in here} == {GROUP}
    closed = [p.name for p in here if not p.stat().st_mode & 0o020]
    assert closed == [], "not writable for the group"
    calm = lives.prepare(root, "calm", *OPTIONS)
    assert lives.ended(lives.life(calm)) == 0 and lives.same_end(run, calm)


def test_a_colleague_who_may_not_write_a_run_is_told_whose_it_is_and_how_to_share_it(root: Path) -> None:
    run = RunDir(root / "run")
    assert submit(ALICE, 0o022, root).returncode == 0
    code, log = life(run, ALICE, 0o022, lives.at_steps({6: lives.stop}))
    assert code == 75, log
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    code, log = life(run, BOB, 0o002)
    assert code == 78 and "Traceback" not in log, log
    assert f"belongs to uid {ALICE} (mode 2755), and this is uid {BOB}" in log and "chmod -R g+rwX" in log
    done = submit(BOB, 0o002, root)
    assert done.returncode == 2 and f"belongs to uid {ALICE}" in done.stderr and "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before
    shutil.rmtree(run.path)


def test_a_colleague_writes_a_runs_page_into_it_where_its_folder_is_shared(root: Path) -> None:
    assert submit(ALICE, 0o002, root).returncode == 0
    done = script(BOB, 0o002, "report", "run", "--root", str(root))
    page = RunDir(root / "run").report
    assert done.returncode == 0 and page.stat().st_uid == BOB, done.stdout + done.stderr
    page.unlink()
    page.parent.chmod(0o2755)
    done = script(BOB, 0o002, "report", "run", "--root", str(root))
    assert done.returncode == 2 and "belongs to" in done.stderr and "Or write elsewhere: --out" in done.stderr
    assert not page.exists()
