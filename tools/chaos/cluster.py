"""A SLURM to break things on: the throwaway one of tools/slurm_testbed, used as an ordinary user, broken as root.

Submits real runs through launch/submit.py, finds their processes, and takes nodes and slurmctld away and brings them
back. The rows are in slurm_stops.py (what SLURM does to a job) and slurm_faults.py (what breaks).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpm.run.events import read_events
from ddpm.run.files import read_jsonl, write_bytes
from ddpm.run.paths import RunDir
from tools.chaos import checker
from tools.chaos.files import Result
from tools.chaos.lives import TINY
from tools.slurm_testbed.harness import ENDED, SlurmTestbed

LONG = "train.total_steps=1000000"
STATE_SAVED_S = 6  # slurmctld writes within 5 s; a job whose start it had not written would be PENDING to the next one


class NotRun(Exception):
    """A row whose needs are missing here; the message says which."""


@dataclass(frozen=True)
class Process:
    """A rank of a job's step, as this machine sees it."""

    pid: int
    stepd_pid: int
    rank: int
    task: int | None
    """The task of an array."""


@dataclass
class Cluster:
    """The testbed with a place for runs, and the submission path that rows use."""

    bed: SlurmTestbed
    root: Path
    via: str
    runs: int = 0

    # ------------------------------------------------------------ as the user

    def script(self, name: str, *words: str | Path) -> str:
        """What a script of launch/ says."""
        argv = [self.bed.python, self.bed.project / "launch" / f"{name}.py", *words, "--root", self.root]
        return self.bed.run(argv, check=True, timeout=180).stdout

    def submit(self, *words: str, ranks: int = 1) -> tuple[RunDir, str]:
        """Queue a tiny run; returns it and its job id."""
        self.runs += 1
        name = f"{self.via}{self.runs}"
        said = self.script("submit", "--partition", "gpu", "--gpus-per-node", "0", "--nodes", str(ranks),
                           "--tasks-per-node", "1", "--via", self.via, "--name", name, *TINY, *words)  # fmt: skip
        return RunDir(self.root / name), said.split("queued: train as job ")[1].split()[0]

    def by_hand(self, run: RunDir) -> str:
        """sbatch of the training template past submit.py and its checks, as the templates' first lines say."""
        project = self.bed.project
        argv = ["sbatch", "--parsable", "--partition=gpu", "--output=/dev/null", "slurm/train.sbatch", str(run.path)]
        env = {"DDPM_HOME": str(project), "DDPM_PYTHON": self.bed.python}
        return self.bed.run(argv, check=True, env=env, cwd=project).stdout.strip().split(";")[0]

    def strike(self, job: str, by: str) -> None:
        """Ask the job to stop: by a pre-emption, or by the signal that announces the time limit (USR2)."""
        if by == "pre-emption":
            self.bed.preempt(self.bed.node_of(job) or "", 1)
        else:
            self.bed.run(["scancel", "-s", "USR2", job], check=True)

    def stop(self, run: RunDir, job: str) -> str:
        """End a run that would go on for ever by its STOP file; gives SLURM's state of the job."""
        run.stop_file.touch()
        return self.bed.wait_state(job, *ENDED, "PREEMPTED", timeout_s=120)

    def set_length(self, run: RunDir, total_steps: int) -> None:
        """As a later submission does, but of a run that is in the queue: its next life will read it."""
        text, changed = re.subn(r"total_steps: \d+", f"total_steps: {total_steps}", run.config.read_text())
        assert changed == 1
        write_bytes(run.config, text.encode(), replace=True)
        run.config.chmod(0o644)

    def row(self, row: Callable[[Cluster, int], Result], count: int) -> Result:
        """A row of the table, and then a look at the lines of its runs. Raises Unsound."""
        before = self.runs
        result = row(self, count)
        for number in range(before + 1, self.runs + 1):
            assert checker.check(self.root, f"{self.via}{number}") == 1, f"run {number} of the row is not there"
        return result

    # ------------------------------------------------------------ waiting

    def wait_steps(self, run: RunDir, more: int = 3, timeout_s: float = 120) -> None:
        """Until the run has logged some further lines: it trains."""
        goal = len(read_jsonl(run.metrics)) + more
        self.bed.wait_for(lambda: len(read_jsonl(run.metrics)) >= goal, timeout_s, f"{run.name} training")

    def wait_saved(self, run: RunDir) -> None:
        """Until a life has saved something of its own and trains on."""
        before = run.latest_step()
        self.bed.wait_for(lambda: run.latest_step() > before, 120, f"{run.name} saving")
        self.wait_steps(run, 2)

    def wait_restart(self, job: str, count: int, timeout_s: float = 120) -> None:
        def back() -> bool:
            return self.bed.restart_count(job) == count and self.bed.job_state(job) == "RUNNING"

        self.bed.wait_for(back, timeout_s, f"job {job} back", poll_s=0.5)

    def wait_resumed(self, run: RunDir, count: int) -> int:
        """Until `count` lives have resumed; gives the step that the last of them resumed at."""
        self.bed.wait_for(lambda: len(steps_at(run, "resumed")) >= count, 120, f"{run.name} resumed {count} times")
        return steps_at(run, "resumed")[count - 1]

    def wait_dead(self, job: str, count: int) -> None:
        """Until life number `count` has ended, whether the next one has begun or not."""
        self.bed.wait_for(
            lambda: self.bed.restart_count(job) >= count or self.bed.job_state(job) in ENDED, 120, f"job {job} down"
        )

    def own_time_s(self, strike: Callable[[str], object], nodes: int = 1) -> float:
        """How long SLURM takes by itself to bring back a job that is struck and ignores all that it can ignore."""
        job = self.bed.sbatch("-p", "gpu", "-N", str(nodes), "--requeue", "-o", "/dev/null",
                              command="trap '' TERM; while :; do sleep 0.2; done")  # fmt: skip
        self.wait_restart(job, 0)
        began = time.monotonic()
        strike(job)
        self.wait_restart(job, 1, timeout_s=240)
        took = time.monotonic() - began
        self.bed.cancel(job)
        return took

    def requeue(self, job: str) -> None:
        self.bed.run(["scontrol", "requeue", job], check=True)

    # ------------------------------------------------------------ processes

    def ranks(self, run: RunDir) -> list[Process]:
        """The processes that srun started for the run, by array task and rank."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                command = (proc / "cmdline").read_bytes()
                if not re.search(re.escape(str(run.path).encode()) + rb"[/\0]", command):
                    continue
                env = _environ(proc)
                parent = _parent(proc)
                if b"SLURM_STEP_NUM_TASKS" not in env or _name(parent) != "slurmstepd":
                    continue
                task = env.get(b"SLURM_ARRAY_TASK_ID")
                found.append(Process(int(proc.name), parent, int(env[b"SLURM_PROCID"]), int(task) if task else None))
        return sorted(found, key=lambda p: (p.task or 0, p.rank))

    def wait_ranks(self, run: RunDir, num: int) -> list[Process]:
        return self.bed.wait_for(lambda: p if len(p := self.ranks(run)) == num else None, 60, f"{num} ranks")

    # ------------------------------------------------------------ as root

    def admin(self, *argv: str) -> str:
        """What a command as root says."""
        return self.bed.admin(argv)

    def version(self) -> str:
        """SLURM's, say 22.05.8."""
        return self.admin("scontrol", "--version").split()[-1]

    @contextlib.contextmanager
    def partition(self, **settings: str) -> Iterator[None]:
        """Within: other settings of the partition that runs are submitted to."""
        shown = self.admin("scontrol", "-o", "show", "partition", "gpu")
        before = {k: v for k, v in re.findall(r"(\w+)=(\S*)", shown) if k in settings}
        assert before.keys() == settings.keys(), shown
        try:
            self.admin("scontrol", "update", "partition=gpu", *(f"{k}={v}" for k, v in settings.items()))
            yield
        finally:
            self.admin("scontrol", "update", "partition=gpu", *(f"{k}={v}" for k, v in before.items()))

    def _daemon(self, name: str) -> int:
        return int((self.bed.cluster / f"{name}.pid").read_text())

    def _all_on(self, node: str) -> list[int]:
        """Process ids of a node: its slurmd, and of its jobs the stepds, shells, sruns and ranks.

        In the order in which they can be killed unheard: when a stepd or a shell dies, the kernel wakes a stopped srun;
        and a stepd would report its shell's end.
        """
        found = {self._daemon(f"slurmd.{node}"): "slurmd"}
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                env = _environ(proc)
                here = env.get(b"SLURMD_NODENAME") == node.encode()
                if here and env.get(b"SLURM_CONF") == str(self.bed.conf).encode() and b"SLURM_JOB_ID" in env:
                    found[int(proc.name)] = _name(int(proc.name))
                    if _name(p := _parent(proc)) == "slurmstepd":
                        found[p] = "slurmstepd"
        first = ("srun", "slurmd", "slurmstepd")
        return sorted(found, key=lambda pid: first.index(found[pid]) if found[pid] in first else len(first))

    def _wait_up(self, node: str) -> None:
        ask = ["sinfo", "-h", "-n", node, "-p", "gpu", "-o", "%t"]
        self.bed.wait_for(lambda: self.bed.run(ask).stdout.strip() in ("idle", "mix", "alloc"), 90, f"{node} up")

    def clear(self) -> None:
        """Between rows: no jobs, and all nodes in use, also those that SLURM has drained."""
        self.bed.end_all_jobs()
        drained = self.bed.run(["sinfo", "-h", "-N", "-p", "gpu", "-t", "drain", "-o", "%N"], check=True).stdout.split()
        for node in drained:
            self.admin("scontrol", "update", f"nodename={node}", "state=resume")

    @contextlib.contextmanager
    def broken_node(self, node: str, by: signal.Signals) -> Iterator[None]:
        """Within: a node is dead (SIGKILL) or hangs (SIGSTOP), slurmd and all its jobs; afterwards it has rebooted.

        Left to wake up, the srun on it would end the step of the same number that the job's next life has elsewhere.
        """
        hit = self._all_on(node)
        for pid in hit:
            send(pid, by)
        try:
            yield
        finally:
            for pid in hit:
                send(pid, signal.SIGKILL)
            self.admin("slurmd", "-f", str(self.bed.conf), "-N", node)
            self._wait_up(node)

    @contextlib.contextmanager
    def without_slurmctld(self) -> Iterator[None]:
        """Within: slurmctld is dead of SIGKILL, and no command of SLURM's is answered."""
        time.sleep(STATE_SAVED_S)
        os.kill(self._daemon("slurmctld"), signal.SIGKILL)
        try:
            yield
        finally:
            self.admin("slurmctld", "-f", str(self.bed.conf))
            self.bed.wait_for(lambda: self.bed.run(["squeue", "-h"]).returncode == 0, 60, "slurmctld answering")


