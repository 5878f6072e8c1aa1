#!/usr/bin/env python
"""Check a run file by file, and repair one that was copied in part, purged or damaged."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from itertools import groupby
from os import getpid
from pathlib import Path

from ddpm.config import reading
from ddpm.errors import DDPMError, EnvironmentLacks, NodeUnfit, RequestError, RunBusy
from ddpm.run import generations
from ddpm.run.fence import Fence
from ddpm.run.files import DamagedFile, fsync_dir, link_to_nothing, read_signed
from ddpm.run.log import counted
from ddpm.run.paths import RunDir, listed
from ddpm.run.state import finished_step
from launch.cluster import environment
from launch.queue import borrowing, chain, work
from launch.terminal import console, faults, inspection

EXAMPLES = """examples:
  python launch/recover.py cifar10                  what holds, each file that is damaged or missing; changes nothing
  python launch/recover.py cifar10 --rebuild        make manifests for checkpoints that prove themselves
  python launch/recover.py cifar10 --start-over     move what training wrote into runs/cifar10/set-aside-TIME/

Bring back what another copy of the run still has: rsync -a --checksum THERE/ runs/cifar10/. Exit code: 0 if every file
holds, 1 if one does not.
"""
BAD = ("damaged", "missing", "unread")
UNREAD = [("have it readable, then again", "permissions, groups, or a file system that fails at the moment")]
"""What can be done while something cannot be read: it may be whole, and nothing is to be made anew for it."""
OF_TRAINING = ("checkpoints", "events", "tb", "grids", "samples", "eval", "heartbeat.json")
"""What --start-over moves away, with metrics*. Config, run.json and logs stay."""


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a name or a directory")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--rebuild", action="store_true", help="make manifests for checkpoints whose content proves itself"
    )
    what.add_argument(
        "--start-over",
        action="store_true",
        help="move what training wrote aside, so that it starts at step 0; loses nothing",
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each file that holds too")
    parser.add_root()
    return parser.parse_args()


def find(word: str, root: str | None) -> RunDir:
    """A run, also one that has lost its run.json. Raises RequestError."""
    for path in (Path(word).expanduser().absolute(), environment.runs_root(root) / word):
        if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
            return RunDir(path)
    return console.find_run(word, root)


def check_own(run: RunDir) -> None:
    """Raises RequestError where the checkpoints are another run's: its lock and fence guard them, not this one's."""
    other: str | Path | None = None
    with suppress(DamagedFile):
        other = borrowing.reads(run)
    there = run.checkpoints.resolve().parent
    if other is None and there != run.path.resolve() and (there / "config.yaml").is_file():
        other = there  # without its run.json too
    if other is not None:
        raise RequestError(
            f"{run.path} has the checkpoints of {other}: nothing was changed; whoever may write that one recovers it "
            f"there, and what was made of it here (samples, eval) stays as it is"
        )


@contextmanager
def held(run: RunDir) -> Iterator[Fence]:
    """Within: no job writes the run. Raises RequestError where one does or will, or where it is another's."""
    check_own(run)
    if chain.is_training(run):
        raise RequestError(f"run {run.name} is at work or in the queue: end it first ({work.to_end(run)})")
    try:
        fence = Fence(run, {"job": f"recover-{getpid()}", "restart": 0, "host": environment.host()}, wait_s=0)
    except RunBusy as e:
        raise RequestError(str(e)) from None
    except NodeUnfit as e:
        raise EnvironmentLacks(str(e)) from None
    try:
        yield fence
    finally:
        fence.release()


def check(run: RunDir, *, verbose: bool) -> int:
    """What holds, in numbers or file by file (`verbose`), then each file that does not, and what can be done."""
    bad: list[inspection.Line] = []
    good = newest = 0
    for room, of_room in groupby(inspection.look(run), key=lambda line: line.what.partition("/")[0]):
        here = list(of_room)
        holding = [line for line in here if line.verdict == "holds"]
        bad += [line for line in here if line.verdict in BAD]
        good += len(holding)
        saved = [re.fullmatch(r"checkpoints/step-(\d+)", line.what) for line in holding]
        newest = max([newest, *(int(found[1]) for found in saved if found)])
        told = [line for line in here if line.verdict not in BAD]
        if len(holding) > 1 and not verbose:
            more = inspection.Line("holds", f"{room}/", f"{counted(len(holding), 'file')}")
            told = [more, *(line for line in told if line not in holding)]
        _print(run, told)
    _print(run, bad)
    if bad:
        print("What can be done:")
        unread = any(line.verdict == "unread" for line in bad)
        for what, how in UNREAD if unread else remedies(run, [line.what for line in bad]):
            print(f"  {what:30}{how}")
    do = "does" if len(bad) == 1 else "do"
    summary = f"{len(bad)} of these {len(bad) + good} {do} not hold" if bad else f"all {good} of these hold"
    averaged = f"checkpoints/{run.ema_weights(newest).name}" not in [line.what for line in bad]
    print(f"{summary}: {way_on(run, newest, averaged=averaged)}")
    return 1 if bad else 0


