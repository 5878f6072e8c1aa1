"""What every test shares: the project on sys.path, and a closing list of what was drawn and what could not run here.

A test that needs something the machine may lack calls `requires(...)`. Whatever was skipped, by it or by any other
means, is listed at the end with its reason: nothing is left out silently.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from tests import draws  # noqa: E402

FEW = 5
"""Long tests that all run where no more were asked for."""

# What a shell starts in the background ignores ctrl-C, and under nohup a closed terminal too; so would every script
# that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def requires(condition: object, reason: str, enable: str) -> None:
    """Skips the running test or fixture unless `condition` holds: `reason` is what lacks, `enable` how to get it."""
    if not condition:
        pytest.skip(f"{reason}. To enable: {enable}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the long tests that were asked for, a third, or a few."""
    long = [item for item in items if item.get_closest_marker("long")]
    stay = {*draws.drawn("long tests", long, max(FEW, len(long) // 3))}
    items[:] = [item for item in items if item not in long or item in stay]


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    longrepr = report.longrepr
    text = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Prints by which seed cases were drawn, and which tests did not run on this machine, and why: after all others."""
    yield
    if draws.TOLD:
        terminalreporter.section(f"drawn by DDPM_TEST_SEED={draws.SEED} (DDPM_TEST_FULL=1 runs all)")
        terminalreporter.write_line("; ".join(draws.TOLD))
    reasons = Counter(_skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if deselected := len(terminalreporter.stats.get("deselected", [])):
        reasons["deselected on the command line"] = deselected
    terminalreporter.section("Not run on this machine:" if reasons else "everything ran")
    for reason, num_tests in sorted(reasons.items()):
        terminalreporter.write_line(f"- {num_tests} test{'s' if num_tests > 1 else ''}: {reason}")
