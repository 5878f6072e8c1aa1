"""The form of each record in a run's small files: which keys it must have, which it may have, and what their values may
be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ddpm.run.files import seconds

Record = dict[str, Any]
Form = Mapping[str, Callable[[Any], bool]]
"""Key -> whether a value of it is good. NAME: the keys that a record must have; NAME_TOO: those that it may have."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_job(value: Any) -> bool:
    return _is_text(value) or _is_count(value)


def _is_number(value: Any) -> bool:
    """A number, infinite or NaN ones too: a loss may have been."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and seconds(value) > 0
    except (ValueError, OverflowError, OSError):
        return False


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_options(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(v) or v is True for v in value.values())


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict)


def _has(needed: Form, too: Form | None = None) -> Callable[[Any], bool]:
    """A function that tells whether a value is a record of this form."""
    return lambda value: checked(value, needed, too)[1] == ""


SIGN: Form = {"job": _is_job, "restart": _is_count, "time": _is_time}
"""What an event keeps of a heartbeat."""
EVENT: Form = {"event": _is_text, **SIGN}
EVENT_TOO: Form = {
    **dict.fromkeys(("host", "cluster", "stage", "set", "via", "reason", "bad_node", "run", "sha256"), _is_text),
    **dict.fromkeys(("step", "world_size", "attempt", "progress", "exit_code", "pid", "tasks", "wait_s"), _is_count),
    **dict.fromkeys(("since", "former_life_ended"), _is_time),
    **{"last_sign": _has(SIGN), "args": _is_words, "options": _is_options},
    **{"successor_of": _is_job, "launch": _is_tree},
    "preemption": lambda value: _is_tree(value) and all(map(_is_text, value.values())),
}
METRICS: Form = {
    **{"step": _is_count, "time": _is_time},
    **dict.fromkeys(("epoch", "loss", "grad_norm", "lr", "images_per_s"), _is_number),
}
METRICS_TOO: Form = {
    **dict.fromkeys(("images", "skipped_steps"), _is_count),
    **dict.fromkeys(("gpu_memory_gib", "mfu", "validation_loss"), _is_number),
}
BEAT: Form = {**SIGN, "step": _is_count}
BEAT_TOO: Form = {
    **dict.fromkeys(("total_steps", "inode"), _is_count),
    **dict.fromkeys(("host", "cluster"), _is_text),
    **dict.fromkeys(("loss", "images_per_s"), _is_number),
}
DATA: Form = {"cache": _is_text}
DATA_TOO: Form = {
    **dict.fromkeys(("key", "digest", "scratch"), _is_text),
    **{"num_images": _is_count, "test": _has(dict.fromkeys(("key", "digest"), _is_text))},
}
FROM: Form = dict.fromkeys(("source", "weights", "sha256", "start_sha256"), _is_text)
FROM_TOO: Form = {"step": _is_count, "config_digest": _is_text}
SWEEP: Form = {"name": _is_text, "values": _is_tree}
RUN_TOO: Form = {
    **dict.fromkeys(("config_digest", "created", "reads", "run_id"), _is_text),
    **dict.fromkeys(("launch", "resolved"), _is_tree),
    **dict.fromkeys(("command", "first_command"), _is_words),
    **{"data": _has(DATA, DATA_TOO), "from": _has(FROM, FROM_TOO), "sweep": _has(SWEEP)},
}


def checked(record: Any, needed: Form, too: Form | None = None) -> tuple[Record | None, str]:
    """The record without bad optional values, or None if a required one is missing or bad; and what was wrong, or
    ""."""
    if not isinstance(record, dict):
        return None, "no JSON object"
    for key, is_good in needed.items():
        if key not in record:
            return None, f"no {key}"
        if not is_good(record[key]):
            return None, f"{key} = {_short(record[key])}"
    bad = [k for k, value in record.items() if value is not None and too and k in too and not too[k](value)]
    if not bad:
        return record, ""
    return {k: v for k, v in record.items() if k not in bad}, ", ".join(f"{k} = {_short(record[k])}" for k in bad)


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "{…}" if isinstance(value, dict) else "[…]"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number beyond all bounds"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
