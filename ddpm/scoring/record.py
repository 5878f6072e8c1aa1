"""What a score record calls its scores, for those who write one and those who show it. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCORE_NAMES = {"fid": "FID", "frechet_distance": "Fréchet distance"}
"""Keys of a record, and what people call them: it has one of these."""


def key_for(*, published: bool) -> str:
    """Only what is computed with the published weights is a FID."""
    return "fid" if published else "frechet_distance"


def key_of(record: Mapping[str, Any]) -> str:
    """Under which key the record's score stands. KeyError where it has none."""
    for key in SCORE_NAMES:
        if key in record:
            return key
    raise KeyError(f"a record without a score: {', '.join(record)}")