@contextlib.contextmanager
def cluster(project: Path, python: str, via: str) -> Iterator[Cluster]:
    bed = SlurmTestbed(project, python)
    try:
        bed.start()
        yield Cluster(bed, bed.mkdir("runs"), via)
    finally:
        bed.stop()


def _environ(proc: Path) -> dict[bytes, bytes]:
    return dict(e.partition(b"=")[::2] for e in (proc / "environ").read_bytes().split(b"\0"))


def _parent(proc: Path) -> int:
    return int((proc / "stat").read_text().rsplit(")", 1)[1].split()[1])


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def send(pid: int, signum: int) -> None:
    """A signal to a process that may be gone by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def alive(pid: int) -> bool:
    """Not a zombie either."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- what a run directory says


def steps_at(run: RunDir, event: str, reason: str | None = None) -> list[int]:
    events = [e for e in read_events(run) if e["event"] == event]
    return [e["step"] for e in events if reason is None or e["reason"] == reason]


def metrics_whole(run: RunDir) -> bool:
    """Every metrics line once, in order, none missing (the last step of a run has one whatever its number)."""
    steps = [r["step"] for r in read_jsonl(run.metrics)]
    return bool(steps) and steps == sorted({*range(3, steps[-1] + 1, 3), steps[-1]})  # as TINY logs


@dataclass
class Loss:
    """What lives lost that could not save: taken before the fault, measured after the next life has resumed."""

    run: RunDir
    interval: int
    saved: int = 0
    worst_steps: int = 0
    too_much: int = 0

    def before_fault(self) -> None:
        self.saved = self.run.latest_step()

    def measure(self, died_at: int, resumed_at: int) -> None:
        """No save that was done before the fault may be lost, and at most the one under way with its interval."""
        self.worst_steps = max(self.worst_steps, died_at - resumed_at)
        under_way = died_at // self.interval * self.interval
        self.too_much += resumed_at < self.saved or resumed_at < under_way - self.interval


def last_logged(run: RunDir) -> int:
    return next((r["step"] for r in reversed(read_jsonl(run.metrics))), 0)
