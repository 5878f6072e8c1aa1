"""launch/cluster/environment.py: what a process learns of its job. The variables are given here, as SLURM sets them."""

import os
import socket
from pathlib import Path

import pytest

from launch.cluster import addresses, environment, slurm
from launch.cluster.answers import SchedulerError


@pytest.fixture(autouse=True)
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SRUN_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "17")


@pytest.mark.parametrize(
    ("asked", "bound", "on_node", "tasks", "cpus"),
    [
        ("6", 64, "64", "4(x2)", 6),
        (None, 8, "8", "1", 8),  # as DefCpuPerGPU gives
        (None, 64, "32", "4(x2)", 8),  # unbound, on a node that is shared
        (None, 4, "32", "4(x2)", 4),
        (None, 16, "16", "3(x2),1", 5),
        (None, 2, "2", "4", 1),
    ],
)
def test_a_rank_has_the_cpus_that_were_asked_for_or_its_share_of_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, bound: int, on_node: str, tasks: str, cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)))
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_CPUS_ON_NODE": on_node}
    for name, value in (step | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_CPUS_PER_TASK": asked}).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert environment.current().cpus == cpus


def test_the_batch_shell_claims_no_more_than_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    assert environment.current().cpus == 1


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({"SLURM_GPUS_PER_NODE": "a100:2", "SLURM_GPUS_ON_NODE": "2"}, {"gpus-per-node": "a100:2"}),
        ({"SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_GPUS": "0,1"}, {"gpus-per-node": "2"}),  # --gres, --gpus
        ({"SLURM_JOB_GPUS": "0,1", "SLURM_NTASKS": "2"}, {"gpus-per-node": "2", "ntasks": "2"}),  # SLURM 20.11
        ({"SLURM_MEM_PER_NODE": "4000"}, {"mem": "4000"}),
        ({"SLURM_MEM_PER_CPU": "500"}, {"mem-per-cpu": "500"}),
        ({}, {}),
    ],
)
def test_what_a_job_has_is_told_as_options_that_ask_for_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], options: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.allocation() == options


@pytest.mark.parametrize(("asked", "cpus"), [("1", 1), ("2,1", 2), ("", 3), ("0", 3), ("many", 3)])
def test_a_job_by_hand_takes_as_many_threads_as_the_user_wants_of_every_program(
    monkeypatch: pytest.MonkeyPatch, asked: str, cpus: int
) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM_", "DDPM_", "LOCAL_WORLD_SIZE", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    assert environment.current().cpus == cpus
    monkeypatch.setenv("DDPM_CPUS", "5")
    assert environment.current().cpus == 5


def test_threads_of_background_jobs_sleep_at_their_barriers_unless_the_user_wants_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, asleep, awake in (("OMP_WAIT_POLICY", "PASSIVE", "ACTIVE"), ("OPENBLAS_THREAD_TIMEOUT", "4", "30")):
        monkeypatch.delenv(name, raising=False)
        assert environment.for_jobs(Path("/code"))[name] == asleep
        monkeypatch.setenv(name, awake)
        assert environment.for_jobs(Path("/code"))[name] == awake


@pytest.mark.parametrize(("nodes", "first"), [
    ("n[1-4]", "n1"), ("n1", "n1"), ("a[3,5-7],b[1-2]", "a3"),
    ("rack[1-2]-node[03,05]", "rack1-node03"), ("x1,x2", "x1"),
    ("r[07-09]c[1-2]n[004-006]", "r07c1n004"),
])  # fmt: skip
@pytest.mark.parametrize("slurm_says", [False, True])
def test_rank_0_is_on_the_first_node_of_a_list_of_any_shape(
    monkeypatch: pytest.MonkeyPatch, nodes: str, first: str, slurm_says: bool
) -> None:
    """Which SLURM is asked for, where it is there: only it knows every shape."""
    asked = []

    def hostnames(argv: list[str], **_: object) -> str:
        if argv != ["scontrol", "show", "hostnames", nodes] or not slurm_says:
            raise SchedulerError("scontrol: not found on this machine")
        return "of-slurm\nsecond\n"

    monkeypatch.setattr(slurm, "run", hostnames)
    first = "of-slurm" if slurm_says and "[" in nodes else first

    def resolve(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(name)
        return [(0, 0, 0, "", ("10.0.0.1", 0))]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    for name, value in {"NUM_TASKS": "2", "NODELIST": nodes, "TASKS_PER_NODE": "1(x2)"}.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert environment.current().master_addr == "10.0.0.1" and asked == [first]


@pytest.mark.parametrize(("came", "others"), [
    ({0: "n1", 1: "n1", 2: "n1", 3: "n2"}, {4: "n3"}), ({0: "n1", 3: "n2"}, {1: "n1", 2: "n1", 4: "n3"}),
    ({}, {0: "n1", 1: "n1", 2: "n1", 3: "n2", 4: "n3"}), ({0: "of another name"}, {}),
])  # fmt: skip
def test_where_ranks_are_that_did_not_come_is_told_by_what_their_nodes_lack(
    monkeypatch: pytest.MonkeyPatch, came: dict[int, str], others: dict[int, str]
) -> None:
    monkeypatch.setattr(slurm, "run", lambda argv, **_: "n1\nn2\nn3\n")
    env = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "3,1(x2)"}
    assert addresses.hosts_of(env, came) == others


