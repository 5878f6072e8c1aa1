"""Queries to SLURM, and how its answers are read. Knows no run."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from ddpm.run.files import stamp
from launch.cluster import asked, environment, slurm
from launch.cluster.answers import Mercy, NoAnswer, Queued, SchedulerError, Shown
from launch.cluster.slurm import TIMEOUT_S

CONFS = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf")
"""slurm.conf by default, and where slurmd keeps one that was sent to it."""
NAMED = re.compile(r"^\s*ClusterName\s*=\s*([^\s#]+)", re.M | re.I)
ASKED_AT_ONCE = 10_000
"""Ids in one query: Linux takes no word of a command that has more than 128 KiB."""
HELD = ("REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
"""What SLURM calls a waiting job that it holds, by how it came to that; with other reasons it is PENDING."""
FRESH_S = 5.0
"""For so long an answer about the jobs of several runs serves for each of them: who is told that a job is in the queue
queues no other, and that job may have ended since."""
ENDING_FRESH_S = 1.0
"""The same for one that is COMPLETING."""
OUR_NAME = re.compile(r"-(?:train|sample|evaluate)$")
"""How the names of this project's jobs end."""


def show(job: str, *, timeout_s: float = TIMEOUT_S) -> Shown | None:
    """None where SLURM knows no such job (any more). Raises SchedulerError."""
    try:
        shown = slurm.run(["scontrol", "show", "job", "-o", job], timeout_s=timeout_s)
    except SchedulerError as e:
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
        suspended_at=_stamp(_field(shown, "SuspendTime")),
    )


class _Together:
    """Jobs of the cluster that is asked now, which are asked about at once, and what was answered."""

    def __init__(self, jobs: Iterable[str]) -> None:
        self._cluster, self._jobs = asked.cluster(), dict.fromkeys(jobs)
        self._found: dict[str, Queued] = {}
        self._asked_at = -FRESH_S

    def knows(self, jobs: list[str]) -> bool:
        return self._cluster == asked.cluster() and self._jobs.keys() >= set(jobs)

    def look_up(self, jobs: list[str]) -> dict[str, Queued]:
        ending = any(self._found[job].state == "COMPLETING" for job in jobs if job in self._found)
        if time.monotonic() - self._asked_at >= (ENDING_FRESH_S if ending else FRESH_S):
            self._found, self._asked_at = _look_up([*self._jobs]), time.monotonic()
        return {job: told for job, told in self._found.items() if job in jobs}


_together: ContextVar[_Together | None] = ContextVar("together", default=None)


@contextlib.contextmanager
def looked_up_together(jobs: Iterable[str]) -> Iterator[None]:
    """Within: whoever asks about some of these jobs is answered by one query for all of them, which is made again after
    FRESH_S, and sooner where one that is asked about was COMPLETING."""
    token = _together.set(_Together(jobs))
    try:
        yield
    finally:
        _together.reset(token)


def look_up(jobs: list[str]) -> dict[str, Queued]:
    """The `jobs` that SLURM still has, by one query for all of them, or a few. Raises SchedulerError.

    COMPLETING only means that a job's processes are ending: a pre-empted job is COMPLETING before it is PENDING again.
    Jobs of other users are included if the site shows them, since a group may share a run.
    """
    together = _together.get()
    return together.look_up(jobs) if together is not None and together.knows(jobs) else _look_up(jobs)


def _look_up(jobs: list[str]) -> dict[str, Queued]:
    found: dict[str, Queued] = {}
    wanted = set(jobs)
    for line in _squeue(jobs):
        line, _, whose = line.partition("|")
        owner, _, name = whose.partition("|")
        if owner not in ("", str(os.geteuid())) and not OUR_NAME.search(name):
            continue  # ids begin anew on a cluster that is set up anew
        base, job, state, start, reason = (*line.split(None, 4), "", "")[:5]
        state = "PENDING" if state in HELD else state
        waits = state == "PENDING"
        why = reason.strip() if (waits and reason != "None") or " held " in reason else ""  # put back to be held
        told = Queued(state, why, _stamp(start) if waits else None)
        for known in {base, job} & wanted:
            if state == "RUNNING" or known not in found or found[known].state == "COMPLETING":
                found[known] = told
    return found


