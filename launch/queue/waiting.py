"""Which jobs of a run SLURM has: the run's events name them, and SLURM is asked about them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ddpm.config.sample import Evaluate
from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from launch.cluster import scheduler

EVALUATION = ("reference", "extractor")
"""Options by which an evaluation may differ from its run's config."""
COMPLETING_POLL_S = 2.0
COMPLETING_AT_MOST_S = 60.0


def jobs_in_queue(run: RunDir, stage: str, set_name: str = "") -> list[str]:
    """Ids of the run's jobs of this stage (and set) that SLURM has. Raises SchedulerError."""
    return in_queue(slurm_jobs(run, read_events(run), stage, set_name))


@contextlib.contextmanager
def asked_together(runs: Iterable[RunDir]) -> Iterator[set[str]]:
    """Within: SLURM is asked at once about all jobs that these runs have now, which are given, and once about itself:
    each question may take seconds. A job that is queued meanwhile is asked about by itself."""
    jobs: set[str] = set()
    for run in runs:
        with contextlib.suppress(OSError):  # whoever asks about this run meets the error again
            jobs.update(slurm_jobs(run, read_events(run)))
    with scheduler.asked_once(), scheduler.looked_up_together(jobs):
        yield jobs


def of_this_cluster(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events without those of jobs on other clusters, whose ids mean other jobs here; events without a cluster
    stay."""
    here = scheduler.cluster_name()
    return [e for e in events if not here or e.get("cluster", here) == here]


def home(events: list[dict[str, Any]]) -> str:
    """The cluster of the run's last job; "" where nothing says so."""
    return next((str(e.get("cluster", "")) for e in reversed(events) if _is_job(e)), "")


def on_other_clusters(run: RunDir, stage: str | None = None) -> dict[str, str]:
    """The run's jobs, of one stage or of all, that SLURM has on other clusters than the one that is asked, as 17;b ->
    state. A cluster that does not answer counts as having none, with a warning unless it is not known here."""
    return ask_other_clusters(run, stage)[0]


def ask_other_clusters(run: RunDir, stage: str | None = None) -> tuple[dict[str, str], tuple[str, ...]]:
    """`on_other_clusters`, and the clusters that did not answer."""
    events, here = read_events(run), scheduler.cluster_name()
    others = dict.fromkeys(str(e["cluster"]) for e in events if _is_job(e) and e.get("cluster", here) != here)
    found, silent = dict[str, str](), list[str]()
    for cluster in others if here and scheduler.available() else ():
        with scheduler.asking(cluster):
            try:
                states = scheduler.queued(slurm_jobs(run, events, stage))
            except scheduler.SchedulerError as e:
                if isinstance(e, scheduler.NoAnswer):
                    silent.append(cluster)
                    _warn(f"cluster {cluster}, which had jobs of run {run.name}: {str(e).splitlines()[-1].strip()}")
                continue
        found |= {f"{job};{cluster}": state for job, state in states.items()}
    return found, tuple(silent)


@cache
def _warn(what: str) -> None:
    """Once, however often it is asked."""
    print(f"warning: {what}", file=sys.stderr)


def _is_job(event: dict[str, Any]) -> bool:
    return event["event"] in ("submitted", "allocated") and str(event["job"])[:1].isdigit()


def is_of(run: RunDir, submitted: dict[str, Any]) -> bool:
    """Whether a submission may have been for this run: not if its recorded path is another existing directory."""
    there = submitted.get("run") or str(run.path)
    try:
        return there == str(run.path) or Path(there).samefile(run.path)
    except (OSError, ValueError):  # moved since, or mounted otherwise on this machine
        return True


def submission(run: RunDir, job: str) -> dict[str, Any]:
    """The event of a job's submission, or of the array's of which it is a task; {} if there is none. Raises OSError."""
    base, events = job.partition("_")[0], of_this_cluster(read_events(run))
    return next((e for e in reversed(events) if e["event"] == "submitted" and e["job"] == base), {})


def is_told_to_stop(run: RunDir, job: str) -> bool:
    """Whether STOP exists and is meant for a job, that is, was not there when its samples or score were asked for."""
    return run.is_stopped() and run.stop_mark() != known_stop(run, job)


def known_stop(run: RunDir, job: str) -> str:
    """The mark of the STOP despite which a job was submitted; "" if there was none. Raises OSError."""
    return str(submission(run, job).get("despite") or "")


def evaluations_in_queue(run: RunDir, set_name: str, asked: Evaluate, default: Evaluate) -> list[str]:
    """Ids of queued evaluations of a set with this extractor and reference. Raises SchedulerError.

    default: the config's `evaluate`, used for options that a job was not given.
    """
    events = of_this_cluster(read_events(run))
    told = {e["job"]: e.get("args") or [] for e in events if e["event"] == "submitted"}
    jobs = slurm_jobs(run, events, "evaluate", set_name)
    return in_queue([job for job in jobs if _evaluation_of(told.get(job, []), default) == asked])


def _evaluation_of(args: list[str], default: Evaluate) -> Evaluate:
    """The evaluation that a job with arguments `args` computes."""
    said = {option: args[args.index(f"--{option}") + 1] for option in EVALUATION if f"--{option}" in args}
    return default.model_copy(update=said)


def in_queue(jobs: list[str]) -> list[str]:
    """The `jobs` that SLURM has.

    A job that is COMPLETING may soon be gone, or queued again after pre-emption: waits to see which. One that stays
    COMPLETING, as on an unreachable node, counts as gone; if it should come back, the run's lock keeps it out.
    """
    if not jobs or not scheduler.available():
        return []
    asked_at, polls = time.monotonic(), 0
    while True:
        try:
            states = scheduler.queued(jobs)
        except scheduler.NoAnswer as e:
            raise scheduler.NoAnswer(
                f"cannot tell whether job {' '.join(jobs)} is in the queue while SLURM does not answer: "
                f"{scheduler.NOT_REACHED}\n  {e}"
            ) from None
        ending = [job for job, state in states.items() if state == "COMPLETING"]
        if not ending or time.monotonic() - asked_at > COMPLETING_AT_MOST_S:
            return [job for job in states if job not in ending]
        if polls == 1:
            print(f"waiting for SLURM to end job {' '.join(ending)}, or to queue it again", file=sys.stderr, flush=True)
        polls += 1
        time.sleep(COMPLETING_POLL_S)


def slurm_jobs(run: RunDir, events: list[dict[str, Any]], stage: str | None = None, set_name: str = "") -> list[str]:
    """Ids of this cluster's jobs in the run's events, of one stage or of all, without those of a run of which this one
    is a copy.

    A training job that was submitted by hand first appears when it has its nodes.
    """
    events = of_this_cluster(events)
    others = {e["job"] for e in events if e["event"] == "submitted" and not is_of(run, e)}
    told = (e for e in events if _is_job(e))
    told = (e for e in told if e["job"] not in others)
    wanted = (e for e in told if stage is None or (e.get("stage", "train"), e.get("set", "")) == (stage, set_name))
    return list(dict.fromkeys(e["job"] for e in wanted))


def mercy_for(run: RunDir, job: str) -> scheduler.Mercy:
    """What SLURM does with a job of the run at pre-emption, by what it says now and said at submission."""
    told: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        told = submission(run, job)
    known = dict(told.get("preemption") or {})
    if "no-requeue" in (told.get("options") or {}):
        known["no-requeue"] = "1"
    return scheduler.mercy(job, known)
