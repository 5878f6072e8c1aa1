"""The process group, the device, and agreement between ranks. Knows no scheduler: ranks and addresses are given.

One group carries both kinds of traffic: gradients over NCCL where there are GPUs, and small CPU tensors over gloo, by
which ranks agree on when to stop without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ddpm.errors import DDPMError
from ddpm.run.stopping import STOP_REASONS, StopRequested
from ddpm.training.peers import HostOf, Peers

T = TypeVar("T")

RANK_TIMEOUT_S = 600
"""A rank that does not answer its peers for this long ends the job; compiling the network takes up to two minutes."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What carries tensors between ranks, by the kind of their device."""
BEFORE_NCCL = 0.9
"""Part of the time-out for which a rank waits for the others' small messages where gradients go by NCCL, whose watchdog
ends the process at the whole of it, and names no rank."""


def stop_code(stop_requested: StopRequested) -> int:
    """The stop reason of this rank as its index in STOP_REASONS, on which ranks can agree."""
    return STOP_REASONS.index(stop_requested() or "")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    peers: Peers | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, values: list[int]) -> list[int]:
        """Element-wise maximum of small ints over all ranks: a request of one rank becomes one of all."""
        if self.world_size == 1:
            return values
        t = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return t.tolist()

    def agree_later(self, values: list[int]) -> Callable[[], list[int]]:
        """Start `agree` without waiting; call the returned function to wait for the result."""
        if self.world_size == 1:
            return lambda: values
        t = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(t, op=dist.ReduceOp.MAX, async_op=True)
        patience: tuple[timedelta, ...] = ()
        if self.device.type == "cuda" and self.peers is not None:
            patience = (timedelta(seconds=BEFORE_NCCL * self.peers.timeout_s),)
        return lambda: (work.wait(*patience), t.tolist())[1]

    def agreed_stop(self, stop_requested: StopRequested) -> str:
        """The reason for which all ranks stop here, or ""."""
        return STOP_REASONS[self.agree([stop_code(stop_requested)])[0]]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_of(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, by rank, on every rank."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def of_main(self, find: Callable[[], T]) -> T:
        """Call `find` on rank 0 and return its result on every rank; a DDPMError is raised on every rank too."""
        found, failure = None, None
        if self.is_main:
            try:
                found = find()
            except DDPMError as e:
                failure = e
        found, failure = self.broadcast((found, failure))
        if failure is not None:
            raise failure
        return found

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a tensor on this world's device, in place; exact if all ranks but one have zeros."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def of_rank_0(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's values of a contiguous tensor on this world's device, in place on every rank."""
        if self.world_size > 1:
            dist.broadcast(values, src=0)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a float tensor on this world's device."""
        return self.sum(values) / self.world_size if self.world_size > 1 else values

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """Every rank's scalar on this world's device, by rank: (world_size,)."""
        out = torch.zeros(self.world_size, dtype=value.dtype, device=self.device)
        out[self.rank] = value
        return self.sum(out)

    def barrier(self) -> None:
        self.agree([0])

    def heeded(self) -> AbstractContextManager[None]:
        """As `Peers.heeded`."""
        return self.peers.heeded() if self.peers is not None else nullcontext()


def join(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    master_addr: str,
    master_port: int,
    timeout_s: float = RANK_TIMEOUT_S,
    host: str = "",
    host_of: HostOf = lambda came: {},
) -> World:
    """Form the process group of `world_size` ranks and choose this rank's device. Raises RanksLost if some do not come.

    timeout_s: how long any rank waits for another, here and in every later collective.
    host: where this rank is.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world_size == 1:
        return World(rank, world_size, device)
    peers = Peers(rank, world_size, master_addr, master_port, timeout_s, host, host_of)
    with peers.heeded():
        dist.init_process_group(
            BACKENDS[device.type],
            store=peers.store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return World(rank, world_size, device, peers)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
