"""What is at work for a run, or waits to be, wherever it is: jobs of the scheduler's, processes here, a trainer's beat.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ddpm.run.events import read_events
from ddpm.run.files import seconds
from ddpm.run.paths import RunDir
from ddpm.run.records import place_of, read_heartbeat
from launch.cluster import scheduler
from launch.queue import local
from launch.queue.waiting import slurm_jobs

BEATS_S = 60.0
"""A trainer gives a sign of life more often."""


@dataclass(frozen=True)
class Work:
    waiting: list[str]
    """Jobs of SLURM's that have tasks which have not begun."""
    running: list[str]
    """Those that have nodes; one whose tasks do both is among both."""
    here: dict[str, int]
    """Background jobs of this machine, and their processes."""
    elsewhere: str = ""
    """Who trains the run as none of these, if somebody has given a sign of life just now."""

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running or self.here or self.elsewhere)

    def __str__(self) -> str:
        told = [f"job {job}" for job in dict.fromkeys([*self.running, *self.waiting])]
        told += [f"{job} (pid {pid})" for job, pid in self.here.items()]
        return ", ".join([*told, *([self.elsewhere] if self.elsewhere else [])])


def of_run(run: RunDir) -> Work:
    """Raises SchedulerError where SLURM does not answer."""
    jobs = slurm_jobs(run, read_events(run))
    states = scheduler.states(jobs) if jobs and scheduler.available() else {}
    waiting = [job for job, of_tasks in states.items() if "PENDING" in of_tasks]
    running = [job for job, of_tasks in states.items() if of_tasks - {"PENDING"}]
    here = {job: pid for job, (pid, _) in local.at_work(run).items()}
    return Work(waiting, running, here, "" if running or here else _beats(run))


def _beats(run: RunDir) -> str:
    beat = read_heartbeat(run)
    if not beat or abs(time.time() - seconds(beat["time"])) > BEATS_S or beat.get("inode", place_of(run)) != place_of(run):
        return ""
    return f"job {beat['job']} on {beat.get('host')}, which was alive {abs(time.time() - seconds(beat['time'])):.0f} s ago"
