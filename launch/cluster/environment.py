"""The only reader of SLURM's, torchrun's and our own environment variables."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import socket
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.events import EventLog
from ddpm.run.files import now
from ddpm.run.log import has_control
from ddpm.run.paths import RunDir
from launch.cluster import asked
from launch.cluster.addresses import first_node_address, hosts_of, interface_of, is_own_address, name_of

PROJECT = Path(__file__).resolve().parents[2]
"""Where the packages lie: a checkout, a run's code, or where pip has put them."""
_SHARED = (p / "share" / "ddpm-hpc" for p in (PROJECT, *PROJECT.parents[2:3]))
SHIPPED = next((p for p in (PROJECT, *_SHARED) if (p / "slurm").is_dir()), PROJECT)
"""Where configs/ and slurm/ lie: there, or in the share/ of what pip has installed into."""
OTHER_CACHE = "choose another place with --root or DDPM_RUNS, or data_cache in the site profile"
"""What a user can do where packed data cannot be written."""


@dataclass(frozen=True)
class JobEnvironment:
    """This process in its job, and how its ranks find each other."""

    scheduler: str
    """slurm | local"""
    job: str
    """17, or 17_3 for an array task: what `scontrol requeue` takes (the bare id would mean the whole array)."""
    restart: int
    host: str
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    cpus: int
    array_task: int | None
    since: str
    """When this life of the job got its nodes."""
    cluster: str = ""
    """The name of the scheduler's cluster, in lower case; "" where it has none."""

    @property
    def is_scheduled(self) -> bool:
        """Whether a scheduler has started this job, and can put it back."""
        return self.scheduler != "local"

    def events(self, run: RunDir) -> EventLog:
        return EventLog(run, self.job, self.restart, self.host, since=self.since, cluster=self.cluster)

    @property
    def token(self) -> str:
        """Names this life of the job in temporary files: 17.2."""
        return f"{self.job}.{self.restart}"

    def owner(self) -> dict[str, object]:
        named = {"cluster": self.cluster} if self.cluster else {}
        return {"job": self.job, "restart": self.restart, "host": self.host, **named}


def is_scheduled() -> bool:
    """Whether this process is in a job of the scheduler's."""
    return "SLURM_JOB_ID" in os.environ


def cluster() -> str:
    """The name, in lower case, of the cluster that SLURM's commands ask, or whose job this is; "" where nothing says
    so."""
    return asked.cluster() or _own_cluster()


def _own_cluster() -> str:
    return os.environ.get("SLURM_CLUSTER_NAME", "").lower() if is_scheduled() else ""


def is_on_node_of(cluster: str) -> bool:
    """Whether this process is on a node of that cluster, in its job: SLURM's commands ask it there anyway."""
    return "SLURMD_NODENAME" in os.environ and cluster.lower() == _own_cluster()


def num_tasks() -> int:
    """Ranks of the job whose batch shell this is."""
    return int(os.environ.get("SLURM_NTASKS", "1"))


def num_nodes() -> int:
    """Nodes of the job whose batch shell this is."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def batch_shell_can_ask() -> bool:
    """Whether the batch shell of this job has SLURM's commands; in a container its ranks have not."""
    return bool(os.environ.get("DDPM_SHELL_ASKS"))


def partition_and_qos() -> tuple[str, str]:
    """Partition and QOS of the job in which this process runs; "" if unknown."""
    return os.environ.get("SLURM_JOB_PARTITION", ""), os.environ.get("SLURM_JOB_QOS", "")


def memory_asked_for() -> str:
    """The memory that the job of this batch shell asked for, in words."""
    if per_node := os.environ.get("SLURM_MEM_PER_NODE"):
        return f"{per_node} MB per node"
    per_cpu = os.environ.get("SLURM_MEM_PER_CPU")
    return f"{per_cpu} MB per CPU" if per_cpu else "no amount of its own"


def supervisor_is_heard() -> None:
    """Tell the batch shell that its supervisor has started; if it never does, the shell goes on without it."""
    with contextlib.suppress(OSError, ValueError):
        os.write(int(os.environ.pop("DDPM_HEARD_FD", "")), b"heard")


def command_line() -> str:
    """The command that was typed, for a message that asks for it again."""
    return shlex.join(["python", *sys.argv])


def host() -> str:
    return socket.gethostname()


