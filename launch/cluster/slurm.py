"""Questions to SLURM and the few orders it takes, each one command with a time limit. Knows no run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from ddpm.errors import EnvironmentLacks
from ddpm.run.files import stamp

TIMEOUT_S = 30
PATIENCE_S = 90
RETRY_S = 3

NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|Connection (?:refused|reset)"
    r"|in standby mode|[Tt]emporarily un(?:available|able)|Unable to establish controller"
    r"|[Cc]ould not establish a configuration source|Communication connection failure|Message (?:send|receive) failure"
    r"|authentication error|try (?:again|later)"
)
LINES_AT_MOST = 20
JOB_ID = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*| on cluster \S+)?")
"""The whole of the line in which sbatch tells it, with --parsable and without."""
OUR_NAME = re.compile(r"-(?:train|sample|evaluate)$")
"""How the names of jobs end that are queued here, or by the templates."""
USERS_OWN = ("SQUEUE_", "SINFO_", "SCANCEL_", "SACCTMGR_", "SLURM_TIME_FORMAT")
"""Variables by which a user has SLURM's commands show less, or show it otherwise: not what is asked here."""

T = TypeVar("T")


class SlurmError(EnvironmentLacks):
    """A command that failed or did not answer; the message is SLURM's own."""


class NoAnswer(SlurmError):
    """SLURM is busy or out of reach: it has refused nothing, and may answer later."""


class NoJobId(SlurmError):
    """sbatch ended well and told no job's id: there is a job, perhaps, and asking again would queue another."""


def failure(command: str, said: str) -> SlurmError:
    """The error that a command's words make: all of them, since the last line may be the one that says least.

    Whether SLURM was out of reach is in the last: what a site's plugin wrote before may be about anything.
    """
    lines = words(command, said)
    unreached = lines and NO_ANSWER.search(lines[-1])
    return (NoAnswer if unreached else SlurmError)(f"{command}: " + "\n  ".join(shortened(lines)))


def words(command: str, said: str) -> list[str]:
    """The lines that a command wrote, without its name, without control characters."""
    lines = (line.rstrip().removeprefix(f"{command}: ") for line in said.splitlines())
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines if line]


def shortened(lines: list[str]) -> list[str]:
    """At most LINES_AT_MOST of them: the first ones and the last ones."""
    half = LINES_AT_MOST // 2
    return (
        lines
        if len(lines) <= LINES_AT_MOST
        else [*lines[: half - 1], f"… {len(lines) - 2 * half + 1} lines more …", *lines[-half:]]
    )


def available(command: str = "sbatch") -> bool:
    return shutil.which(command) is not None


def run(
    argv: list[str], *, timeout_s: float = TIMEOUT_S, cwd: str | None = None, env: dict[str, str] | None = None
) -> str:
    """What the command prints. env: instead of this process's without USERS_OWN. Raises SlurmError."""
    if env is None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(USERS_OWN)}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, env=env)
    except FileNotFoundError:
        raise SlurmError(f"{argv[0]}: not found on this machine") from None
    except subprocess.TimeoutExpired as e:
        said = e.stderr.decode(errors="replace") if isinstance(e.stderr, bytes) else e.stderr or ""
        lines = [f"no answer in {timeout_s:.0f} s", *shortened(words(argv[0], said))]
        raise NoAnswer(f"{argv[0]}: " + "\n  ".join(lines)) from None
    if done.returncode != 0:
        raise failure(argv[0], done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")
    return done.stdout


def submit(
    argv: list[str], *, timeout_s: float = TIMEOUT_S, cwd: str | None = None, env: dict[str, str] | None = None
) -> str:
    """Run an sbatch; returns the job's id, whatever a site has it say around that. Raises SlurmError."""
    said = run(argv, timeout_s=timeout_s, cwd=cwd, env=env)
    found = [match[1] for line in said.splitlines() if (match := JOB_ID.fullmatch(line.strip()))]
    if not found:
        told = "\n  ".join(shortened(words(argv[0], said))) or "nothing"
        raise NoJobId(f"{argv[0]} told no job's id, but: {told}")
    return found[-1]


def too_many(refusal: str) -> bool:
    """Whether a refusal of sbatch's may be about how many jobs the user has, of which each task of an array is one."""
    return bool(re.search(r"Submit\w*Limit|violates accounting/QOS policy", refusal))


def patiently(ask: Callable[[], T], on: type[Exception] = NoAnswer, patience_s: float | None = None) -> T:
    """`ask()`, again while it raises `on`, as when slurmctld restarts; raises it in the end, others at once."""
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    while True:
        try:
            return ask()
        except on:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)


