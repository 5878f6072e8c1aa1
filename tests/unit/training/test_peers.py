"""ddpm/training/peers.py: who does not come, hangs or dies is named by the others, soon."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm.errors import RanksLost
from ddpm.training import ranks
from ddpm.training.peers import Peers
from tests.training import on_ranks

ALL = {rank: f"n{rank}" for rank in range(3)}


def beset(
    rank: int, world_size: int, port: int, timeout_s: float, work: Callable[..., None], kind: str, whom: int, told: Path
) -> None:
    """A rank of a job of which rank `whom` never comes, hangs, is late, or ends without a word."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if kind == "never comes" and rank == whom:
        return
    if kind.startswith(("freezes", "hangs")) and rank == whom:
        _be_woken_once_others_have_told(told, world_size - 1)
    if kind == "freezes as they come" and rank == whom:
        Peers._await_all = lambda peers: _stop()  # type: ignore[assignment,method-assign,return-value]
    try:
        world = ranks.join(
            rank=rank, world_size=world_size, local_rank=rank, master_addr="127.0.0.1", master_port=port,
            timeout_s=timeout_s, host=ALL[rank], host_of=lambda came: {r: ALL[r] for r in ALL if r not in came},
        )  # fmt: skip
        with world.heeded():
            world.barrier()
            if rank == whom:
                if kind.startswith("hangs"):
                    _stop()
                elif kind == "is late":
                    time.sleep(2 * timeout_s)
                else:
                    os._exit(0)
            if kind == "hangs beside NCCL":
                replace(world, device=torch.device("cuda")).agree_later([0])()
            world.barrier()
    except RanksLost as e:
        (told / f"{rank}").write_text(str(e))
    os._exit(0)


def _be_woken_once_others_have_told(told: Path, others: int) -> None:
    """By a child, which is forked while there is one thread; also where they wait for ever."""
    me, ends = os.getpid(), time.monotonic() + 60
    if os.fork():
        return
    while len(list(told.iterdir())) < others and time.monotonic() < ends:
        time.sleep(0.1)
    if time.monotonic() >= ends:
        (told / "in vain").touch()
    while os.getppid() == me:
        os.kill(me, signal.SIGCONT)
        time.sleep(0.1)
    os._exit(0)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)


@pytest.mark.parametrize(("kind", "whom", "says"), [
    ("never comes", 2, "rank 2 on n2 did not come within 4 s"),
    ("never comes", 0, "rank 0 on n0 could not be reached by rank"),
    ("freezes as they come", 0, "rank 0 on n0 "),
    ("hangs", 2, "rank 2 on n2 did not answer for 4 s"), ("hangs", 0, "rank 0 on n0 did not answer for 4 s"),
    ("hangs beside NCCL", 1, "rank 1 on n1 did not answer for 4 s"),
    ("is late", 1, "rank 1 on n1 did not answer for 4 s"), ("ends", 1, "lost its connection to another"),
])  # fmt: skip
def test_the_others_name_a_rank_that_is_not_heard(tmp_path: Path, kind: str, whom: int, says: str) -> None:
    on_ranks(3, print, kind, whom, tmp_path, timeout_s=4, join=beset)
    others = {str(rank) for rank in ALL} - {str(whom)}
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert others <= set(said) and all(says in said[rank] for rank in others) and "in vain" not in said


@pytest.mark.parametrize(("error", "lost"), [
    ("[/x/gloo/transport/tcp/pair.cc:339] writev [10.0.0.1]:35038: Software caused connection abort", True),
    ("NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: …", True),
    ("NCCL error in: x.cpp:1, unhandled cuda error\nncclUnhandledCudaError: …", False), ("mat1 and mat2 …", False),
])  # fmt: skip
def test_a_lost_connection_is_told_from_other_errors(error: str, lost: bool) -> None:
    peers = Peers.__new__(Peers)
    peers.rank = 1
    with pytest.raises(RanksLost if lost else RuntimeError, match="rank 1 lost" if lost else error[:9]), peers.heeded():
        raise RuntimeError(error)


def test_a_rank_that_asks_who_hangs_once_rank_0_has_left_lost_its_connection_like_any_other() -> None:
    class Gone:
        def set(self, *_: str) -> None:
            raise RuntimeError("failed to recv, got 0 bytes. Connection was likely closed. Did the remote server …")

    peers: Any = Peers.__new__(Peers)
    peers.rank, peers.timeout_s, peers.store = 1, 10, Gone()
    with pytest.raises(RanksLost, match=r"rank 1 lost its connection.*: failed to recv, got 0 bytes$"), peers.heeded():
        raise RuntimeError("Operation timed out!")


def test_where_all_ranks_waited_in_vain_each_lost_its_connection_and_none_hangs() -> None:
    peers: Any = Peers.__new__(Peers)
    peers.rank, peers.world_size, peers.timeout_s = 1, 2, 10
    peers.store = SimpleNamespace(set=lambda *_: None, check=lambda words: True)
    with pytest.raises(RanksLost, match=r"rank 1 lost its connection.*: Operation timed out!$"), peers.heeded():
        raise RuntimeError("Operation timed out!")


def test_a_port_that_another_process_has_is_said() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RanksLost, match=f"port {port} is another process's here"):
            ranks.join(
                rank=0, world_size=2, local_rank=0, master_addr="127.0.0.1", master_port=port, timeout_s=4
            )  # fmt: skip


def test_rank_0_that_reaches_no_store_at_its_own_address_says_so() -> None:
    with pytest.raises(RuntimeError, match="timed out"):  # 203.0.113.1 is nobody's (RFC 5737)
        Peers(0, 2, "203.0.113.1", 0, 1, "n0", lambda came: {})
