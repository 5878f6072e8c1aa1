"""What became of a run that was damaged and then used, computed from files and from what was said.

    same bits         the verb's products are those of the undamaged run
    named and mended  the same, and the damage was named; or what only tells of the run differs, and that was named
    refused           an exit code that says so, and one sentence that names the file
    BAD: …            silent, a traceback, a hang, less on disk than before

Products: of training the newest generation (.pt and EMA weights) and the curve; of sampling the shards; of scoring the
score. Less on disk: content that some file had before the verb, that none has after it, at a place where the undamaged
run's content is not either.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.run.files import read_jsonl
from tools.chaos.forked import Said
from tools.chaos.house import SHOWN, VERBS, House

BAD = "BAD"
REFUSALS = (2, 3, 78)
"""Exit codes: of a script for a wrong request or a machine that lacks something; of a job for `do not retry`."""
OFTEN_REPLACED = {"lock", "fence", "heartbeat.json"}
"""Signs of the present alone: the next life writes its own."""
VOLATILE = {
    *("created", "fence", "self_sha256", "command", "time", "since", "last_sign", "images_per_s", "versions", "git"),
}
"""Keys of records whose values differ from life to life."""
Content = dict[str, set[str]]
"""Path -> digests of what the file holds: of all of it, or of each record."""


@dataclass(frozen=True)
class Watched:
    """A root at one moment."""

    content: Content
    products: dict[str, str]
    """What all verbs have made: name -> digest."""


@dataclass(frozen=True)
class Calm:
    """The verb on the undamaged run."""

    said: Said
    before: Watched
    after: Watched


@functools.cache
def undisturbed(house: House, moment: str, verb: str) -> Calm:
    house.put_back(moment)
    before = watch(house)
    said = house.do(moment, verb)
    assert said.code == 0, f"the undamaged run, {verb}: exit code {said.code}: {said.text}"
    return Calm(said, before, watch(house))


# ---------------------------------------------------------------- what there is


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _steady(value: Any) -> Any:
    """A record without what a clock, a life or a machine decides."""
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in value.items() if k not in VOLATILE}
    return value


def _content(path: Path) -> set[str]:
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        return {_digest(json.dumps(_steady(record), sort_keys=True).encode()) for record in read_jsonl(path)}
    if path.suffix == ".json":
        try:
            data = json.dumps(_steady(json.loads(data)), sort_keys=True).encode()
        except ValueError:
            pass
    return {_digest(data)} if data else set()


def watch(house: House) -> Watched:
    """Read as this process, which may be root: what the verbs may not read is there all the same."""
    content = {}
    for path in sorted(house.root.rglob("*")):
        passing = path.name in OFTEN_REPLACED or path.name.startswith((".tmp-", ".fence-", ".exit-"))
        if path.is_file() and not passing and "logs" not in path.parts:
            content[str(path.relative_to(house.root))] = _content(path)
    return Watched(content, _products(house))


def _products(house: House) -> dict[str, str]:
    run, found = house.run, {}
    steps = run.steps_saved() if run.checkpoints.is_dir() else []
    if steps:
        for what, path in (("model", run.checkpoint(steps[0])), ("ema", run.ema_weights(steps[0]))):
            found[what] = f"{steps[0]} {_digest(path.read_bytes()) if path.is_file() else '-'}"
    if run.metrics.is_file():
        curve = [(r.get("step"), r.get("loss")) for r in read_jsonl(run.metrics)]
        found["curve"] = _digest(repr(curve).encode())
    for path in sorted(run.samples.glob("*/shard-*.npz")):
        found[f"samples {path.parent.name} {path.name}"] = _digest(path.read_bytes()) if path.is_file() else "-"
    for path in sorted(run.eval.glob("*.json")):
        if path.is_file():
            try:
                found[f"score {path.stem}"] = json.dumps(_steady(json.loads(path.read_bytes())), sort_keys=True)
            except ValueError:
                found[f"score {path.stem}"] = "no JSON"
    return found


PRODUCTS = {
    "submit": ("model", "ema", "curve", "samples ddim2", "score ddim2"), "train": ("model", "ema", "curve"),
    "sample": ("samples",), "evaluate": ("score",), "status": (),
}  # fmt: skip
assert PRODUCTS.keys() == VERBS.keys()


# ---------------------------------------------------------------- judging


def judge(verb: str, path: Path, said: Said, before: Watched, after: Watched, calm: Calm) -> str:
    """path: the damaged file."""
    if said.code is None:
        return f"{BAD}: hang"
    if "Traceback" in said.text or said.code < 0:
        last = next((line for line in reversed(said.text.splitlines()) if line.strip()), "")
        return f"{BAD}: traceback, exit {said.code}: {last[:200]}"
    if lost := _lost(before.content, after.content, calm):
        return f"{BAD}: less on disk, exit {said.code}: {', '.join(lost)}"
    named = _names(path, _news(said, calm))
    if said.code:
        code = _of_the_job(said) or said.code
        if code not in REFUSALS:
            return f"{BAD}: exit {said.code}: {_last(said)}"
        sentences = re.findall(r"^(?:\S+Z )?(?:failed|error): .*", said.text, re.M)
        if not named:
            return f"{BAD}: refused without naming {path.name}, exit {said.code}: {sentences or _last(said)}"
        return "refused" if sentences else f"{BAD}: refused without a sentence, exit {said.code}: {_last(said)}"
    if verb == "status":
        return _of_status(said, named, calm, gone=not os.path.lexists(path))
    wrong = _differences(verb, before.products, after.products, calm)
    if not wrong:
        return "named and mended" if named else "same bits"
    if wrong == ["curve"] and named:
        return "named and mended"
    return f"{BAD}: silent, other {', '.join(wrong)}" if not named else f"{BAD}: named, but other {', '.join(wrong)}"


def _last(said: Said) -> str:
    return " | ".join(said.text.strip().splitlines()[-2:])[:300]


def _of_the_job(said: Said) -> int | None:
    """Where a script has followed a job that failed: the job's code."""
    found = re.search(r"the job ended with exit code (-?\d+)", said.text)
    return int(found[1]) if found else None


