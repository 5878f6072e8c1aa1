"""How the bench measures: on which device, how large, until when; medians, and works taken in turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Bench:
    """ends: of this row, by time.monotonic; what is measured in rounds takes no further one past it."""

    device: torch.device
    small: bool
    """A quarter of the width: it shows that the rows run, and no goal is judged."""
    ends: float

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def threads(self) -> int:
        return len(os.sched_getaffinity(0))

    def goal(self, *, cpu: float | None = None, gpu: float | None = None) -> float | None:
        """What is asked of this device."""
        return None if self.small else gpu if self.gpu else cpu

    def pick(self, *, gpu: int, cpu: int, small: int) -> int:
        return small if self.small else gpu if self.gpu else cpu

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def once(self, work: Work, calls: int = 1) -> float:
        """Seconds of one call."""
        self.sync()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        self.sync()
        return (time.perf_counter() - began) / calls

    def median(self, work: Work, *, rounds: int = 5, warm_up: int = 1, calls: int = 1) -> float:
        return statistics.median(self.in_turns({"": work}, rounds=rounds, warm_up=warm_up, calls=calls)[""])

    def in_turns(
        self, works: dict[str, Work], *, rounds: int = 12, warm_up: int = 1, calls: int = 1
    ) -> dict[str, list[float]]:
        """Seconds of a call of each work, round by round; another one begins each round. At least one round."""
        names = list(works)
        times: dict[str, list[float]] = {name: [] for name in works}
        for name in names * warm_up:
            works[name]()
        for i in range(1 if self.small else rounds):
            if i and time.monotonic() > self.ends:
                break
            first = i % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self.once(works[name], calls))
        return times