def remedies(run: RunDir, bad: list[str]) -> list[tuple[str, str]]:
    """What can be done about what does not hold, and how: only what helps with that."""
    path = run.quoted
    rooms = {what.partition("/")[0] for what in bad}
    found = [("bring back what is missing", f"rsync -a --checksum WHERE-IT-IS/ {path}/")]
    links = [what for what in bad if link_to_nothing(run.path / what.rstrip("/"))]
    found += [("mend the link", f"ln -sfn WHERE-IT-IS {path}/{link.rstrip('/')}") for link in links]
    averages = {what for what in bad if what.startswith("checkpoints/ema-")}  # a submission makes the last ones anew
    if averages == {what for what in bad if what.startswith("checkpoints/")}:
        rooms -= {"checkpoints"}
    if "checkpoints" in rooms and not links:
        found.append(("make manifests", f"python launch/recover.py {path} --rebuild   (of what proves itself)"))
    if rooms & {"checkpoints", "events"} and not rooms & {"config.yaml", "run.json"}:
        found.append(("start over on purpose", f"python launch/recover.py {path} --start-over   (loses nothing)"))
    shards = (re.fullmatch(r"samples/([^/]+)/shard-.*", what) for what in bad)
    for name in dict.fromkeys(shard[1] for shard in shards if shard):
        found.append(("make damaged shards again", f"python launch/sample.py {path} --set {shlex.quote(name)}"))
    return found


def _print(run: RunDir, lines: list[inspection.Line]) -> None:
    for line in lines:  # the path is said once, not in each line, but where a command has it
        why = re.sub(rf"(?<!rwX )(?<!rwX '){re.escape(str(run.path))}/", "", line.why)
        print(f"{line.verdict:8} {line.what}{f': {why}' if why else ''}", flush=True)


def way_on(run: RunDir, newest: int, *, averaged: bool = True) -> str:
    """What a submission of the run would do now. newest: the step of its newest checkpoint that holds, or 0. averaged:
    whether its averaged weights do."""
    try:
        other = borrowing.reads(run)
        if other:
            return f"it reads the checkpoints of {other}, and is sampled and scored here"
        generations.check_there(run)
        config = reading.of_run(run)
        if averaged and finished_step(run, config) == newest > 0:
            return f"the run is complete at step {newest}"
    except (DDPMError, DamagedFile, OSError) as e:
        return f"it cannot go on as it is: {(faults.words(e) or str(e)).splitlines()[0]}"
    if not newest and run.steps_saved():
        return "a submission would be refused (none of its checkpoints holds)"
    begins = f"goes on from step {newest}" if newest else "begins at step 0"
    return f"submit it again, and it {begins} of {config.train.total_steps}"


def rebuild(run: RunDir) -> int:
    """Manifests for each .pt that has none, or a damaged one, and proves itself."""
    config, failed = reading.of_run(run), 0
    with held(run) as fence:
        lacking = []
        for path in sorted(p for p in listed(run.checkpoints) if p.match("step-*.pt")):
            digits = path.stem[5:]
            step = int(digits) if digits.isdecimal() and len(digits) < 19 else -1
            if path != run.checkpoint(step):
                print(f"odd      {path}: no checkpoint is called that, left as it is")
            elif not _has_manifest(run, step):
                lacking.append(step)
        if lacking:
            from ddpm.training.proof import rebuild_manifest
        for step in lacking:
            path = run.manifest(step)
            try:
                rebuild_manifest(run, step, config, fence, print)
                print(f"rebuilt  {path}")
            except (DamagedFile, OSError) as e:  # a link to nothing too
                failed += 1
                print(f"damaged  {e}: left as it is")
    if not lacking:
        print("every checkpoint has its manifest: nothing to rebuild (without --rebuild: whether they hold)")
    elif failed < len(lacking):
        print(f"{len(lacking) - failed} of {len(lacking)} rebuilt: {way_on(run, run.latest_step())}")
    return 1 if failed else 0


def _has_manifest(run: RunDir, step: int) -> bool:
    try:
        return bool(read_signed(run.manifest(step)))
    except (DamagedFile, OSError):
        return False


def start_over(run: RunDir) -> int:
    """Killed in between, what is left still tells that the run was saved, and the same command goes on."""
    aside = run.path / f"set-aside-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    with held(run):
        moved = [p for p in [*(run.path / name for name in OF_TRAINING), *sorted(run.path.glob("metrics*"))]
                 if p.is_file() or (p.is_dir() and any(p.iterdir())) or link_to_nothing(p)]  # fmt: skip
        if not moved:
            print("nothing of it was trained: submit it again")
            return 0
        aside.mkdir()
        for path in sorted(moved, key=lambda p: not p.is_symlink()):  # what may fail comes before anything is moved
            if path.is_symlink():
                _set_aside_beyond(path, aside)
            else:
                path.rename(aside / path.name)
                if path.suffix == "":
                    path.mkdir()
        fsync_dir(aside)
        fsync_dir(run.path)
    print(f"set aside in {aside}: {', '.join(p.name for p in moved)}")
    print(f"{way_on(run, 0)}; nothing removes what was set aside")
    return 0


def _set_aside_beyond(link: Path, aside: Path) -> None:
    """What lies elsewhere stays on its disk: a folder gets another name there, and the link leads to an empty one."""
    there = link.resolve()
    if there.is_dir():
        kept = there.with_name(f"{there.name}-{aside.name}")
        there.rename(kept)
        there.mkdir()
        fsync_dir(there.parent)
    else:
        kept = there
        link.unlink()
        if link.suffix == "":
            link.mkdir()
    (aside / link.name).symlink_to(kept)


def main() -> int:
    args = parse()
    run = find(args.run, args.root)
    if args.rebuild:
        return rebuild(run)
    return start_over(run) if args.start_over else check(run, verbose=args.verbose)


if __name__ == "__main__":
    console.run_script(main)
