"""Faults on a real SLURM (the throwaway one of tools/slurm_testbed), as an ordinary user.

Each row submits real runs through launch/submit.py, breaks something, and reads the run directory and SLURM.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpm.rundir import RunDir, read_events, read_jsonl
from tools.chaos.files import Result
from tools.chaos.processes import TINY, curve, final, same
from tools.slurm_testbed.harness import SlurmTestbed

LONG = "train.total_steps=1000000"


@dataclass
class Cluster:
    """The testbed with a place for runs, and the submission path that rows use."""

    bed: SlurmTestbed
    root: Path
    via: str
    runs: int = 0

    def submit(self, *words: str, ranks: int = 1) -> tuple[RunDir, str]:
        """Queue a tiny run; returns it and its job id."""
        self.runs += 1
        name = f"{self.via}{self.runs}"
        argv = [self.bed.python, self.bed.project / "launch" / "submit.py", "--partition", "gpu", "--gpus-per-node",
                "0", "--nodes", str(ranks), "--tasks-per-node", "1", "--via", self.via, "--root", self.root, "--name",
                name, *TINY, *words]  # fmt: skip
        said = self.bed.run(argv, check=True, timeout=120).stdout
        return RunDir(self.root / name), said.split("queued: train as job ")[1].split()[0]

    def wait_steps(self, run: RunDir, more: int = 3) -> None:
        """Until the run has logged some further lines: it trains."""
        goal = len(read_jsonl(run.metrics)) + more
        self.bed.wait_for(lambda: len(read_jsonl(run.metrics)) >= goal, 120, f"{run.name} training")

    def wait_restart(self, job: str, count: int) -> None:
        bed = self.bed
        bed.wait_for(
            lambda: bed.restart_count(job) == count and bed.job_state(job) == "RUNNING", 120, f"job {job} back"
        )

    def ranks(self, run: RunDir) -> list[int]:
        """Process ids of the run's training ranks."""
        found: dict[int, int] = {}
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                command = (proc / "cmdline").read_bytes()
                env = dict(e.partition(b"=")[::2] for e in (proc / "environ").read_bytes().split(b"\0"))
                is_python = b"python" in command.split(b"\0")[0]
                if is_python and str(run.path).encode() in command and b"SLURM_STEP_NUM_TASKS" in env:
                    found[int(env[b"SLURM_PROCID"])] = int(proc.name)
        return [pid for _, pid in sorted(found.items())]


@contextlib.contextmanager
def cluster(project: Path, python: str, via: str) -> Iterator[Cluster]:
    bed = SlurmTestbed(project, python)
    try:
        bed.start()
        yield Cluster(bed, bed.mkdir("runs"), via)
    finally:
        bed.stop()


def steps_at(run: RunDir, event: str) -> list[int]:
    return [e["step"] for e in read_events(run) if e["event"] == event]


# ---------------------------------------------------------------- rows


def pre_empted_in_a_row(c: Cluster, count: int) -> Result:
    """Pre-empted `count` times as soon as it trains again, then left alone; compared with an undisturbed run."""
    length = f"train.total_steps={400 + 700 * count}"
    run, job = c.submit(length)
    for times in range(1, count + 1):
        c.wait_steps(run, 2)
        c.bed.preempt(c.bed.node_of(job) or "", 1)
        c.wait_restart(job, times)
    state = c.bed.wait_state(job, timeout_s=600)
    calm, other = c.submit(length)
    c.bed.wait_state(other, timeout_s=600)
    stops, resumed = steps_at(run, "stop_requested"), steps_at(run, "resumed")
    lost = sum(a != b for a, b in zip(stops, resumed, strict=False))
    identical = same(final(run), final(calm)) and curve(run) == curve(calm)
    passed = state == "COMPLETED" and lost == 0 and identical and len(stops) == len(resumed) == count
    return Result(f"{count} pre-emptions in a row", "0 steps lost, one job id, identical end",
                  f"{len(stops)} stops, {lost} lost, {state}, identical: {identical}", passed)  # fmt: skip


def cancelled(c: Cluster, count: int) -> Result:
    """scancel in training, while saving, and inside the grace period of a pre-emption; nobody comes back."""
    chosen = random.Random(3)
    jobs: list[tuple[str, str]] = []
    for i in range(count):
        moment = ("in training", "in a save", "in the grace period")[i % 3]
        every = ["checkpoint.every_steps=1"] if moment == "in a save" else []
        run, job = c.submit(LONG, *every)
        c.wait_steps(run, 1)
        time.sleep(chosen.uniform(0, 0.5))
        if moment == "in the grace period":
            c.bed.preempt(c.bed.node_of(job) or "", 1)
            c.bed.wait_for(lambda run=run: steps_at(run, "stop_requested"), 30, "the grace period")
        c.bed.cancel(job)
        c.bed.wait_state(job)
        jobs.append((job, moment))
    time.sleep(10)  # longer than a requeued job is held back here
    back = [f"{job} ({moment})" for job, moment in jobs
            if c.bed.job_state(job) != "CANCELLED" or c.bed.restart_count(job)]  # fmt: skip
    return Result(f"scancel × {count}", "0 resurrections", f"{len(back)} came back: {' '.join(back)}", not back)


