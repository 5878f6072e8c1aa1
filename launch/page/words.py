"""Numbers, times and amounts of time as a page says them."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from itertools import pairwise

from ddpm.run.files import seconds

UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def duration(s: float) -> str:
    """Seconds in at most two units: `3 d 4 h`, `12 min`, `8 s`."""
    if s < 59.5:
        return f"{s:.0f} s" if s >= 1 or s == 0 else "under 1 s"
    for (unit, name), (lower, its_name) in pairwise(UNITS):
        if s >= unit - lower / 2:
            whole = round(s / lower)
            per = round(unit / lower)
            more = f" {whole % per} {its_name}" if whole % per and whole // per < 10 else ""
            return f"{whole // per} {name}{more}"
    return f"{s:.0f} s"


def moment(stamp: object) -> str:
    """A time of a record as `2026-11-27 07:10`, UTC; as it stands where it is none."""
    try:
        return at(seconds(str(stamp)))
    except (ValueError, OverflowError, OSError):
        return str(stamp)


def at(unix: float) -> str:
    return datetime.fromtimestamp(unix, timezone.utc).strftime("%Y-%m-%d %H:%M")


def count(value: float) -> str:
    """A tick of steps: `400k`, `1.2M`."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def short(value: float, *, as_power: bool = False) -> str:
    """A tick of anything else: `0.05`, `2e-4`; as_power: always as the second."""
    if value and (as_power or not 1e-3 <= abs(value) < 1e5):
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def digits(value: float) -> str:
    """A measured number in four digits."""
    return f"{value:.4g}" if math.isfinite(value) else str(value)
