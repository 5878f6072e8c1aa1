"""The `testbed` fixture: one throwaway SLURM cluster for the whole test session."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.conftest import PROJECT, requires
from tools.slurm_testbed.harness import SlurmTestbed, what_lacks


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


@pytest.fixture(scope="session")
def testbed() -> Iterator[SlurmTestbed]:
    """Four nodes n1 … n4 with 2 CPUs and 2 fake GPUs each; deleted at the end, ctrl-C and SIGTERM included."""
    lack = what_lacks(PROJECT, sys.executable)
    requires(lack is None, *(lack or ("", "")))
    previous = signal.signal(signal.SIGTERM, _interrupt)  # pytest tears fixtures down on ctrl-C, not on SIGTERM
    bed = SlurmTestbed(PROJECT, sys.executable)
    try:
        bed.start()
        yield bed
    finally:
        signals = {signal.SIGTERM: previous, signal.SIGINT: signal.getsignal(signal.SIGINT)}
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)  # a second ctrl-C must not leave the daemons behind
        bed.stop()
        for signum, handler in signals.items():
            signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _empty_queue(testbed: SlurmTestbed) -> Iterator[None]:
    """A test leaves no job behind that the next one would have to wait for."""
    yield
    testbed.end_all_jobs()
