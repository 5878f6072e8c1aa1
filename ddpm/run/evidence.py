"""Whether a run without checkpoints was ever saved: restarting such a run at step 0 would lose saved work.

A life that was killed before its first save leaves events and lines of metrics, and rightly starts at step 0 again. So
only traces of saved steps count: a .pt or EMA weights that no unfinished save left here, an event of a save or after
one, samples and scores of a checkpoint; and metrics whose life has no event. A partial copy may lack any of these. The
caller says how to get back what is missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from ddpm.errors import DoNotRetry
from ddpm.run import unfinished
from ddpm.run.events import read_events
from ddpm.run.files import DamagedFile, link_to_nothing, read_json
from ddpm.run.paths import RunDir, files_of_kind, listed
from ddpm.run.records import read_metrics, usable

OF_TRAINING = ("stop_requested", "rollback")
"""Events whose step was only reached; the step of every other event had been saved."""


class Incomplete(DoNotRetry):
    """Files are missing or damaged, and training without them would lose saved work."""


def refuse_start(run: RunDir) -> None:
    """Raise Incomplete if a start at step 0 would lose saved work; OSError if the run cannot be read."""
    found = list(_told(run))
    if found and not run.steps_saved():  # a life may have saved its first while this was read
        raise Incomplete(
            f"run {run.name} has no checkpoint with a manifest, and was saved before: {'; '.join(found)}. A start at "
            f"step 0 would lose that; nothing was changed"
        )


def check_start(run: RunDir) -> None:
    """Raise Incomplete if run.json and start.safetensors do not belong together: one of them is another run's."""
    record = usable(run)
    if not record:
        return
    if "from" not in record and os.path.lexists(run.start):
        why = f"{run.start} is there, and {run.run_json} says nothing of weights that the run starts from"
    elif "from" in record and not run.start.exists() and not record.get("reads") and not run.steps_saved():
        why = f"{run.start} is missing, and {run.run_json} says that the run starts from it"
    else:
        return
    raise Incomplete(f"{why}: one of them is not this run's. Bring back its own; nothing was changed")


def last_saved(events: list[dict[str, Any]]) -> int:
    """The step of the last event that tells of a saved checkpoint; 0 if there is none."""
    return next((_step(e) for e in reversed(events) if e.get("event") in ("checkpoint", "resumed", "finished")), 0)


def _told(run: RunDir) -> Iterator[str]:
    alone = unfinished.alone(run)
    yield from (f"{run.checkpoint(step)} has no manifest" for step in alone)
    yield from (f"{path} is {link_to_nothing(path)}" for path in run.lost_manifests())
    ours = {sign.step for sign in unfinished.signs(run) if sign.is_ours}
    for path in sorted(listed(run.checkpoints)):
        match = re.fullmatch(r"ema-([0-9]{9,})\.safetensors", path.name)
        if match and int(match[1]) not in {*ours, *alone}:
            yield f"{path} has no checkpoint"
    events = read_events(run)
    if step := max((_step(e) for e in events if e.get("event") not in OF_TRAINING), default=0):
        yield f"events/ tells of saved step {step}"
    for path in [s.request for s in run.sample_sets()] + files_of_kind(run.eval, ".json"):
        made_of = (read_json(path) or {}).get("checkpoint")
        if isinstance(made_of, dict) and (step := _step(made_of)):
            yield f"{path} is of step {step}"
    if not _has_events(run, events) and any(p.name.startswith("events.out") for p in listed(run.tensorboard)):
        yield "tb/ tells of a life, and no event of it is there"
    if (step := _reached(run)) and not _has_events(run, events):
        yield f"metrics.jsonl, heartbeat.json or grids/ tell of step {step}, and no event of the life that wrote them"


def _reached(run: RunDir) -> int:
    """The last step in metrics, heartbeat and grids, which a life writes before its first save too."""
    drawn = (re.fullmatch(r"step-([0-9]{9,})\.png", p.name) for p in listed(run.grids))
    try:
        lines = [record["step"] for record in read_metrics(run)]
    except (OSError, DamagedFile):  # a directory, or another user's: it tells nothing
        lines = []
    return max(0, *lines, _step(read_json(run.heartbeat) or {}), *(int(m[1]) for m in drawn if m))


def _has_events(run: RunDir, events: list[dict[str, Any]]) -> bool:
    lives = {(str(e.get("job")), e.get("restart")) for e in events if e.get("event") in ("started", "resumed")}
    beat = read_json(run.heartbeat) or {}
    return (str(beat["job"]), beat.get("restart")) in lives if "job" in beat else bool(lives)


def _step(record: dict[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0
