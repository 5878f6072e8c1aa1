"""What a checkup tells: a verdict, a fact, a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    verdict: Literal["pass", "warn", "fail"]
    what: str
    remedy: str = ""


Findings = Iterator[Finding]


def judged(good: bool, what: str, remedy: str = "", or_else: Literal["warn", "fail"] = "warn") -> Finding:
    return Finding("pass", what) if good else Finding(or_else, what, remedy)
