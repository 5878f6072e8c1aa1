"""The rate of work, in images a second, and its expected end; told in the log."""

from __future__ import annotations

import time
from collections import deque
from datetime import datetime, timedelta, timezone

from ddpm.run.log import say
from ddpm.run.stopping import ShowProgress

WINDOW = 16


class Pace:
    """The rate over the last reports alone: parts that an earlier life left are reported at once, and would make an
    overall rate too high for long."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def told(self, done: int, total: int) -> dict[str, str]:
        """images_per_s, and `ends`, the expected time of the last of `total`; {} while there is no rate yet."""
        self._seen.append((time.monotonic(), done))
        (began, had), (at, _) = self._seen[0], self._seen[-1]
        if at <= began or done <= had:
            return {}
        rate = (done - had) / (at - began)
        end = datetime.now(timezone.utc) + timedelta(seconds=(total - done) / rate)
        ends = {"ends": f"{end:%Y-%m-%dT%H:%M:%SZ}"} if done < total else {}
        return {"images_per_s": f"{rate:.3g}", **ends}


def shown(doing: str) -> ShowProgress:
    """A function (done, total) that logs how many images are done, and their pace."""
    pace = Pace()
    return lambda done, total: say(doing, images=f"{done}/{total}", **pace.told(done, total))
