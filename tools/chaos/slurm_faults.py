"""What breaks under a job: a rank, a node, SLURM's own daemon; and two jobs that both believe a run is theirs."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from ddpm.run import generations
from ddpm.run.events import read_events
from ddpm.run.files import TMP_PREFIX, read_signed
from ddpm.run.paths import RunDir
from launch.cluster.site import Site
from tools.chaos.cluster import LONG, Cluster, Loss, NotRun, alive, last_logged, metrics_whole, send, steps_at
from tools.chaos.files import Result
from tools.slurm_testbed.harness import ENDED

RANK_TIMEOUT_S = 20


def rank_killed(c: Cluster, count: int) -> Result:
    """kill -9 of one rank of two: at most one save interval is lost, and the job comes back at once."""
    own_s = c.own_time_s(c.requeue)
    run, job = c.submit(LONG, "checkpoint.every_steps=20", ranks=2)
    worst_s, loss = 0.0, Loss(run, 20)
    for times in range(1, count + 1):
        c.wait_saved(run)
        loss.before_fault()
        killed_at = time.monotonic()
        os.kill(c.wait_ranks(run, 2)[times % 2].pid, signal.SIGKILL)
        c.wait_dead(job, times)
        died_at = last_logged(run)
        c.wait_restart(job, times)
        worst_s = max(worst_s, time.monotonic() - killed_at)
        loss.measure(died_at, c.wait_resumed(run, times))
    c.bed.cancel(job)
    return Result(f"kill -9 of one rank × {count}", "loss ≤ one save interval; back within SLURM's own time + 10 s",
                  f"{loss.worst_steps} steps lost at most (interval 20); back in {worst_s:.0f} s at most, SLURM's own "
                  f"{own_s:.0f} s", not loss.too_much and worst_s <= own_s + 10)  # fmt: skip


def rank_stopped(c: Cluster, count: int) -> Result:
    """SIGSTOP of one rank of two, each in turn: the other notices, the job ends and is tried again."""
    if "rank_timeout_s" not in Site.model_fields:
        raise NotRun("site profiles have no rank_timeout_s here")
    profile = c.root / "stopped.yaml"
    profile.write_text(f"rank_timeout_s: {RANK_TIMEOUT_S}\n")
    run, job = c.submit(LONG, "checkpoint.every_steps=20", "--profile", str(profile), ranks=2)
    worst_s, loss = 0.0, Loss(run, 20)
    for times in range(1, count + 1):
        c.wait_saved(run)
        stopped = c.wait_ranks(run, 2)[times % 2]
        loss.before_fault()
        os.kill(stopped.pid, signal.SIGSTOP)
        began, died_at = time.monotonic(), last_logged(run)
        c.bed.wait_for(lambda times=times: len(steps_at(run, "requeued")) == times, 120, "the job giving up")
        worst_s = max(worst_s, time.monotonic() - began)
        c.wait_restart(job, times)
        loss.measure(died_at, c.wait_resumed(run, times))
    c.wait_steps(run)
    c.bed.cancel(job)
    return Result(f"SIGSTOP of one rank of two × {count}",
                  f"ends within the time-out of {RANK_TIMEOUT_S} s + 10 s, then trains on",
                  f"ended after {worst_s:.0f} s at most; {loss.worst_steps} steps lost at most (interval 20)",
                  worst_s <= RANK_TIMEOUT_S + 10 and not loss.too_much)  # fmt: skip


def node_dead(c: Cluster, count: int) -> Result:
    """kill -9 of all that lives on a node, slurmd included: the batch shell's node, and another one, in turn."""
    with contextlib.ExitStack() as broken:
        own_s = c.own_time_s(lambda j: broken.enter_context(c.broken_node(c.bed.node_of(j) or "", signal.SIGKILL)), 2)
    run, job = c.submit(LONG, "checkpoint.every_steps=20", ranks=2)
    worst_s, loss = 0.0, Loss(run, 20)
    for times in range(1, count + 1):
        c.wait_saved(run)
        first = c.bed.node_of(job) or ""
        others = c.bed.run(["squeue", "-h", "-j", job, "-o", "%N"], check=True).stdout
        nodes = c.bed.run(["scontrol", "show", "hostnames", others.strip()], check=True).stdout.split()
        assert len(nodes) == 2 and nodes[0] == first, nodes
        loss.before_fault()
        began = time.monotonic()
        with c.broken_node(nodes[(times - 1) % 2], signal.SIGKILL):
            died_at = last_logged(run)
            c.wait_restart(job, times, timeout_s=240)
            worst_s = max(worst_s, time.monotonic() - began)
            loss.measure(died_at, c.wait_resumed(run, times))
    c.wait_steps(run)
    c.bed.cancel(job)
    return Result(f"a node dies × {count}", "loss ≤ one save interval; back within SLURM's own time + 10 s",
                  f"{loss.worst_steps} steps lost at most (interval 20); back in {worst_s:.0f} s at most, SLURM's own "
                  f"{own_s:.0f} s", not loss.too_much and worst_s <= own_s + 10)  # fmt: skip