@dataclass(frozen=True)
class Shown:
    """What SLURM says of a job, or of one task of an array."""

    state: str
    """RUNNING, PENDING, COMPLETING …"""
    restarts: int
    may_requeue: bool
    partition: str
    qos: str
    time_limit: str
    queued_at: str | None
    """When it last entered the queue: for a requeued job, when the nodes of its former life were free again."""
    preempted: bool = False
    """Whether it has been COMPLETING from the very second in which it was pre-empted: by that, unless it had a grace
    period, in which it may have been cancelled."""
    excluded: str = ""
    """Nodes that it is not to have, as SLURM lists them."""


def show(job: str, *, timeout_s: float = TIMEOUT_S) -> Shown | None:
    """None where SLURM knows no such job (any more). Raises SlurmError."""
    try:
        shown = run(["scontrol", "show", "job", "-o", job], timeout_s=timeout_s)
    except SlurmError as e:
        if "Invalid job id" in str(e):
            return None
        raise
    excluded = _field(shown, "ExcNodeList") or "(null)"
    state, preempted_at = _field(shown, "JobState") or "", _stamp(_field(shown, "PreemptTime"))
    return Shown(
        state=state,
        restarts=int(_field(shown, "Restarts") or 0),
        may_requeue=_field(shown, "Requeue") != "0",
        partition=_field(shown, "Partition") or "",
        qos=_field(shown, "QOS") or "",
        time_limit=_field(shown, "TimeLimit") or "",
        queued_at=_stamp(_field(shown, "SubmitTime")),
        preempted=state == "COMPLETING"
        and preempted_at is not None
        and preempted_at == _stamp(_field(shown, "EndTime")),
        excluded="" if excluded == "(null)" else excluded,
    )


@dataclass(frozen=True)
class Queued:
    """What squeue says of a job that SLURM has; of an array, of its liveliest task."""

    state: str
    """RUNNING, PENDING, SUSPENDED, COMPLETING …"""
    reason: str = ""
    """Why it waits, in SLURM's words."""
    start: str | None = None
    """When SLURM expects that a waiting job starts: a stamp, where it says."""


def look_up(jobs: list[str]) -> dict[str, Queued]:
    """Those of `jobs` that SLURM still has, by one question for all of them. Raises SlurmError.

    COMPLETING says that a job's processes are ending, and nothing of what follows: one that is pre-empted is COMPLETING
    before it is PENDING again. Jobs of other users are told too, where the site shows them: a group may share a run.
    """
    found: dict[str, Queued] = {}
    for line in _squeue(jobs):
        line, _, whose = line.partition("|")
        owner, _, name = whose.partition("|")
        if owner not in ("", str(os.geteuid())) and not OUR_NAME.search(name):
            continue  # ids begin anew on a cluster that is set up anew
        base, job, state, start, reason = (*line.split(None, 4), "", "")[:5]
        waits = state == "PENDING"
        told = Queued(state, reason.strip() if waits and reason != "None" else "", _stamp(start) if waits else None)
        for known in {base, job} & set(jobs):
            if state == "RUNNING" or known not in found or found[known].state == "COMPLETING":
                found[known] = told
    return found


def _squeue(jobs: list[str]) -> list[str]:
    """Its lines about these. Of one id alone it says that it is unknown; of several it leaves out those that are."""
    ids = ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))  # an array's stands for all of its tasks
    try:
        asked = ["squeue", "-a", "-h", "-r", "-o", "%F %i %T %S %r|%U|%j", "-j", ids]
        return run(asked).splitlines() if jobs else []
    except SlurmError as e:
        if "Invalid job id" in str(e):
            return []
        raise


def queued(jobs: list[str]) -> dict[str, str]:
    """The states of those of `jobs` that SLURM still has. Raises SlurmError."""
    return {job: told.state for job, told in look_up(jobs).items()}


def max_array_size() -> int:
    """One more than the largest index that an array may have; 1 where SLURM allows no arrays."""
    try:
        return max(1, int(_setting(run(["scontrol", "show", "config"]), "MaxArraySize") or 1001))
    except SlurmError:
        return 1001


@dataclass(frozen=True)
class Mercy:
    """What SLURM does with this job when it takes its nodes."""

    requeues: bool
    grace_s: int
    kill_wait_s: int
    known: bool = True
    """Whether SLURM says so; else it is what it mostly does."""


def mercy(job: str, by_qos: dict[str, str] | None = None) -> Mercy:
    """Whether and how soon pre-emption requeues `job`; where SLURM does not say, that it does, and at once.

    by_qos: what qos_table() was on the login node: accounting is often out of a node's reach.
    """
    try:
        shown = show(job)
        config = run(["scontrol", "show", "config"], timeout_s=10)
        if shown is None:
            return Mercy(True, 0, 30, known=False)
        known = True
        if "qos" in (_setting(config, "PreemptType") or ""):
            mode, grace_s, known = _of_qos(shown.qos, by_qos or {})
        else:
            part = run(["scontrol", "-a", "show", "partition", "-o", shown.partition], timeout_s=10)
            mode, grace_s = _field(part, "PreemptMode") or "", int(_field(part, "GraceTime") or 0)
    except SlurmError:
        return Mercy(True, 0, 30, known=False)
    if mode.lower() in ("", "cluster"):
        mode = _setting(config, "PreemptMode") or ""
    return Mercy(
        requeues=shown.may_requeue and "CANCEL" not in mode.upper(),
        grace_s=grace_s,
        kill_wait_s=int(re.sub(r"\D.*", "", _setting(config, "KillWait") or "30")),
        known=known,
    )


