"""Verifies a run file by file, and changes nothing. Loads torch if there are EMA weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.config import reading
from ddpm.errors import DDPMError
from ddpm.run import evidence, generations, unfinished
from ddpm.run.events import read_events
from ddpm.run.files import (
    LINES_BYTES,
    PASSING,
    DamagedFile,
    link_to_nothing,
    open_file,
    read_bytes,
    read_json,
    read_signed,
    sha256_file,
)
from ddpm.run.log import counted
from ddpm.run.paths import BoundSet, RunDir, SampleSet, files_of_kind, listed
from ddpm.run.records import (
    has_foreign_weights,
    lost_signature,
    missing_lines,
    parse_events,
    parse_heartbeat,
    parse_metrics,
    read_run,
    usable,
)
from ddpm.sampling.parts import whole_part
from ddpm.sampling.request import Request, read_request
from ddpm.sampling.shards import verify_shard
from ddpm.scoring import bound_request
from ddpm.scoring.bound_request import BoundRequest
from ddpm.scoring.record import Score, read_score, scores_of
from launch.cluster import code
from launch.queue.sets import wrong_with
from launch.terminal import faults


class Line(NamedTuple):
    verdict: str  # holds | damaged | missing | unread | aside
    what: str
    why: str = ""


Lines = Iterator[Line]


def look(run: RunDir) -> Lines:
    """A line for every file of the run that can be verified."""
    parts = {
        **{"run.json": _records, "events/": _events, "metrics.jsonl": _life, "checkpoints/": _checkpoints},
        **{"checkpoints/ by events/": _unsaved, f"checkpoints/{unfinished.ASIDE}/": _aside, "grids/": _grids},
        **{"samples/": _samples, "bits-per-dim/": _bounds, "eval/": _scores},
    }
    for what, part in parts.items():
        yield from _going_on(what, part, run)


def _going_on(what: str, lines: Callable[..., Lines], *args: Any) -> Lines:
    """The lines of `lines(*args)`; if something cannot be read, a line that says so, and the inspection goes on."""
    try:
        yield from lines(*args)
    except (OSError, DamagedFile, DDPMError) as e:
        yield Line(_not_holding(e), what, faults.words(e) or str(e))


def _not_holding(error: Exception) -> str:
    """The verdict: what cannot be read now may be whole."""
    is_shut = isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in PASSING)
    return "unread" if is_shut else "damaged"


def _judged(what: str, check: Callable[..., object], *args: Any, needed: bool = True) -> Lines:
    """The line for one file. check(*args) raises if the file is damaged; text that it returns is added to the line."""
    try:
        more = check(*args)
        yield Line("holds", what, more if isinstance(more, str) else "")
    except FileNotFoundError as e:
        if needed:
            yield Line("missing", what, f"there is no {e.filename or what}")
    except (DamagedFile, DDPMError, OSError, KeyError, TypeError, ValueError) as e:
        yield Line(_not_holding(e), what, ((faults.words(e) or str(e)).splitlines() or [type(e).__name__])[0])


def _records(run: RunDir) -> Lines:
    yield from _judged("config.yaml", _config, run)
    yield from _judged("run.json", _record, run)
    yield from _judged("code.zip", _code, run, needed=_was_sent(run))
    yield from (line for line in _judged(run.start.name, evidence.check_start, run) if line.verdict != "holds")
    if (began := (read_json(run.run_json) or {}).get("from")) and not run.steps_saved():  # later it is of no use
        yield from _judged(run.start.name, _start, run, began)


def _config(run: RunDir) -> str:
    if not os.path.lexists(run.config):
        raise FileNotFoundError
    config, saved = reading.load(run.config), max(_saved(run), default=0)
    if config.train.total_steps is not None and config.train.total_steps < saved:
        raise DamagedFile(
            f"says {counted(config.train.total_steps, 'step')}, and {saved} are saved: it is an older one"
        )
    return config.digest()[:12]


def _saved(run: RunDir) -> list[int]:
    """Steps that were saved; none where this cannot be read, which is told of checkpoints/ alone."""
    try:
        return run.steps_saved()
    except OSError:
        return []


def _record(run: RunDir) -> None:
    if not os.path.lexists(run.run_json):
        raise FileNotFoundError
    record = read_run(run)
    if lost_signature(record):
        raise DamagedFile("is signed no more, as where it was edited by hand")
    try:
        digest, here = record.get("config_digest"), reading.load(run.config).digest()
    except DDPMError:  # told of config.yaml
        return
    if digest not in (None, here):
        raise DamagedFile(f"it is of the config {str(digest)[:12]}, and config.yaml is {here[:12]}")


def _was_sent(run: RunDir) -> bool:
    """Whether jobs were sent with a copy of the code; not where this cannot be read, which is told of events/ alone."""
    try:
        return code.last_run(run) is not None
    except OSError:
        return False


def _code(run: RunDir) -> str:
    if (kept := code.of_run(run)) is None:
        raise FileNotFoundError
    return code.digest(kept)


def _start(run: RunDir, began: dict[str, Any]) -> None:
    if sha256_file(run.start) != began["start_sha256"]:
        raise DamagedFile("is not what the run was to start from")


def _events(run: RunDir) -> Lines:
    paths = files_of_kind(run.events, ".jsonl")
    for path in paths:
        yield from _judged(f"events/{path.name}", _told, path)
    if not paths and _trained(run):
        yield Line("missing", "events/", "checkpoints are there, and no event tells of them")


def _trained(run: RunDir) -> bool:
    """Whether the run was trained here and saved, or this cannot be ruled out."""
    try:
        if has_foreign_weights(record := usable(run)) or record.get("reads"):
            return False
        return bool(run.steps_saved()) or evidence.last_saved(read_events(run)) > 0
    except OSError:
        return True


def _life(run: RunDir) -> Lines:
    trained = _trained(run)
    yield from _judged("metrics.jsonl", _metrics, run, needed=trained)
    yield from _judged("heartbeat.json", _heartbeat, run.heartbeat, needed=trained)
    yield from _judged("fence", _fence, run, needed=trained)


def _told(path: Path) -> str:
    records, wrong = parse_events(read_bytes(path, LINES_BYTES), path.name)
    return _unless(wrong, f"{counted(len(records), 'line')}")


def _metrics(run: RunDir) -> str:
    saved = max(_saved(run), default=0)  # first: a run at work writes its lines before it saves
    records, _, wrong = parse_metrics(read_bytes(run.metrics, LINES_BYTES))
    with suppress(DDPMError):  # told of config.yaml
        wrong = wrong or missing_lines(records, reading.load(run.config).log.every_steps, saved_step=saved)
    return _unless(wrong, f"{counted(len(records), 'line')}")


def _heartbeat(path: Path) -> str:
    beat, wrong = parse_heartbeat(read_bytes(path))
    return _unless(wrong, f"step {beat.get('step')}")


def _unless(wrong: str, more: str) -> str:
    if wrong:
        raise DamagedFile(wrong)
    return more


def _fence(run: RunDir) -> str:
    token = int(read_bytes(run.fence))
    known = [(read_json(run.manifest(step)) or {}).get("fence", 0) for step in _saved(run)]
    if token >= 2**63:
        raise DamagedFile("is a number beyond all bounds")
    if token < max(known, default=0):
        raise DamagedFile(f"says {token}, and a checkpoint was written under {max(known)}")
    return f"{counted(token, 'writer')} so far"


def _checkpoints(run: RunDir) -> Lines:
    for step in reversed(run.steps_saved()):
        lines = [
            *_judged(f"checkpoints/step-{step:09d}", _generation, run, step),
            *_judged(f"checkpoints/{run.ema_weights(step).name}", _ema, run, step, needed=False),
        ]
        if step in run.steps_saved():  # else a run at work has removed it meanwhile
            yield from lines
    for path in run.lost_manifests():
        yield Line("damaged", f"checkpoints/{path.stem}", f"its manifest is {link_to_nothing(path)}: no checkpoint")
    for step in unfinished.alone(run):
        yield Line("damaged", f"checkpoints/step-{step:09d}", "no manifest; --rebuild makes one where it proves itself")


def _unsaved(run: RunDir) -> Lines:
    try:
        evidence.refuse_start(run)
    except evidence.Incomplete as e:
        yield Line("missing", "checkpoints/", str(e))
    saved = evidence.last_saved(read_events(run)) if run.latest_step() else 0
    told = [*unfinished.alone(run), *(int(path.stem[5:]) for path in run.lost_manifests())]  # told as damaged
    if saved > run.latest_step() and saved not in told:
        yield Line("missing", f"checkpoints/step-{saved:09d}", "events/ tells that it was saved")


def _aside(run: RunDir) -> Lines:
    if aside := listed(run.checkpoints / unfinished.ASIDE):
        yield Line(
            "aside",
            f"checkpoints/{unfinished.ASIDE}/",
            f"{counted(len(aside), 'file')}; what is moved back counts again",
        )


def _generation(run: RunDir, step: int) -> str:
    return "rebuilt manifest" if generations.verify(run, step).manifest.get("rebuilt") else ""


def _ema(run: RunDir, step: int) -> None:
    """Check that the EMA weights equal those in the checkpoint."""
    with open_file(run.ema_weights(step)) as file:
        data = file.read()
    import safetensors.torch
    import torch

    try:
        weights, saved = safetensors.torch.load(data), generations.load(run, step)["ema"]
    except Exception as e:  # safetensors and torch have their own kinds
        said = str(e).partition(". ")[0].partition("\n")[0]  # without torch's advice to unpickle it all the same
        why = faults.words(e) or said
        raise DamagedFile(f"cannot be compared with its checkpoint: {why}") from None
    if weights.keys() != saved.keys() or not all(torch.equal(weights[k], saved[k]) for k in saved):
        raise DamagedFile("is not the average that the checkpoint holds")


def _grids(run: RunDir) -> Lines:
    from ddpm.run.images import read_png  # loads Pillow

    for path in files_of_kind(run.grids, ".png"):
        yield from _judged(f"grids/{path.name}", read_png, path)


def _samples(run: RunDir) -> Lines:
    for where in run.sample_sets():
        yield from _going_on(f"samples/{where.name}", _set, run, where)


def _set(run: RunDir, where: SampleSet) -> Lines:
    name = f"samples/{where.name}"
    try:
        request = read_request(where)
    except DDPMError as e:
        yield Line("damaged", f"{name}/request.json", str(e))
        return
    yield from _judged(f"{name}/request.json", _of_step, run, request)
    scored = any(not wrong_with(run, score) for score in scores_of(run, where.name))
    yield from _shards(where, request, name, scored=scored)


def _shards(where: SampleSet, request: Request, name: str, *, scored: bool) -> Lines:
    """scored: whether all of them were there once; of one alone its features tell it."""
    features = [path.stem for path in files_of_kind(where.path, ".npy")]
    for i in range(request.shards):
        shard = where.shard(i, request.shards)
        was_there = scored or any(made.endswith(shard.stem.removeprefix("shard")) for made in features)
        if was_there or shard.exists() or where.shard_manifest(i, request.shards).exists():
            yield from _judged(f"{name}/{shard.name}", verify_shard, where, request, i)
    for path in files_of_kind(where.part, ".npz"):
        yield from _judged(f"{name}/part/{path.name}", whole_part, path, request)
    for path in files_of_kind(where.path, ".npy"):
        yield from _judged(f"{name}/{path.name}", _features, path)


def _bounds(run: RunDir) -> Lines:
    for where in run.bound_sets():
        yield from _going_on(f"bits-per-dim/{where.name}", _bound_set, run, where)


def _bound_set(run: RunDir, where: BoundSet) -> Lines:
    name = f"bits-per-dim/{where.name}"
    yield from _judged(f"{name}/request.json", lambda: _of_step(run, bound_request.read(where)))
    for path in files_of_kind(where.path, ".npy"):
        yield from _judged(f"{name}/{path.name}", _features, path)


def _of_step(run: RunDir, request: Request | BoundRequest) -> str:
    at = request.checkpoint
    return _unless(generations.of_another(run, at.step, at.sha256), f"of step {at.step}")


def _features(path: Path) -> None:
    if read_signed(path.with_suffix(".json"))["sha256"] != sha256_file(path):
        raise DamagedFile("its sha256 is not the one in its manifest")


def _scores(run: RunDir) -> Lines:
    yield from _judged("milestones.json", _milestones, run, needed=False)
    folders = [run.eval, *(p for p in listed(run.eval) if p.is_dir() and not p.name.startswith("."))]
    for path in sorted(path for folder in folders for path in files_of_kind(folder, ".json")):
        yield from _judged(str(path.relative_to(run.path)), _score, run, path)


def _milestones(run: RunDir) -> None:
    for point in read_signed(run.milestones)["curve"]:
        if why := generations.of_another(run, point["step"], point.get("sha256")):
            raise DamagedFile(why)


def _score(run: RunDir, path: Path) -> None:
    score = Score(str(path.relative_to(run.eval).with_suffix("")), path, read_score(path))
    if wrong := wrong_with(run, score):
        raise DamagedFile(wrong)