def one_signal_to_one_rank(c: Cluster, count: int) -> Result:
    """USR2 to one rank of four: every rank stops at the same step, and the job is put back."""
    chosen = random.Random(4)
    run, job = c.submit(LONG, ranks=4)
    for times in range(1, count + 1):
        c.wait_steps(run, 1)
        ranks = c.bed.wait_for(lambda: r if len(r := c.ranks(run)) == 4 else None, 30, "four ranks")
        os.kill(chosen.choice(ranks), signal.SIGUSR2)
        c.wait_restart(job, times)
    c.wait_steps(run, 1)
    c.bed.cancel(job)
    stops, resumed = steps_at(run, "stop_requested")[:count], steps_at(run, "resumed")
    reasons = {e["reason"] for e in read_events(run) if e["event"] == "requeued"}
    passed = stops == resumed and len(stops) == count and reasons == {"time_limit"}
    return Result(f"the signal to one rank of four × {count}", f"the same stop step on all, {count} requeues",
                  f"{len(resumed)} requeues, {sum(a != b for a, b in zip(stops, resumed, strict=False))} steps lost",
                  passed)  # fmt: skip


def rank_killed(c: Cluster, count: int) -> Result:
    """kill -9 of one rank of two: at most one save interval is lost, and the job comes back at once."""
    run, job = c.submit(LONG, "checkpoint.every_steps=20", ranks=2)
    worst_s, lost = 0.0, 0
    for times in range(1, count + 1):
        c.wait_steps(run, 8)
        killed_at, saved = time.monotonic(), run.latest_step()
        os.kill(c.ranks(run)[times % 2], signal.SIGKILL)
        c.wait_restart(job, times)
        worst_s = max(worst_s, time.monotonic() - killed_at)
        c.bed.wait_for(lambda times=times: len(steps_at(run, "resumed")) == times, 60, "resumed")
        lost += steps_at(run, "resumed")[-1] < saved
    c.bed.cancel(job)
    return Result(f"kill -9 of one rank × {count}", "loss ≤ one save interval; back within SLURM's time + 10 s",
                  f"{lost} lost a save; back in {worst_s:.0f} s at most", lost == 0 and worst_s < 25)  # fmt: skip


def term_by_hand(c: Cluster, _: int) -> Result:
    """scancel -s TERM, and nothing follows: saved, then training goes on in the same life."""
    run, job = c.submit(LONG)
    c.wait_steps(run, 1)
    c.bed.run(["scancel", "-s", "TERM", job], check=True)
    c.bed.wait_for(lambda: steps_at(run, "checkpoint"), 30, "a save")
    stopped = steps_at(run, "stop_requested")[-1]
    c.bed.wait_for(lambda: read_jsonl(run.metrics)[-1]["step"] > stopped + 3, 90, "training going on")
    goes_on = c.bed.job_state(job) == "RUNNING" and c.bed.restart_count(job) == 0
    c.bed.cancel(job)
    return Result("SIGTERM by hand, nothing follows", "saved, then training goes on",
                  f"saved at {run.latest_step()}, running on: {goes_on}", goes_on)  # fmt: skip


def requeue_forbidden(c: Cluster, _: int) -> Result:
    """--no-requeue and pre-empted: a successor job continues, once; under scancel there is none."""
    run, job = c.submit("train.total_steps=2500", "--sbatch", "no-requeue")
    c.wait_steps(run, 2)
    c.bed.preempt(c.bed.node_of(job) or "", 1)
    c.bed.wait_for(lambda: len(steps_at(run, "resumed")) == 1, 90, "a successor")
    heirs = [e for e in read_events(run) if e["event"] == "submitted" and e.get("successor_of") == job]
    state = c.bed.wait_state(heirs[0]["job"], timeout_s=120)
    stops, resumed = steps_at(run, "stop_requested"), steps_at(run, "resumed")
    other, cancelled_job = c.submit(LONG, "--sbatch", "no-requeue")
    c.wait_steps(other, 1)
    c.bed.cancel(cancelled_job)
    c.bed.wait_state(cancelled_job)
    time.sleep(5)
    none = not [e for e in read_events(other) if e.get("successor_of")]
    passed = state == "COMPLETED" and len(heirs) == 1 and stops == resumed and none
    return Result("requeue forbidden", "a successor continues, once; scancel makes none",
                  f"{len(heirs)} successor, {state}, resumed at {resumed} of {stops}; after scancel none: {none}",
                  passed)  # fmt: skip


ROWS = {
    # name: (row, full count, reduced count)
    "pre-emptions": (pre_empted_in_a_row, 20, 1),
    "scancel": (cancelled, 20, 3),
    "one-rank-signalled": (one_signal_to_one_rank, 20, 1),
    "one-rank-killed": (rank_killed, 5, 1),
    "term-by-hand": (term_by_hand, 1, 1),
    "requeue-forbidden": (requeue_forbidden, 1, 1),
}
