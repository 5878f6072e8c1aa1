"""How the nodes of a job find each other: the first node's address, and the interface that leads there."""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from launch.cluster import slurm
from launch.cluster.answers import SchedulerError

SIOCGIFADDR = 0x8915
IPV6 = Path("/proc/net/if_inet6")
"""This machine's IPv6 addresses, and in the last column the interface of each."""


def first_node_address(env: Mapping[str, str]) -> str:
    """The address of rank 0's node, which is the first of the step's node list."""
    first, _ = _ends(_nodes(env))
    # where names do not resolve and slurmctld is not heard, srun knows the address that it started from
    return _address(first) or env.get("SLURM_LAUNCH_NODE_IPADDR", first)


def _address(node: str) -> str | None:
    """The node's IP address: by its name, else as slurmctld has it; None if it is not known."""
    with contextlib.suppress(OSError):
        return _resolved(node)
    with contextlib.suppress(OSError, SchedulerError):
        if match := re.search(r"NodeAddr=(\S+)", slurm.run(["scontrol", "show", "node", "-o", node], timeout_s=20)):
            return _resolved(match.group(1))
    return None


def _resolved(name: str) -> str:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])  # some sites have IPv6 alone


def _nodes(env: Mapping[str, str]) -> str:
    return env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")


def hosts_of(env: Mapping[str, str], came: Mapping[int, str]) -> dict[int, str]:
    """The nodes of the step's ranks that are not in `came`, by which nodes miss some of their tasks, in order; {} if
    that cannot be known."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))]
    names = [_nodes(env)]
    with contextlib.suppress(SchedulerError):
        names = slurm.run(["scontrol", "show", "hostnames", _nodes(env)], timeout_s=20).split()
    here = list(came.values())
    lacks = [name for name, count in zip(names, tasks, strict=False) for _ in range(count - here.count(name))]
    silent = [rank for rank in range(sum(tasks)) if rank not in came]
    return dict(zip(silent, lacks, strict=True)) if len(names) == len(tasks) and len(silent) == len(lacks) else {}


def _ends(nodes: str) -> tuple[str, str]:
    """The first and the last host of a host list, by SLURM, which alone knows all forms; without its commands by the
    list's text, as rack[1-2]-node[03,05]."""
    if "[" in nodes:
        with contextlib.suppress(SchedulerError):
            if found := slurm.run(["scontrol", "show", "hostnames", nodes], timeout_s=20).split():
                return found[0], found[-1]
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
    return first, re.sub(r"\[(?:[^\]]*[,-])?([^\],-]+)\]", r"\1", nodes).split(",")[-1]


def interface_of(env: Mapping[str, str], rank_0: str) -> str | None:
    """The network interface by which this node reaches the others of its step; None if it is not known.

    rank_0: the address of the first node, as this one sees it. There its own name often resolves to 127.0.1.1, and the
    way to that is one on which nobody else reaches it: the first node asks for the way to the last.
    """
    if rank_0.startswith("127.") or rank_0 == "::1":
        first, last = _ends(_nodes(env))
        if first != last and (address := _address(last)):
            return interface_towards(address)
    return interface_towards(rank_0)


def interface_towards(address: str) -> str | None:
    """The network interface by which this node reaches `address`, which may be its own; None if it is not known."""
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(kind, socket.SOCK_DGRAM) as s:
        s.connect((address, 9))  # a datagram socket: nothing is sent
        own = s.getsockname()[0]
        if kind == socket.AF_INET6:
            number = socket.inet_pton(kind, own.partition("%")[0]).hex()
            lines = map(str.split, IPV6.read_text().splitlines())
            return next((line[-1] for line in lines if line[0] == number), None)
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None


def is_own_address(address: str) -> bool:
    """Whether an IP address is one of this machine's."""
    with contextlib.suppress(OSError):
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(kind, socket.SOCK_DGRAM) as s:
            s.bind((address, 0))
            return True
    return False


def name_of(address: str) -> str:
    """The host name of an IP address, if it resolves back to it, else the address."""
    with contextlib.suppress(OSError):
        name = socket.gethostbyaddr(address)[0]
        if address in {found[4][0] for found in socket.getaddrinfo(name, None)}:
            return name
    return address