def _squeue(jobs: list[str]) -> list[str]:
    """squeue's lines about these jobs. It reports an error for a single unknown id, and leaves out unknown ones of
    several."""
    ids = list(dict.fromkeys(job.partition("_")[0] for job in jobs))  # an array's stands for all of its tasks
    lines = []
    for first in range(0, len(ids), ASKED_AT_ONCE):
        some = ",".join(ids[first : first + ASKED_AT_ONCE])
        try:
            lines += slurm.run(["squeue", "-a", "-h", "-r", "-o", "%F %i %T %S %r|%U|%j", "-j", some]).splitlines()
        except SchedulerError as e:
            if "Invalid job id" not in str(e):
                raise
    return lines


def dependents(job: str) -> list[str]:
    """The user's jobs and arrays that wait for `job` to end. Raises SchedulerError."""
    lines = (line.split("|", 1) for line in slurm.run(["squeue", "-a", "-h", "--me", "-o", "%F|%E"]).splitlines())
    return sorted({base for base, waits_for in lines if re.search(rf"\bafterany:{job}(?:_\*)?(?!\w)", waits_for)})


def any_cancelled(job: str) -> bool:
    """Whether SLURM still knows that `job`, or a task of it, was cancelled by its owner or an administrator."""
    try:
        return bool(re.search(r"\bJobState=CANCELLED\b", slurm.run(["scontrol", "show", "job", "-o", job])))
    except NoAnswer:
        raise
    except SchedulerError:  # forgotten: some minutes after its end
        return False


def cluster_name() -> str:
    """This cluster's name in lower case, from the job's environment, slurm.conf or slurmctld; "" if none has it."""
    named = environment.cluster()
    return named or (_name_of_the_cluster(os.environ.get("SLURM_CONF")) if slurm.available("squeue") else "")


@cache
def _name_of_the_cluster(conf: str | None) -> str:
    said = ""
    for path in (conf or CONFS[0], *CONFS[1:]):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            said = Path(path).read_text()
            break
    if (match := NAMED.search(said)) is None:
        with contextlib.suppress(SchedulerError):
            match = NAMED.search(slurm.run(["scontrol", "show", "config"], timeout_s=10))
    return match[1].lower() if match else ""


def max_array_size() -> int:
    """SLURM's MaxArraySize, one more than the largest index of an array; 1 if arrays are not allowed."""
    try:
        return max(1, int(_setting(slurm.ask(["scontrol", "show", "config"]), "MaxArraySize") or 1001))
    except SchedulerError:
        return 1001


def spare_nodes(partition: str, excluded: str) -> tuple[int, list[str]]:
    """The number of nodes of a partition, and the names of those that are not excluded. Raises SchedulerError."""
    every = set(slurm.ask(["sinfo", "-h", "-N", "-p", partition, "-o", "%N"]).split())
    without = set(slurm.ask(["scontrol", "show", "hostnames", excluded]).split()) if excluded else set()
    return len(every), sorted(every - without)


def mercy(job: str, told: dict[str, str] | None = None) -> Mercy:
    """Whether and how soon pre-emption requeues `job`; if SLURM does not say, that it does so at once.

    told: the result of preemption() on the login node, with `no-requeue` if the job must not be requeued: a node often
    cannot reach accounting, and a container has none of SLURM's commands.
    """
    told = told or {}
    try:
        shown = show(job)
        if shown is None:
            return Mercy(True, 0, 30, known=False)
        config = slurm.run(["scontrol", "show", "config"], timeout_s=10)
        known = True
        if "qos" in (_setting(config, "PreemptType") or ""):
            mode, grace_s, known = _of_qos(shown.qos, told)
        else:
            part = slurm.run(["scontrol", "-a", "show", "partition", "-o", shown.partition], timeout_s=10)
            mode, grace_s = _field(part, "PreemptMode") or "", int(_field(part, "GraceTime") or 0)
        return _mercy(mode, grace_s, config, known, may_requeue=shown.may_requeue)
    except SchedulerError:
        partition, qos = environment.partition_and_qos()
        said = told.get(f"qos {qos}" if "qos" in told.get("PreemptType", "") else f"partition {partition}")
        if said is None:
            return Mercy(True, 0, 30, known=False)
        config = "\n".join(f"{key} = {value}" for key, value in told.items())
        return _mercy(*mode_and_grace(said), config, True, may_requeue="no-requeue" not in told)


