"""Shows a run's progress while its jobs run: a bar on a terminal, lines elsewhere. Changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ddpm.run.events import read_events
from ddpm.run.files import seconds
from ddpm.run.log import plain
from ddpm.run.paths import RunDir
from ddpm.run.records import BEATS_S, read_heartbeat
from launch.cluster import scheduler
from launch.queue import local, work
from launch.queue.waiting import slurm_jobs
from launch.terminal import faults, logfiles, making, streams

POLL_S = 2.0
LINE_EVERY_S = 30.0
ENDING_POLLS = 150  # five minutes: on a node that is out of reach a job may be COMPLETING for hours


def watch_with(run: RunDir) -> str:
    """The line to print once something of a run is queued."""
    return f"watch it with: python launch/status.py {run.quoted} --watch"


def _told(states: dict[str, str], stages: dict[str, str]) -> str:
    """A few jobs by their stages, those that run first, and how many more there are: `train 8 running and 2 more`."""
    first = sorted(states, key=lambda job: states[job] == "PENDING")[:2]
    told = [f"{stages.get(job, '')} {job} {states[job].lower()}".strip() for job in first]
    return ", ".join(told) + (f" and {len(states) - 2} more" if len(states) > 2 else "")


Stage = tuple[str, str]
"""A stage's name, and its set; "" for training."""


class Follower:
    """Shows how a run gets on while its jobs run: a progress bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, run: RunDir, log: Path | None = None) -> None:
        """log: the file that the work writes; None: the run's newest log."""
        self._run, self._log = run, log
        self._bar: Any = None
        self._task: Any = None
        self._said_at = 0.0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(file=streams.below(sys.stderr)),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("waiting", total=None)

    def show(self, state: str, at_work: Stage | None = None, jobs: Collection[str] = ()) -> None:
        """at_work: what runs; None: not known. jobs: of whose logs alone it tells."""
        stage, set_name = at_work or (None, "")
        beat, now = read_heartbeat(self._run), time.time()
        step, total, more = beat.get("step", 0), beat.get("total_steps"), ""
        trains = bool(beat) and abs(now - seconds(beat["time"])) < BEATS_S and (total is None or step < total)
        if trains and stage in (None, "train"):
            what = "step"
            more += f"  loss {beat['loss']:.4f}" if beat.get("loss") is not None else ""
            more += f"  {beat['images_per_s']:.0f} img/s" if beat.get("images_per_s") else ""
        elif (
            stage in (None, "sample")
            and (made := making.newest(self._run, now, set_name))
            and (stage or made.shards < made.of_shards)
        ):
            step, total, what = made.shards, made.of_shards, "shards"
            more = f"  {made.told(now)}" if 0 < made.images < made.of_images else self._says(jobs)
        else:  # a score of what is there, or training not under way
            step, total, what = 0, None, self._says(jobs).lstrip()
        if self._bar is not None:
            self._bar.update(self._task, description=f"{state} {what}{more}", completed=step, total=total)
        elif time.monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = time.monotonic()
            count = f" {step}{f'/{total}' if total else ''}" if what in ("step", "shards") else ""
            print(f"{state}  {what}{count}{more}".rstrip(), flush=True)

    def _says(self, jobs: Collection[str]) -> str:
        """The last line with a time of these jobs' newest log, without the time."""
        logs = [self._log] if self._log else logfiles.of_run(self._run, None)
        log = next((log for log in reversed(logs) if not jobs or logfiles.job_of(log) in jobs), None)
        said = re.findall(r"^20\S+Z (.*)$", logfiles.tail(log), re.M) if log else []
        return f"  {plain(said[-1])}" if said else ""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def follow_process(run: RunDir, process: subprocess.Popen[bytes], log: Path) -> int:
    """Show progress until a background process ends; returns the exit code to leave with: 0, 1 where it failed, 130
    after ctrl-C, which stops watching, not the work."""
    follower = Follower(run, log)
    try:
        while process.poll() is None:
            follower.show("running")
            time.sleep(0.2)
    except KeyboardInterrupt:
        follower.close()
        print(f"still running in the background (pid {process.pid}); stop it with: {work.to_end(run)}", file=sys.stderr)
        return 130
    follower.close()
    if process.returncode:
        print(
            "".join(f"  {line}\n" for line in logfiles.last_error(log.read_text(errors="replace"))),
            end="",
            file=sys.stderr,
        )
        why = faults.cannot_write(run.logs)  # then its log does not say why either
        told = f"its log: {log}" + (f". {why}" if why else "")
        print(f"error: the job {local.how_ended(process.returncode)}; {told}", file=sys.stderr)
    return 1 if process.returncode else 0


def follow_jobs(run: RunDir, jobs: list[str], only: Sequence[Stage] = ()) -> None:
    """Show progress until SLURM has none of `jobs` nor of their successors: any other job of the run, or of the stages
    `only`. Asks squeue, which is cheaper than sacct."""
    follower = Follower(run)
    quiet = ending = 0
    known = set(jobs)
    try:
        while quiet < 3:  # a job that comes back is away for a moment
            events = read_events(run)
            known.update(*(slurm_jobs(run, events, *of) for of in only) if only else [slurm_jobs(run, events)])
            try:
                states = scheduler.queued(sorted(known))
            except scheduler.SchedulerError:
                time.sleep(POLL_S)
                continue
            ending = ending + 1 if set(states.values()) == {"COMPLETING"} else 0
            quiet = 0 if states and ending < ENDING_POLLS else quiet + 1
            if states:
                stages = {
                    e["job"]: (e.get("stage", "train"), e.get("set", "")) for e in events if e["event"] == "submitted"
                }
                at_work = next((stages.get(job) for job, state in states.items() if state == "RUNNING"), ("", ""))
                follower.show(_told(states, {job: stage for job, (stage, _) in stages.items()}), at_work, states)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        follower.close()
        print(f"no longer watching; the jobs go on. See: python launch/status.py {run.quoted}", file=sys.stderr)
        raise
    follower.close()
