"""How SLURM says that jobs have ended which could not say so themselves. Knows no run."""

from __future__ import annotations

import contextlib
import math
import os
import pwd
import re
import signal
import time
from collections.abc import Iterable, Sequence

from launch.cluster import asked, slurm
from launch.cluster.answers import SchedulerError
from launch.cluster.slurm_questions import ASKED_AT_ONCE

AGAIN_S = 60.0
"""So long after SLURM knew nothing of a job's end it is asked again; what it knew stays."""
ONE_BY_ONE = 50
"""Of so many jobs at most is slurmctld asked, which tells of one at a time, where accounting knows nothing."""
TIMEOUT_S = 10
MEANS = {
    "OUT_OF_MEMORY": "it used more memory than it had asked for: ask for more, --mem",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not come up",
    "DEADLINE": "the time of its --deadline was over",
    "PREEMPTED": "a job of higher priority took its nodes",
    "TIMEOUT": "its time limit was over before it had saved and left",
}
ENDED = (*MEANS, "CANCELLED", "FAILED", "COMPLETED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL")

_known: dict[tuple[str, str], tuple[float, str]] = {}
"""Cluster and job -> until when an answer about it holds, and the answer."""


def ends(jobs: Iterable[str]) -> dict[str, str]:
    """How each of these jobs has ended, in words; "" where SLURM does not know it, or cannot be asked."""
    here, now, wanted = asked.cluster(), time.monotonic(), list(dict.fromkeys(jobs))
    new = [job for job in wanted if _known.get((here, job), (-math.inf, ""))[0] < now]
    found = _by_accounting(new) if new else {}
    for job in [job for job in new if job not in found][:ONE_BY_ONE]:
        found |= _by_slurmctld(job)
    for job in new:
        _known[here, job] = (math.inf, found[job]) if job in found else (now + AGAIN_S, "")
    return {job: _known[here, job][1] for job in wanted}


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of those for real time only the first and the last have a name
        return f"signal {number}"


def _by_accounting(jobs: Sequence[str]) -> dict[str, str]:
    """Of the jobs that sacct knows to have ended: a job's state is first, those of its steps follow."""
    found: dict[str, tuple[str, str]] = {}
    for first in range(0, len(jobs), ASKED_AT_ONCE):
        some = ",".join(jobs[first : first + ASKED_AT_ONCE])
        question = ["sacct", "-n", "-P", "-j", some, "-o", "JobID,State,ExitCode"]
        with contextlib.suppress(SchedulerError):
            for line in slurm.run(question, timeout_s=TIMEOUT_S).splitlines():
                job, state, code = [*line.split("|"), "", ""][:3]
                job, _, step = job.partition(".")
                if job in jobs and (not step or (job in found and state == "OUT_OF_MEMORY")):
                    found[job] = state, code
    return {job: words for job, (state, code) in found.items() if (words := _in_words(state, code))}


def _by_slurmctld(job: str) -> dict[str, str]:
    """The same of one that slurmctld remembers, as it does for some minutes."""
    try:
        shown = slurm.run(["scontrol", "show", "job", "-o", job], timeout_s=TIMEOUT_S)
    except SchedulerError:
        return {}
    told = dict(re.findall(r"\b(JobState|ExitCode)=(\S+)", shown))
    words = _in_words(told.get("JobState", ""), told.get("ExitCode", ""))
    return {job: words} if words else {}


def _in_words(told: str, code: str) -> str:
    """told: CANCELLED by 0; code: 0:9, an exit code and a signal. "" for a job that has not ended."""
    state, _, by = told.partition(" by ")
    if state not in ENDED:
        return ""
    why = MEANS.get(state, "")
    if state == "CANCELLED" and by:
        why = f"by {_name(by)}"
    elif state == "FAILED":
        number, _, killed_by = code.partition(":")
        by_signal = killed_by not in ("", "0")
        why = f"its batch shell was killed by {signal_name(int(killed_by))}" if by_signal else f"exit code {number}"
    return f"SLURM calls it {state}{f' ({why})' if why else ''}"


def _name(uid: str) -> str:
    try:
        return "you" if int(uid) == os.geteuid() else pwd.getpwuid(int(uid)).pw_name
    except (KeyError, ValueError):
        return f"uid {uid}"