def _news(said: Said, calm: Calm) -> str:
    """What was said that is not said of the undamaged run."""
    known = {_untimed(line) for line in calm.said.text.splitlines()}
    return "\n".join(line for line in said.text.splitlines() if _untimed(line) not in known)


def _untimed(line: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z|local-[\dT-]+|images_per_s=\S+", "", line)


def _names(path: Path, text: str) -> bool:
    """Whether what was said names the file: by its name, or a checkpoint or shard by its number, or its folder."""
    names = [path.name, path.stem]
    if found := re.fullmatch(r"(?:step|ema)-(\d+)", path.stem):
        names += [f"step={int(found[1])}", f"step {int(found[1])}"]
    if found := re.match(r"shard-(\d+)", path.stem):
        names += [f"shard={int(found[1])}", f"shard {int(found[1])}", f"shards {int(found[1])}", f"({int(found[1])})"]
    if "samples" in path.parts:
        names.append(path.parent.name)
    if ".cache" in path.parts:
        names += [path.parent.name, "cache"]
    return any(re.search(rf"(?<![\w]){re.escape(name)}", text) for name in names)


def _lost(before: Content, after: Content, calm: Calm) -> list[str]:
    there = set().union(*after.values())
    lost = []
    for path, content in before.items():
        gone = content - there
        of_calm = calm.before.content.get(path, set()) - set().union(*calm.after.content.values())
        if gone and not of_calm and not _superseded(path, after, calm):
            lost.append(f"{path} ({len(gone)})" if path.endswith(".jsonl") else path)
    return lost


def _superseded(path: str, after: Content, calm: Calm) -> bool:
    """Whether the file is there with what it had before it was damaged, or has at the undisturbed end."""
    now = after.get(path)
    return bool(now) and now in (calm.before.content.get(path), calm.after.content.get(path))


def _differences(verb: str, before: dict[str, str], after: dict[str, str], calm: Calm) -> list[str]:
    """Products of the verb that are not the undisturbed ones, or are not there.

    A curve that a verb has nothing to add to is left as it is: it is no product then.
    """
    theirs = calm.after.products
    wrong = [k for k in sorted(theirs.keys() | after.keys()) if k.startswith(PRODUCTS[verb])]
    wrong = [k for k in wrong if after.get(k) != theirs.get(k)]
    idle = calm.before.products.get("curve") == theirs.get("curve") and before.get("curve") == after.get("curve")
    return [k for k in wrong if k != "curve" or not idle]


SHOWN_AS_THERE = ("saved_step", "samples", "scores", "state")
"""What counts files: of one that is gone there is nothing to say."""
SHOWN_AS_IS = ("name", "state", "step", "saved_step", "total_steps", "samples", "scores")


def rows(text: str) -> dict[str, dict[str, Any]]:
    """What the last, the JSON view showed: name -> row."""
    shown = text.split(f"$ status {' '.join(SHOWN[-1])}\n")[1]
    return {row["name"]: row for row in json.loads(shown[shown.index("[") :])}


def _of_status(said: Said, named: bool, calm: Calm, *, gone: bool) -> str:
    try:
        ours, theirs = rows(said.text), rows(calm.said.text)
    except (ValueError, KeyError, IndexError) as e:
        return f"{BAD}: no rows: {e!r}: {_last(said)}"
    if ours.get("beside") is None or any(ours["beside"][k] != theirs["beside"][k] for k in SHOWN_AS_IS):
        return f"{BAD}: another run is shown otherwise"
    row = ours.get("run")
    wrong = SHOWN_AS_IS if row is None else [k for k in SHOWN_AS_IS if row[k] != theirs["run"][k]]
    if row and gone:
        wrong = [k for k in wrong if k not in SHOWN_AS_THERE]
    if not wrong:
        return "named and mended" if named else "same bits"
    return "named and mended" if named else f"{BAD}: silent, shows other {', '.join(wrong)}"