def _of_qos(name: str, table: dict[str, str]) -> tuple[str, int, bool]:
    """PreemptMode and GraceTime in seconds, and whether both are known: from accounting, or from what it once said;
    else the mode from slurmctld, which keeps the grace time to itself.
    """
    try:
        said = run(["sacctmgr", "-nP", "show", "qos", name, "format=PreemptMode,GraceTime"], timeout_s=10).strip()
    except SlurmError:
        said = table.get(name, "")
    if not said:
        try:
            shown = run(["scontrol", "show", "assoc_mgr", "flags=qos", f"qos={name}"], timeout_s=10)
        except SlurmError:
            shown = ""
        return _field(shown, "PreemptMode") or "", 0, False
    mode, _, grace = said.partition("|")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", grace)
    days, hours, minutes, seconds = (int(n or 0) for n in match.groups()) if match else (0, 0, 0, 0)
    return mode, ((days * 24 + hours) * 60 + minutes) * 60 + seconds, True


def qos_table() -> dict[str, str]:
    """PreemptMode|GraceTime of each QOS, where SLURM pre-empts by it and accounting answers; else nothing."""
    try:
        if "qos" not in (_setting(run(["scontrol", "show", "config"], timeout_s=10), "PreemptType") or ""):
            return {}
        said = run(["sacctmgr", "-nP", "show", "qos", "format=Name,PreemptMode,GraceTime"], timeout_s=10)
    except SlurmError:
        return {}
    return dict(line.split("|", 1) for line in said.splitlines() if "|" in line)


def _setting(config: str, key: str) -> str | None:
    match = re.search(rf"^{key}\s*=\s*(\S+)", config, re.M)
    return match.group(1) if match else None


def _field(shown: str, key: str) -> str | None:
    match = re.search(rf"\b{key}=(\S+)", shown)
    return match.group(1) if match else None


def _stamp(local_time: str | None) -> str | None:
    """Of a local time as SLURM writes it; None for anything else, such as None and Unknown."""
    try:
        return stamp(datetime.strptime(local_time or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def requeue(job: str) -> None:
    run(["scontrol", "requeue", job], timeout_s=60)


def exclude(job: str, nodes: str) -> None:
    """`job`, which waits, is not to have these nodes. Raises SlurmError."""
    run(["scontrol", "update", f"jobid={job}", f"excnodelist={nodes}"])


def spare_nodes(partition: str, excluded: str) -> tuple[int, list[str]]:
    """How many nodes a partition has, and those of them that are not excluded. Raises SlurmError."""
    every = set(run(["sinfo", "-h", "-N", "-p", partition, "-o", "%N"]).split())
    without = set(run(["scontrol", "show", "hostnames", excluded]).split()) if excluded else set()
    return len(every), sorted(every - without)


def dependents(job: str) -> list[str]:
    """The user's jobs and arrays that wait for `job` to end. Raises SlurmError."""
    lines = (line.split("|", 1) for line in run(["squeue", "-a", "-h", "--me", "-o", "%F|%E"]).splitlines())
    return sorted({base for base, waits_for in lines if re.search(rf"\bafterany:{job}(?:_\*)?(?!\w)", waits_for)})


def followers(job: str) -> list[str]:
    """What waits for `job` to end, and what waits for that. Raises SlurmError."""
    found: list[str] = []
    todo = [job.partition("_")[0]]
    while todo:
        new = [other for other in dependents(todo.pop()) if other not in found]
        found += new
        todo += new
    return found


def make_wait(job: str, other: str) -> None:
    """`job`, which has not begun, waits for `other` to end, and for nothing else. Raises SlurmError."""
    run(["scontrol", "update", f"jobid={job}", f"dependency=afterany:{other}"])


def cancel_waiting(job: str) -> None:
    """Of an array: its tasks that have not begun."""
    run(["scancel", "--state=PENDING", job])


def any_cancelled(job: str) -> bool:
    """Whether SLURM remembers `job`, or a task of it, as cancelled by its owner or an administrator."""
    try:
        return bool(re.search(r"\bJobState=CANCELLED\b", run(["scontrol", "show", "job", "-o", job])))
    except NoAnswer:
        raise
    except SlurmError:  # forgotten: some minutes after its end
        return False


def cancel(jobs: list[str]) -> None:
    run(["scancel", *jobs])