def user() -> str:
    """The user's name; the number of one whom this machine does not know by name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def ssh_words() -> str:
    """The words after `ssh` by which the user's own machine reaches this one: the address of the current login, which
    names one of several login nodes; from inside a job a jump through that node."""
    me, here = user(), socket.getfqdn()
    to, port = [*os.environ.get("SSH_CONNECTION", "").split()[2:4], "", ""][:2]
    if not re.fullmatch(r"[0-9A-Fa-f.:]+", to):
        return f"{me}@{here}"
    if is_own_address(to):
        return " ".join([*(["-p", port] if port.isdecimal() and port != "22" else []), f"{me}@{name_of(to)}"])
    return f"-J {me}@{name_of(to)}{f':{port}' if port.isdecimal() and port != '22' else ''} {me}@{here}"


def current() -> JobEnvironment:
    """Read how this process was started: by srun, inside a batch script, by torchrun, or alone."""
    env = os.environ
    here = host()
    since = env.get("DDPM_SINCE") or now()
    if job_id := env.get("SLURM_JOB_ID"):
        array = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        job = "_".join(a for a in array if a) or job_id
        restart = int(env.get("SLURM_RESTART_COUNT", "0"))
        in_step = "SLURM_STEP_NUM_TASKS" in env  # the batch shell has SLURM_PROCID too
        rank, world_size = (int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])) if in_step else (0, 1)
        return JobEnvironment(
            "slurm",
            job,
            restart,
            host=env.get("SLURMD_NODENAME", here),
            rank=rank,
            world_size=world_size,
            local_rank=int(env.get("SLURM_LOCALID", "0")) if in_step else 0,
            master_addr=first_node_address(env) if world_size > 1 else here,
            master_port=_port(job, restart),
            cpus=_cpus_of_rank(env) if in_step else 1,
            array_task=int(array[1]) if array[1] else None,
            since=since,
            cluster=_own_cluster(),
        )
    alone = "LOCAL_WORLD_SIZE" not in env  # torchrun sets OMP_NUM_THREADS, which then is nobody's wish
    cpus = int(env.get("DDPM_CPUS") or (alone and threads_asked()) or len(os.sched_getaffinity(0)))
    if "TORCHELASTIC_RUN_ID" in env or "LOCAL_WORLD_SIZE" in env:
        return JobEnvironment(
            "local",
            env.get("DDPM_JOB", f"local-{os.getppid()}"),
            0,
            host=here,
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            master_addr=env["MASTER_ADDR"],
            master_port=int(env["MASTER_PORT"]),
            cpus=cpus if "DDPM_CPUS" in env else max(1, cpus // int(env["LOCAL_WORLD_SIZE"])),
            array_task=None,
            since=since,
        )
    job = env.get("DDPM_JOB", f"local-{os.getpid()}")
    return JobEnvironment("local", job, 0, here, 0, 1, 0, here, 0, cpus, None, since)


def _cpus_of_rank(env: os._Environ[str]) -> int:
    """CPUs per task as asked for; else an equal share of the step's CPUs on this node, as ranks may not be bound."""
    if asked := env.get("SLURM_CPUS_PER_TASK"):
        return int(asked)
    bound = len(os.sched_getaffinity(0))
    ranks = max(int(n) for n in re.findall(r"(?:^|,)(\d+)", env.get("SLURM_STEP_TASKS_PER_NODE", "1")))
    return min(bound, max(1, int(env.get("SLURM_CPUS_ON_NODE", bound)) // ranks))


def _port(job: str, restart: int) -> int:
    """A rendezvous port below the ephemeral range, different for each life: an orphan cannot answer for its heir."""
    return 10_000 + zlib.crc32(f"{job}.{restart}".encode()) % 20_000


def runs_root(option: str | None) -> Path:
    """Where runs lie: --root, DDPM_RUNS, or runs/ in the checkout; where there is none, here. Raises RequestError."""
    chosen = option or os.environ.get("DDPM_RUNS")
    user_path(str(PROJECT), "the project's folder")
    if chosen:
        return user_path(chosen, "--root" if option else "DDPM_RUNS")
    return (PROJECT if SHIPPED == PROJECT else Path.cwd()) / "runs"


def user_path(path: str, what: str = "path") -> Path:
    """A path as it was typed, absolute: jobs run in the project's directory. Raises RequestError where it cannot stand
    in a job's script and a run's files, which have lines of UTF-8."""
    try:
        there = Path(path).expanduser().absolute()
    except RuntimeError:
        raise RequestError(f"{what} = {path}: there is no such user; give the whole path") from None
    if has_control(str(there)):
        raise RequestError(
            f"{what} = {str(there)!r}: has control characters, or is no UTF-8; rename it, or use another"
        )
    return there


def expand(path: str) -> Path:
    """A path of the site profile with $VARIABLES and ~ as they are on this machine. Raises EnvironmentLacks."""
    there = os.path.expandvars(path)
    if unset := re.search(r"\$\w+|\$\{[^}]*\}", there):
        raise EnvironmentLacks(
            f"{path}: {unset[0]} is not set on {host()}; have `setup` set it, or give the path itself"
        )
    return Path(there).expanduser()


def for_jobs(home: Path) -> dict[str, str]:
    """The environment that a background job on this machine gets: ours, without a surrounding allocation's.

    home: where its code lies.

    Its threads sleep at their barriers, unless the user wants it otherwise: the cores are not theirs alone, and threads
    that spin beside another such job take turns with it (a tenth of the speed, where sleeping ones have half). Those of
    numpy's OpenBLAS, which computes scores, have a variable of their own.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SLURMD_", "SBATCH_"))}
    path = os.environ.get("PYTHONPATH")
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    kept.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    return {**kept, "PYTHONPATH": f"{home}:{path}" if path else str(home), "PYTHONUNBUFFERED": "1"}


def stage() -> str:
    """What this batch shell's job is for: train, sample or evaluate."""
    return os.environ.get("DDPM_STAGE", "train")


def run_id() -> str:
    """The id of the run that this batch shell's job was queued for, "" if nothing tells it."""
    return os.environ.get("DDPM_OF_RUN", "")


def threads_asked() -> str:
    """The user's OMP_NUM_THREADS, "" if it is not set to a number."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return asked if asked.isdecimal() and int(asked) > 0 else ""


def sample_set() -> str:
    """The set that this batch shell's job works on, "" in training."""
    return os.environ.get("DDPM_SET", "")


def allocation() -> dict[str, str]:
    """sbatch options that ask for what this job has."""
    names = {
        "partition": "SLURM_JOB_PARTITION",
        "account": "SLURM_JOB_ACCOUNT",
        "qos": "SLURM_JOB_QOS",
        "nodes": "SLURM_JOB_NUM_NODES",
        "ntasks": "SLURM_NTASKS",
        "ntasks-per-node": "SLURM_NTASKS_PER_NODE",
        "cpus-per-task": "SLURM_CPUS_PER_TASK",
        "gpus-per-node": "SLURM_GPUS_PER_NODE",
        "mem": "SLURM_MEM_PER_NODE",
        "mem-per-cpu": "SLURM_MEM_PER_CPU",
    }
    options = {option: os.environ[name] for option, name in names.items() if os.environ.get(name)}
    listed = os.environ.get("SLURM_JOB_GPUS")  # 20.11 has no count of them
    if gpus := os.environ.get("SLURM_GPUS_ON_NODE") or (listed and str(len(listed.split(",")))):
        options.setdefault("gpus-per-node", gpus)  # also of a job that asked for them otherwise, as by --gres
    return options


def interface_of_peers(rank_0: str) -> str | None:
    """The network interface by which this node reaches the job's others. rank_0: the address of the first one."""
    return interface_of(os.environ, rank_0)


def hosts_of_ranks(came: dict[int, str]) -> dict[int, str]:
    """The nodes of the ranks that are not in `came` (rank -> node), as far as SLURM's counts tell them."""
    return hosts_of(os.environ, came) if is_scheduled() else {}


def set_defaults(**values: str) -> None:
    """Set variables that libraries read, unless the user has."""
    for key, value in values.items():
        os.environ.setdefault(key, value)


def prepare_cublas() -> None:
    """Before a GPU is used: what older torch asks for if matrix products are to be deterministic
    (https://github.com/pytorch/pytorch/pull/161749)."""
    set_defaults(CUBLAS_WORKSPACE_CONFIG=":4096:8")


def compiler_folder() -> str | None:
    """The user's own folder for what torch compiles (TORCHINDUCTOR_CACHE_DIR), or None."""
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR")


def default_partition() -> str | None:
    """The partition that the user has exported for sbatch (SBATCH_PARTITION), or None."""
    return os.environ.get("SBATCH_PARTITION")


def terminal() -> str:
    """What kind of terminal the user has (TERM)."""
    return os.environ.get("TERM", "")


def gpus_given() -> bool:
    """Whether SLURM gave this job GPUs."""
    return any(os.environ.get(k) for k in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"))