def crash_loop(c: Cluster, _: int) -> Result:
    """Each life's python is killed as it starts: four starts, each retry later than the one before, then the run has
    failed and says so."""
    run, job = c.submit(LONG)
    killed: set[int] = set()
    held_s: dict[int, float] = {}

    def hurry() -> None:
        """What a retry waits is noted, and not waited for."""
        (shown,) = c.bed.records(job)
        try:
            left = time.mktime(time.strptime(shown["EligibleTime"], "%Y-%m-%dT%H:%M:%S")) - time.time()
        except ValueError:
            return
        times = int(shown["Restarts"])
        held_s[times] = max(left, held_s.get(times, 0.0))
        if left > 10:
            c.bed.run(["scontrol", "update", f"jobid={job}", "starttime=now+6"])  # SLURM's own five, and one

    def over() -> str:
        for rank in c.ranks(run):
            killed.add(rank.pid)
            send(rank.pid, signal.SIGKILL)
        state = c.bed.job_state(job)
        if state == "PENDING":
            hurry()
        return state if state in ENDED else ""

    state = c.bed.wait_for(over, 180, "the end of it")
    waits = [e.get("wait_s", 0) for e in read_events(run) if e["event"] == "requeued"]
    waited = sum(held > 50 for held in held_s.values()) >= 2
    failed = [e["reason"] for e in read_events(run) if e["event"] == "failed"]
    starts = c.bed.restart_count(job) + 1
    clear = len(failed) == 1 and "4 lives in a row" in failed[0] and "submit again" in failed[0]
    passed = state == "FAILED" and starts == len(killed) == 4 and clear and waits == [0, 60, 300] and waited
    return Result("crashes at once, each time", "4 starts, each later, then FAILED with a clear event",
                  f"{starts} starts, retries after {waits} s (SLURM held them: {waited}), {state}, "
                  f"{len(failed)} event, clear: {clear}", passed)  # fmt: skip


def slurmctld_killed(c: Cluster, count: int) -> Result:
    """slurmctld is killed while the job trains, and again as a crashed job is about to be put back."""
    run, job = c.submit(LONG, "checkpoint.every_steps=20")
    unaffected, loss = 0, Loss(run, 20)
    for times in range(1, count + 1):
        c.wait_steps(run, 3)
        with c.without_slurmctld():
            before = last_logged(run)
            time.sleep(15)
            trained = last_logged(run) > before
        unaffected += trained and c.bed.job_state(job) == "RUNNING" and c.bed.restart_count(job) == times - 1
        c.wait_saved(run)
        loss.before_fault()
        (rank,) = c.wait_ranks(run, 1)
        with c.without_slurmctld():
            os.kill(rank.pid, signal.SIGKILL)
            died_at = last_logged(run)
            time.sleep(15)
        c.wait_restart(job, times)
        loss.measure(died_at, c.wait_resumed(run, times))
    c.wait_steps(run)
    c.bed.cancel(job)
    return Result(f"slurmctld killed × {count}, and once more before a requeue each",
                  "the job is unaffected; after the crash it comes back",
                  f"unaffected {unaffected} times; came back {len(steps_at(run, 'resumed'))} times, "
                  f"{loss.worst_steps} steps lost at most (interval 20)",
                  unaffected == count == len(steps_at(run, "resumed")) and not loss.too_much)  # fmt: skip


