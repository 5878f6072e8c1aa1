"""How ranks find each other, and which of them does not answer: by a store of torch's that rank 0 has.

torch's errors name no rank. A rank that has waited for another in vain says so in the store, and who says nothing there
is the one that hangs. Knows no scheduler.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed as dist

from ddpm.errors import RanksLost

T = TypeVar("T")

TIMED_OUT = re.compile(r"^(?=.*(?:\bgloo\b|NCCL|Dist\w*Error|Operation)).*\btimed? ?out", re.I | re.S)
CLOSED = re.compile(r"gloo/transport/tcp/|(?:closed|reset) by peer|likely closed|Broken pipe|ncclRemoteError")
"""What torch's errors say, mostly plain RuntimeErrors, when another rank does not answer, or died."""
ROLL_CALL = 0.05
"""How long ranks that waited in vain are given to say so, as a part of that time: they may not have begun together."""
POLL_S = 0.2
LINGER_S = 3.0
"""How long rank 0, who has the store, stays once it knows: others may have begun to wait so much later."""

HostOf = Callable[["dict[int, str]"], "dict[int, str]"]
"""(rank -> host of those that came) -> rank -> host of the others, as far as these are known."""


class Peers:
    """The ranks of a job as one of them sees them. Raises RanksLost if some do not come within `timeout_s`."""

    def __init__(
        self, rank: int, world_size: int, address: str, port: int, timeout_s: float, host: str, host_of: HostOf
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._hosts: dict[int, str] = {}
        store = _within(timeout_s + 1, lambda: self._meet(address, port, host_of))
        if store is None:  # rank 0 has the store, and freezes
            raise self._unreached(address, port, host_of)
        self.store = store
        with self.heeded():
            self.store.set(f"host/{rank}", host)
            silent = _within(timeout_s + 1, self._await_all)
            if silent is None:
                silent = [0]  # nobody answered: then rank 0, which has the store, is silent
            if silent:
                where = host_of(self._hosts)
                self._lost({r: where.get(r, "") for r in silent}, f"did not come within {timeout_s:g} s")

    def _meet(self, address: str, port: int, host_of: HostOf) -> dist.Store:
        """Rank 0's store: torchrun's, if it has started these ranks. Raises RanksLost if it cannot be reached."""
        patience = timedelta(seconds=self.timeout_s)
        if dist.is_torchelastic_launched():  # torchrun has one
            there = f"[{address}]" if ":" in address else address
            store: dist.Store
            store, *_ = next(dist.rendezvous(f"tcp://{there}:{port}", self.rank, self.world_size, timeout=patience))
            return store
        try:
            store = dist.TCPStore(
                address, port, self.world_size, self.rank == 0, patience / 2, wait_for_workers=False
            )  # which tries twice where nobody answers
            store.set_timeout(patience)
            return store
        except RuntimeError as e:
            if self.rank == 0 and "EADDRINUSE" in str(e):
                raise RanksLost(f"port {port} is another process's here: the next life takes another") from None
            if self.rank == 0:
                raise
            raise self._unreached(address, port, host_of) from None

    def _unreached(self, address: str, port: int, host_of: HostOf) -> RanksLost:
        why = f"could not be reached by rank {self.rank} at {address}, port {port}, within {self.timeout_s:g} s"
        return RanksLost.silent({0: host_of({}).get(0, "")}, why)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within: what torch says of a rank that died or does not answer is raised as RanksLost, which names it."""
        try:
            try:
                yield
            except RuntimeError as e:
                if _timed_out(e) and (silent := self._call_the_roll()):
                    where = {rank: self._hosts.get(rank, "") for rank in silent}
                    self._lost(where, f"did not answer for {self.timeout_s:g} s")
                raise
        except RuntimeError as e:  # also while the store was asked: rank 0, which has it, may have left
            if not (_timed_out(e) or CLOSED.search(str(e))):
                raise
            said = re.sub(r"^\[\S+:\d+\] ", "", str(e).strip()).partition("\n")[0].partition(". ")[0]
            raise RanksLost(f"rank {self.rank} lost its connection to another, and ends: {said}") from None

    def _await_all(self) -> list[int]:
        """The ranks that do not come in time; learns where the others are."""
        silent = self._silent("host", self.timeout_s)
        came = [rank for rank in range(self.world_size) if rank not in silent]
        self._hosts = {rank: self.store.get(f"host/{rank}").decode() for rank in came}
        return silent

    def _call_the_roll(self) -> list[int]:
        """The ranks that do not say that they have waited in vain too."""
        patience_s = max(5.0, ROLL_CALL * self.timeout_s)

        def ask() -> list[int]:
            self.store.set(f"waits/{self.rank}", "")
            return self._silent("waits", patience_s)

        silent = _within(patience_s + 1, ask)
        return [0] if silent is None else silent  # no answer from the store, which rank 0 has

    def _silent(self, word: str, patience_s: float) -> list[int]:
        """The ranks that have not said `word` within `patience_s`."""
        ends, silent = time.monotonic() + patience_s, list(range(self.world_size))
        while True:
            silent = [rank for rank in silent if not self.store.check([f"{word}/{rank}"])]
            if not silent or time.monotonic() >= ends:
                return silent
            time.sleep(POLL_S)

    def _lost(self, at: dict[int, str], why: str) -> NoReturn:
        if self.rank == 0:
            time.sleep(LINGER_S)
        raise RanksLost.silent(at, why) from None


def _timed_out(error: RuntimeError) -> bool:
    return TIMED_OUT.search(f"{type(error).__name__}: {error}") is not None


def _within(patience_s: float, ask: Callable[[], T]) -> T | None:
    """What `ask` returns, or None if it takes longer: torch waits for an answer of the store for ever. Raises what it
    raises."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(ask())
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience_s)
    if failed:
        raise failed[0]
    return found[0] if found else None
