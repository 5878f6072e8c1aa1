"""How long work is told to stop, and how it tells how far it is: it asks and calls, and knows no signal or terminal."""

from __future__ import annotations

from collections.abc import Callable

StopRequested = Callable[[], "str | None"]
"""Why to stop, one of STOP_REASONS, or None; cheap enough to be asked at every step."""
STOP_REASONS = ("", "preempted", "time_limit", "interrupted", "STOP")
"""In the order of their weight: where ranks were told different ones, the last of them counts."""
ShowProgress = Callable[[int, int], None]
"""(done, total), in units of the work's own."""