# ---------------------------------------------------------------- more than one life at a time


def fences(run: RunDir, beyond: int = -1) -> set[int]:
    """The fencing tokens of the generations beyond a step. Retention may remove one while it is read."""
    found = set()
    for step in (s for s in run.steps_saved() if s > beyond):
        with contextlib.suppress(FileNotFoundError):
            found.add(int(read_signed(run.manifest(step))["fence"]))
    return found


def two_jobs(c: Cluster, count: int) -> Result:
    """The same run queued again past submit.py's own check, while it trains: one of them writes."""
    good = 0
    exits = []
    for _ in range(count):
        run, first = c.submit(LONG, "checkpoint.every_steps=50")
        c.wait_steps(run)
        second = c.by_hand(run)
        state = c.bed.wait_state(second, timeout_s=180)
        exits.append(c.bed.records(second)[0]["ExitCode"])
        c.wait_steps(run)
        writers = {e["job"] for e in read_events(run) if e["event"] in ("started", "resumed", "checkpoint")}
        alone = writers == {first} and fences(run) == {1} and metrics_whole(run)
        still = c.bed.job_state(first) == "RUNNING" and c.bed.restart_count(first) == 0
        good += alone and still and state == "FAILED" and exits[-1] == "76:0"
        c.bed.cancel(first)
    return Result(f"two jobs on one run × {count}", "one writer; the other leaves with 76",
                  f"{good} times; the second left with {', '.join(exits)}", good == count)  # fmt: skip


def orphan(c: Cluster, count: int) -> Result:
    """A node hangs until SLURM has given it up and the run's next life trains; then the old rank wakes up there."""
    silent, said, traces = 0, [], set()
    for _ in range(count):
        run, job = c.submit(LONG, "checkpoint.every_steps=20")
        c.wait_saved(run)
        (old,) = c.wait_ranks(run, 1)
        with c.broken_node(c.bed.node_of(job) or "", signal.SIGSTOP):
            c.wait_restart(job, 1, timeout_s=240)
            resumed = c.wait_resumed(run, 1)
            c.wait_saved(run)
            outlived = alive(old.pid)
            os.kill(old.pid, signal.SIGCONT)
            c.bed.wait_for(lambda pid=old.pid: not alive(pid), 60, "the orphan leaving")
            marker = run.exit_marker(job, 0)
            said.append(marker.read_text().split()[0] if marker.exists() else "nothing")
        c.wait_saved(run)
        left = _traces(c, run, job, resumed)
        traces.update(left)
        silent += outlived and said[-1] == "76" and not left
    return Result(f"an orphan wakes up beside its heir × {count}", "commits nothing, leaves by itself with 76",
                  f"{silent} times; it left with {', '.join(said)}, and {', '.join(traces) or 'nothing'}",
                  silent == count)  # fmt: skip


