"""Copies of a run that is being trained, by the tools that people use, each stopped on its way, and then resumed.

What a copy holds depends on the order in which the tool takes files, and on what the run became meanwhile.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ddpm.errors import EXIT_FATAL
from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from tools.chaos.files import Result
from tools.chaos.lives import Act, at_steps, ended, final, life, new_root, prepare, same

STEP_S = 0.15
"""What each step of the original is held up, so that it trains while it is copied."""


def _until(command: list[str], num: int, where: Path) -> None:
    """Run a tool that tells of each file that it takes, in a line, and kill it at line `num`; `where`: from."""
    with subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tool:
        assert tool.stdout is not None
        for line in tool.stdout:
            num -= not line.rstrip("'\n").endswith("/")
            if num <= 0:
                break
        tool.kill()


def by_cp(source: Path, target: Path, num: int) -> None:
    _until(["cp", "-rv", ".", str(target)], num, source)


def by_rsync(source: Path, target: Path, num: int) -> None:
    _until(["rsync", "-a", "--out-format=%n", "./", f"{target}/"], num, source)


def by_rsync_reversed(source: Path, target: Path, num: int) -> None:
    """File by file: rsync sorts what it is given."""
    names = sorted((str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()), reverse=True)
    for name in names[:num]:
        subprocess.run(["rsync", "-aR", name, f"{target}/"], cwd=source, capture_output=True)


def by_tar(source: Path, target: Path, num: int) -> None:
    """Without the files' own times."""
    unpack = f"tar -cf - . | tar -xvmf - -C '{target}'"
    _until(["sh", "-c", unpack], num, source)


TOOLS: dict[str, Callable[[Path, Path, int], None]] = {
    "cp -r": by_cp, "rsync": by_rsync, "rsync reversed": by_rsync_reversed, "tar -m": by_tar,
}  # fmt: skip


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def contents(run: RunDir) -> dict[str, str]:
    """Every file of a run by its digest."""
    return {
        str(p.relative_to(run.path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(run.path.rglob("*"))
        if p.is_file()
    }


def of_a_running_run(count: int) -> Result:
    """Copies by cp, rsync in both orders and tar, stopped after each tenth file, resumed: the same bits, or refused.

    Fails where a copy that tells of saved steps begins at step 0, where a checkpoint in it is gone afterwards, or
    where anything of the original changes.
    """
    tools = [t for t in TOOLS if shutil.which(t.split()[0])]
    total = 60 + 5 * count
    options = (f"train.total_steps={total}", "checkpoint.every_steps=3", "checkpoint.keep_last=99")
    with new_root() as root:
        run = prepare(root, "run", *options)
        copied = root / "copied"
        acts: dict[int, Act] = dict.fromkeys(range(1, total - 1), lambda _: time.sleep(STEP_S))
        pid = life(run, at_steps({**acts, total - 1: lambda _: _wait_for(copied)}))
        while run.latest_step() < total // 3:
            time.sleep(0.05)
        copies = []
        for stop in range(10, 10 * count + 1, 10):
            for tool in tools:
                copy = RunDir(root / f"{tool.replace(' ', '')}-{stop}")
                copy.path.mkdir()
                TOOLS[tool](run.path, copy.path, stop)
                copies.append(copy)
        copied.touch()
        code, before = ended(pid), contents(run)
        bad, resumed, refused = [], 0, 0
        for copy in copies:
            wrong = _resume(copy, run)
            resumed, refused = resumed + (wrong == "resumed"), refused + (wrong == "refused")
            bad += [f"{copy.name}: {wrong}"] if wrong not in ("resumed", "refused") else []
        touched = contents(run) != before
    seen = f"{len(copies)} copies by {', '.join(tools)}: {resumed} with the original's bits, {refused} refused"
    seen += f", {len(bad)} neither ({bad[0]})" if bad else ""
    seen += ", the original has changed" if touched else ""
    passed = code == 0 and not bad and not touched and resumed > 0 and refused > 0
    return Result("copies of a running run, each stopped at a tenth file",
                  "the original's bits or refused; nothing of either lost", seen, passed)  # fmt: skip


def _resume(copy: RunDir, original: RunDir) -> str:
    """One life of a copy: "resumed" where it ends as the original did, "refused", or what is wrong."""
    before = contents(copy)
    told = any(e.get("event") == "checkpoint" for e in read_events(copy))
    saved = {digest for name, digest in before.items() if name.endswith(".pt")}
    lived = sum(e.get("event") == "started" for e in read_events(copy))
    copy.logs.mkdir(exist_ok=True)
    code = ended(life(copy))
    after = contents(copy)
    if gone := saved - set(after.values()):
        return f"{len(gone)} checkpoints of it are gone"
    if code in (2, EXIT_FATAL):
        return "refused"
    if code:
        return f"exit code {code}"
    if (told or saved) and sum(e.get("event") == "started" for e in read_events(copy)) > lived:
        return "begun at step 0, though it tells of saved steps"
    return "resumed" if same(final(copy), final(original)) else "it ends with other bits"


ROWS: dict[str, tuple[Callable[[int], Result], int, int]] = {
    # name: (row, full count, reduced count)
    "copies": (of_a_running_run, 9, 2),
}
