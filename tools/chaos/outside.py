"""Broken from outside: every file of a run, damaged in every way, and what people then do with the run.

Each cell of the table (moment, kind of file, damage, verb) puts the run back as it was, damages the file, and does the
verb once. Its verdict is computed by verdicts.py, from the same verb on the undamaged run. What is flipped or garbled
depends on the cell alone: a cell that passes passes again.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ddpm.errors import EXIT_FATAL
from tools.chaos import checker, verdicts
from tools.chaos.files import Result
from tools.chaos.forked import as_owner
from tools.chaos.house import BEGUN, HALF, MOMENTS, STEPS, VERBS, House, shared, stopped
from tools.chaos.verdicts import BAD, Calm, judge, watch

# ---------------------------------------------------------------- files


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda p: p.stat().st_mtime_ns)


def _step(moment: str) -> int:
    return HALF if moment == "half" else STEPS


def _packed(house: House, name: str) -> Path:
    return next(house.root.glob(f".cache/data/*/{name}"))


Find = Callable[[House, str, str], Path]
"""(house, moment, verb) -> the file; StopIteration or ValueError where there is none at that moment."""
KINDS: dict[str, Find] = {
    "config": lambda h, m, v: h.run.config,
    "start": lambda h, m, v: h.run.start,
    "run.json": lambda h, m, v: h.run.run_json,
    "events": lambda h, m, v: _newest(h.run.events, "local-*.jsonl"),
    "metrics": lambda h, m, v: h.run.metrics,
    "heartbeat": lambda h, m, v: h.run.heartbeat,
    "lock": lambda h, m, v: h.run.lock,
    "fence": lambda h, m, v: h.run.fence,
    "checkpoint": lambda h, m, v: h.run.checkpoint(_step(m)),
    "manifest": lambda h, m, v: h.run.manifest(_step(m)),
    "ema": lambda h, m, v: h.run.ema_weights(_step(m)),
    "tb": lambda h, m, v: _newest(h.run.tensorboard, "events.out.*"),
    "request": lambda h, m, v: h.set_at(m, v).request,
    "shard": lambda h, m, v: h.set_at(m, v).shard(0, 2),
    "shard manifest": lambda h, m, v: h.set_at(m, v).shard_manifest(0, 2),
    "part": lambda h, m, v: next(h.set_at(m).part.iterdir()),
    "features": lambda h, m, v: h.set_at(m, "evaluate").features("pixels", 0, 2),
    "features manifest": lambda h, m, v: h.set_at(m, "evaluate").features("pixels", 0, 2).with_suffix(".json"),
    "score": lambda h, m, v: h.run.score(h.set_at(m, "evaluate").name),
    "code": lambda h, m, v: h.run.code,
    "milestones": lambda h, m, v: h.run.milestones,
    "bound": lambda h, m, v: h.bound.request,
    "bound part": lambda h, m, v: h.bound.part(0),
    "images": lambda h, m, v: _packed(h, "images.npy"),
    "labels": lambda h, m, v: _packed(h, "labels.npy"),
    "labels' digest": lambda h, m, v: _packed(h, "labels.json"),
    "packed meta": lambda h, m, v: _packed(h, "meta.json"),
    "reference": lambda h, m, v: next(h.root.glob(".cache/data/reference/*.npz")),
}

# ---------------------------------------------------------------- damages


def _flip(path: Path, chosen: random.Random) -> None:
    """One bit. What carries no digest can only be seen to be damaged where its form is: there, of its form. Of a config
    it is one of the mathematics, whose digest run.json holds: what else it says is the user's to change."""
    raw = bytearray(path.read_bytes())
    places = range(len(raw))
    if path.suffix == ".jsonl" or path.name == "heartbeat.json":
        places = [i for i, byte in enumerate(raw) if byte in b'{}":,']  # type: ignore[assignment]
    elif path.name == "config.yaml":
        places = range(raw.index(b"\nmodel:"), raw.index(b"\ncheckpoint:"))
    raw[chosen.choice(places)] ^= 1 << chosen.randrange(7)
    path.write_bytes(raw)


def _half(path: Path, _: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def _directory(path: Path, _: random.Random) -> None:
    """With something in it: whoever makes room for the file must not remove that."""
    path.unlink()
    path.mkdir()
    (path / "kept").write_text("somebody's")


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "bit flip": _flip,
    "half": _half,
    "empty": lambda path, chosen: path.write_bytes(b""),
    "garbage": lambda path, chosen: path.write_bytes(chosen.randbytes(max(64, path.stat().st_size))),
    "gone": lambda path, chosen: path.unlink(),
    "directory": _directory,
    "unreadable": lambda path, chosen: path.chmod(0),  # for who is not root: see house.py
}

# ---------------------------------------------------------------- the table


class Cell(NamedTuple):
    moment: str
    kind: str
    damage: str
    verb: str


