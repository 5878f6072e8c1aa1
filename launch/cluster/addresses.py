"""How the nodes of a job find each other: the first node's address, and the interface that leads there."""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
import struct
from collections.abc import Mapping

from launch.cluster import slurm
from launch.cluster.answers import SchedulerError

SIOCGIFADDR = 0x8915


def first_node_address(env: Mapping[str, str]) -> str:
    """The address of rank 0's node, which is the first of the step's node list."""
    first = _first(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    try:
        return str(socket.getaddrinfo(first, None, socket.AF_INET)[0][4][0])
    except OSError:
        pass
    # a cluster whose node names do not resolve: slurmctld knows their addresses, srun the one it started from
    with contextlib.suppress(OSError, SchedulerError):
        if match := re.search(r"NodeAddr=(\S+)", slurm.run(["scontrol", "show", "node", "-o", first], timeout_s=20)):
            return str(socket.getaddrinfo(match.group(1), None, socket.AF_INET)[0][4][0])
    return env.get("SLURM_LAUNCH_NODE_IPADDR", first)


def _first(nodes: str) -> str:
    """The first host of a host list, by SLURM, which alone knows all forms; without its commands by the list's text."""
    if "[" in nodes:
        with contextlib.suppress(SchedulerError):
            if found := slurm.run(["scontrol", "show", "hostnames", nodes], timeout_s=20).split():
                return found[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]  # rack[1-2]-node[03,05]


def interface_towards(address: str) -> str | None:
    """The network interface by which this node reaches `address`, which may be its own; None if it is not known.

    A host's own name often resolves to 127.0.1.1, which nobody else reaches.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((address, 9))  # of a datagram: nothing is sent
        own = s.getsockname()[0]
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