def test_a_node_is_reached_by_the_interface_that_leads_to_it() -> None:
    assert addresses.interface_towards("127.0.0.1") == "lo"
    assert addresses.interface_towards("no-such-node.invalid") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
        except OSError:
            return  # a machine without a network
        own = s.getsockname()[0]
    outward = addresses.interface_towards("192.0.2.1")
    assert outward not in (None, "lo") and addresses.interface_towards(own) == outward


def test_a_node_that_has_ipv6_alone_is_found_and_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "n1": [(socket.AF_INET6, 1, 6, "", ("fd00::2", 0, 0, 0))],
        "n2": [(socket.AF_INET6, 1, 6, "", ("fd00::2", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("10.0.0.2", 0))],
    }
    monkeypatch.setattr("socket.getaddrinfo", lambda name, *_, **__: known[name])
    assert addresses.first_node_address({"SLURM_STEP_NODELIST": "n1"}) == "fd00::2"
    assert addresses.first_node_address({"SLURM_STEP_NODELIST": "n2"}) == "10.0.0.2"
    if addresses.IPV6.exists() and any(line.endswith(" lo") for line in addresses.IPV6.read_text().splitlines()):
        assert addresses.interface_towards("::1") == "lo"


@pytest.mark.parametrize(("nodes", "last"), [
    ("n[1-4]", "n4"), ("a[3,5-7],b[1-2]", "b2"), ("rack[1-2]-node[03,05]", "rack2-node05"), ("x1,x2", "x2"),
    ("r[07-09]c[1-2]n[004-006]", "r09c2n006"), ("n[1,3]", "n3"),
])  # fmt: skip
def test_a_first_node_that_knows_itself_by_a_loopback_takes_the_interface_towards_the_last(
    monkeypatch: pytest.MonkeyPatch, nodes: str, last: str
) -> None:
    """As Debian writes 127.0.1.1 into /etc/hosts: other nodes reach nothing that listens there."""
    known = {last: "192.0.2.9"}

    def resolve(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (known.get(name, "127.0.1.1"), 0))]

    def unanswered(argv: list[str], **_: object) -> str:
        raise SchedulerError("scontrol: not found on this machine")

    monkeypatch.setattr(slurm, "run", unanswered)
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr(addresses, "interface_towards", lambda address: f"towards {address}")
    env = {"SLURM_STEP_NODELIST": nodes}
    assert addresses.interface_of(env, addresses.first_node_address(env)) == "towards 192.0.2.9"
    assert addresses.interface_of(env, "192.0.2.1") == "towards 192.0.2.1"
    alone = {"SLURM_STEP_NODELIST": last}
    assert addresses.interface_of(alone, "127.0.1.1") == "towards 127.0.1.1"


@pytest.mark.parametrize(
    ("connection", "words"),
    [
        ("", "me@here"),
        ("10.0.0.9 51000 127.0.0.1 22", "me@127.0.0.1"),
        ("10.0.0.9 51000 127.0.0.1 2222", "-p 2222 me@127.0.0.1"),
        ("10.0.0.9 51000 192.0.2.7 2222", "-J me@192.0.2.7:2222 me@here"),  # in a job, by way of the login node
        ("a b $(touch x) 22", "me@here"),
    ],
)
def test_the_way_here_is_by_the_address_that_the_user_has_logged_in_to(
    monkeypatch: pytest.MonkeyPatch, connection: str, words: str
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", connection)
    monkeypatch.setattr(environment.getpass, "getuser", lambda: "me")
    monkeypatch.setattr(environment.socket, "getfqdn", lambda: "here")
    monkeypatch.setattr(socket, "gethostbyaddr", lambda address: ("of-another", [], []))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [(0, 0, 0, "", ("198.51.100.1", 0))])
    assert environment.ssh_words() == words