CELLS = [
    Cell(moment, kind, damage, verb)
    for moment in MOMENTS for kind in KINDS if (moment, kind) != ("finished", "part")
    for damage in DAMAGES for verb in VERBS
]  # fmt: skip
TOLD_OTHERWISE = {"config", "events", "metrics", "checkpoint", "manifest"}
"""Kinds after whose damage a run may honestly tell of less, or go on from an older step."""


def try_cell(house: House, cell: Cell, calm: Calm) -> str:
    """The cell's verdict."""
    house.put_back(cell.moment)
    path = KINDS[cell.kind](house, cell.moment, cell.verb)
    with as_owner():
        DAMAGES[cell.damage](path, random.Random("/".join(cell)))
    before = watch(house)
    said = house.do(cell.moment, cell.verb)
    verdict = judge(cell.verb, path, said, before, watch(house), calm)
    if verdict.startswith(BAD) or cell.kind in TOLD_OTHERWISE or not house.run.config.is_file():
        return verdict
    unsound = checker.problems(house.run)
    return f"{BAD}: {unsound[0]}" if unsound else verdict


def broken_from_outside(count: int) -> Result:
    """Every kind of file × damage × verb, on a half-done and on a finished run; fewer are chosen by a seed."""
    return _tried(CELLS, count)


def cache_damaged(_: int) -> Result:
    """A bit of the packed pixels and labels, and training and scoring with them."""
    kinds, verbs = ("images", "labels"), ("train", "evaluate")
    cells = [c for c in CELLS if c.kind in kinds and c.damage == "bit flip" and c.verb in verbs]
    return _tried(cells, len(cells))


def start_damaged(count: int) -> Result:
    """The weights that a run starts from, before its first save: afterwards nobody needs them."""
    return _tried(
        [Cell(BEGUN, "start", damage, verb) for damage in DAMAGES for verb in ("submit", "train", "status")], count
    )


def _tried(cells: list[Cell], count: int) -> Result:
    few, seed = "", int(time.time())
    if count < len(cells):
        cells, few = random.Random(seed).sample(cells, count), f" of {len(cells)}, chosen by seed {seed}"
    told: Counter[str] = Counter()
    bad: list[str] = []
    house = shared()
    for cell in cells:
        verdict = try_cell(house, cell, verdicts.undisturbed(house, cell.moment, cell.verb))
        told[verdict.partition(":")[0]] += 1
        if verdict.startswith(BAD):
            bad.append(f"{' / '.join(cell)}: {verdict}")
            print(bad[-1], flush=True)
    counts = ", ".join(f"{num} {verdict}" for verdict, num in told.most_common())
    return Result(
        f"broken from outside, {len(cells)} cells{few}",
        "same bits, named and mended, or refused in one sentence; nothing less on disk",
        counts + (f"; first bad: {bad[0]}" if bad else ""), not bad,
    )  # fmt: skip


# ---------------------------------------------------------------- more than one file


def manifests_gone(_: int) -> Result:
    """A copy that ended before the manifests: training does not start over, and removes nothing."""
    house = shared()
    house.put_back("half")
    for manifest in house.run.checkpoints.glob("*.json"):
        manifest.unlink()
    before = verdicts.watch(house)
    said = house.do("half", "train")
    after = verdicts.watch(house)
    less = sorted(path for path, content in before.content.items() if content - set().union(*after.content.values()))
    passed = said.code == EXIT_FATAL and "Traceback" not in said.text and not less
    return Result("a copy without its manifests", f"exit {EXIT_FATAL}, all that is there stays",
                  f"exit {said.code}, gone: {', '.join(less) or 'nothing'}", passed)  # fmt: skip


def one_label_changed(_: int) -> Result:
    """The last picture of one class becomes the first of the next: the same pixels in the same order, another label."""
    seen, passed = [], True
    with stopped() as house:
        (house.where / "pictures/train/a/22.png").rename(house.where / "pictures/train/b/00.png")
        for verb in ("train", "submit"):
            house.put_back("half")
            shutil.rmtree(house.root / ".cache/data")
            said = house.do("half", verb)
            model = verdicts.watch(house).products["model"]
            refused = bool(said.code) and "class" in said.text and "Traceback" not in said.text
            passed = passed and refused and model.startswith(f"{HALF} ")
            seen.append(f"{verb}: exit {said.code}, at step {model.split()[0]}")
    return Result("a picture moves to another class", "refused by name, not trained on", "; ".join(seen), passed)


ROWS = {
    # name: (row, full count, reduced count)
    "outside": (broken_from_outside, len(CELLS), len(CELLS) // 40),
    "cache-damaged": (cache_damaged, 0, 0),
    "start-damaged": (start_damaged, 21, 6),
    "manifests-gone": (manifests_gone, 0, 0),
    "label-changed": (one_label_changed, 0, 0),
}