def orphan_of_stepd(c: Cluster, count: int) -> Result:
    """The same without SLURM's knowing: the rank is stopped, its stepd killed, and the job requeued by hand."""
    silent, outlived, traces = 0, 0, set()
    for _ in range(count):
        run, job = c.submit(LONG, "checkpoint.every_steps=20")
        c.wait_saved(run)
        (old,) = c.wait_ranks(run, 1)
        os.kill(old.pid, signal.SIGSTOP)
        try:
            os.kill(old.stepd_pid, signal.SIGKILL)
            c.requeue(job)
            c.wait_restart(job, 1)
            resumed = c.wait_resumed(run, 1)
            c.wait_saved(run)
            outlived += alive(old.pid)
            send(old.pid, signal.SIGCONT)
            c.bed.wait_for(lambda pid=old.pid: not alive(pid), 60, "the orphan leaving")
        finally:
            send(old.pid, signal.SIGKILL)
        c.wait_saved(run)
        left = _traces(c, run, job, resumed)
        traces.update(left)
        silent += not left
    if not outlived:
        raise NotRun("this SLURM takes a rank with its stepd: there is no orphan")
    return Result(f"a rank outlives its stepd and its job × {count}", "commits nothing, leaves by itself",
                  f"outlived {outlived} times; it left {', '.join(traces) or 'nothing'} behind",
                  silent == count)  # fmt: skip


def _traces(c: Cluster, run: RunDir, job: str, resumed: int) -> list[str]:
    """Ends the heir, and names what is not its own or not whole of all that there is since it began."""
    undisturbed = c.bed.job_state(job) == "RUNNING" and c.bed.restart_count(job) == 1
    c.bed.cancel(job)
    c.bed.wait_state(job)
    for step in run.steps_saved():
        generations.verify(run, step)  # raises where a file is not what its manifest says
    writers = fences(run, beyond=resumed)
    found = {
        "the heir was disturbed": not undisturbed,
        f"generations of writers {writers}": writers != {2},
        "metrics lines twice or missing": not metrics_whole(run),
        "temporaries": any(run.checkpoints.glob(f"{TMP_PREFIX}*.1.*")),
        "a failure among the events": bool(steps_at(run, "failed")),
    }
    return [what for what, is_so in found.items() if is_so]


def array_task_hit(c: Cluster, count: int) -> Result:
    """Of a sampling set's tasks one is killed and one told that its time is up: these come back, the others do not."""
    tried = good = 0
    seen = []
    for _ in range(count):
        run, job = c.submit("train.total_steps=30")
        c.bed.wait_state(job, timeout_s=120)
        said = c.script("sample", run.name, "--set", "hit", "--num-samples", "60", "--shards", "4", "--batch", "5",
                        "--sampler", "ancestral", "--max-parallel", "4")  # fmt: skip
        array = said.split(" as job ")[1].split()[0]
        for task, sent in ((1, signal.SIGKILL), (2, signal.SIGUSR2)):
            tried += 1
            (rank,) = c.bed.wait_for(
                lambda run=run, task=task: [r for r in c.ranks(run) if r.task == task], 90, f"task {task}"
            )
            part = run.sample_set("hit").part
            c.bed.wait_for(lambda part=part: part.is_dir() and any(part.iterdir()), 60, "a finished batch")
            os.kill(rank.pid, sent)
        states = {c.bed.wait_state(array, timeout_s=300)}
        restarts = {int(r["ArrayTaskId"]): int(r["Restarts"]) for r in c.bed.records(array)}
        whole = len(list(run.sample_set("hit").path.glob("shard-*.json")))
        seen.append(f"restarts by task {dict(sorted(restarts.items()))}, {whole} shards")
        good += states == {"COMPLETED"} and restarts == {0: 0, 1: 1, 2: 1, 3: 0} and whole == 4
    return Result("array tasks killed and signalled", "exactly these come back; the set is whole",
                  "; ".join(seen), good == count)  # fmt: skip


ROWS = {
    # name: (row, full count, reduced count)
    "one-rank-killed": (rank_killed, 5, 1),
    "rank-stopped": (rank_stopped, 2, 2),
    "node-failure": (node_dead, 2, 1),
    "crash-loop": (crash_loop, 1, 1),
    "slurmctld-restart": (slurmctld_killed, 3, 1),
    "two-jobs": (two_jobs, 3, 1),
    "orphan": (orphan, 3, 1),
    "orphan-of-stepd": (orphan_of_stepd, 3, 1),
    "array-task-requeued": (array_task_hit, 3, 1),
}
