"""Types by which long work asks whether to stop, and reports its progress, without knowing signals or terminals."""

from __future__ import annotations

from collections.abc import Callable

StopRequested = Callable[[], "str | None"]
"""Returns why to stop, one of STOP_REASONS, or None; cheap enough to be called at every step."""
STOP_REASONS = ("", "preempted", "time_limit", "interrupted", "STOP")
"""By rising weight: if ranks were told different reasons, the last of them in this order counts."""
ShowProgress = Callable[[int, int], None]
"""Called with (done, total), in the work's own units."""