def _mercy(mode: str, grace_s: int, config: str, known: bool, *, may_requeue: bool) -> Mercy:
    """mode, grace_s: of the partition or QOS; config: of the cluster."""
    if mode.lower() in ("", "cluster"):
        mode = _setting(config, "PreemptMode") or ""
    return Mercy(
        requeues=may_requeue and "CANCEL" not in mode.upper(),
        grace_s=grace_s,
        kill_wait_s=int(re.sub(r"\D.*", "", _setting(config, "KillWait") or "30")),
        known=known,
    )


def _of_qos(name: str, told: dict[str, str]) -> tuple[str, int, bool]:
    """PreemptMode and GraceTime (s) of a QOS, and whether both are known: from accounting now or as `told`; else the
    mode alone from slurmctld, which does not show the grace time.
    """
    try:
        said = slurm.run(["sacctmgr", "-nP", "show", "qos", name, "format=PreemptMode,GraceTime"], timeout_s=10).strip()
    except SchedulerError:
        said = told.get(f"qos {name}", "")
    if not said:
        try:
            shown = slurm.run(["scontrol", "show", "assoc_mgr", "flags=qos", f"qos={name}"], timeout_s=10)
        except SchedulerError:
            shown = ""
        return _field(shown, "PreemptMode") or "", 0, False
    return *mode_and_grace(said), True


def mode_and_grace(said: str) -> tuple[str, int]:
    """PreemptMode and GraceTime in seconds of MODE|SECONDS or MODE|[DAYS-]HH:MM:SS."""
    mode, _, grace = said.partition("|")
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):(\d+):)?(\d+)", grace)
    days, hours, minutes, seconds = (int(n or 0) for n in match.groups()) if match else (0, 0, 0, 0)
    return mode, ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def preemption(partitions: str | None) -> dict[str, str]:
    """How this cluster pre-empts, as far as it says: its settings, and PreemptMode|GraceTime of each QOS, if
    pre-emption is by QOS, else of these partitions (None: of all).
    """
    told: dict[str, str] = {}
    with contextlib.suppress(SchedulerError):
        config = slurm.ask(["scontrol", "show", "config"], timeout_s=10)
        told = {key: _setting(config, key) or "" for key in ("PreemptType", "PreemptMode", "KillWait")}
        if "qos" in told["PreemptType"]:
            said = slurm.ask(["sacctmgr", "-nP", "show", "qos", "format=Name,PreemptMode,GraceTime"], timeout_s=10)
            told |= {f"qos {name}": rest for name, rest in (line.split("|", 1) for line in said.split() if "|" in line)}
        else:
            for line in slurm.ask(["scontrol", "-a", "show", "partition", "-o"], timeout_s=10).splitlines():
                name = _field(line, "PartitionName") or ""
                if partitions is None or name in partitions.split(","):
                    told[f"partition {name}"] = f"{_field(line, 'PreemptMode') or ''}|{_field(line, 'GraceTime') or 0}"
    return told


def _setting(config: str, key: str) -> str | None:
    match = re.search(rf"^{key}\s*=\s*(\S+)", config, re.M)
    return match.group(1) if match else None


def _field(shown: str, key: str) -> str | None:
    match = re.search(rf"\b{key}=(\S+)", shown)
    return match.group(1) if match else None


def _stamp(written: str | None) -> str | None:
    """The stamp of a time as slurm.TIMES has SLURM write it, or of a local one, where a site's commands do not heed
    that; None for anything else, such as None and Unknown."""
    written = written or ""
    try:
        if written.isdecimal():
            return stamp(datetime.fromtimestamp(int(written), timezone.utc))
        return stamp(datetime.strptime(written, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError, OSError):
        return None
