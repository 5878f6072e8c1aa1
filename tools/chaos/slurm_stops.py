"""What SLURM itself does to a job: pre-empts it, ends its time, cancels it, signals it; at any moment of its life."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
import signal
import tempfile
import time
import zipfile
from pathlib import Path

from ddpm.run.events import read_events
from ddpm.run.files import read_json, sha256_file
from ddpm.run.paths import RunDir
from launch.life.compiled import PREFIX
from launch.terminal.goodput import breakdown
from tools.chaos.cluster import LONG, Cluster, Loss, NotRun, last_logged, metrics_whole, send, steps_at
from tools.chaos.files import Result
from tools.chaos.lives import curve, final, same

HELD_BACK_S = 10  # longer than the testbed holds a requeued job back
BOTH = ("pre-emption", "USR2")


def unchanged(run: RunDir) -> dict[str, str]:
    """Digests of what a start after the end must leave as it is."""
    return {str(p): sha256_file(p) for d in (run.checkpoints, run.events) for p in sorted(d.iterdir())} | {
        str(run.metrics): sha256_file(run.metrics)
    }


def pre_empted_in_a_row(c: Cluster, count: int) -> Result:
    """Pre-empted as soon as it trains again, then left to end; compared with an undisturbed run of that length."""
    run, job = c.submit(LONG)
    for times in range(1, count + 1):
        c.wait_steps(run, 2)
        c.strike(job, "pre-emption")
        c.bed.wait_for(lambda times=times: c.bed.restart_count(job) == times, 90, f"pre-emption {times}")
    length = run.latest_step() + 100
    c.set_length(run, length)  # while the job is held back
    # SLURM 24.11 holds back a job that was pre-empted and has completed, for one start more: COMPLETED comes after it
    c.bed.wait_for(lambda: steps_at(run, "finished"), 600, "the end of the run")
    done = unchanged(run)
    calm, other = c.submit(f"train.total_steps={length}")
    c.bed.wait_state(other, timeout_s=600)
    time.sleep(HELD_BACK_S)
    state = c.bed.wait_state(job, timeout_s=60)  # SLURM 24.11 starts a completed job that was pre-empted once more
    extra = c.bed.restart_count(job) - count
    stops, resumed = steps_at(run, "stop_requested"), steps_at(run, "resumed")
    lost = sum(a != b for a, b in zip(stops, resumed, strict=False))
    identical = same(final(run), final(calm)) and curve(run) == curve(calm)
    left_alone = unchanged(run) == done
    passed = state == "COMPLETED" and lost == 0 and identical and left_alone and len(stops) == len(resumed) == count
    return Result(f"{count} pre-emptions in a row", "0 steps lost, one job id, identical end; nothing changes after it",
                  f"{len(stops)} stops, {lost} lost, {state}, identical: {identical}; {extra} starts after the end, "
                  f"unchanged: {left_alone}", passed)  # fmt: skip


def pre_empted_while_starting(c: Cluster, count: int) -> Result:
    """Pre-empted before any step, SIGTERM coming soon after a rank's first sign: that is no failure."""
    chosen = random.Random(5)
    run, job = c.submit("train.total_steps=300")
    held_s = 0.0
    for times in range(1, count + 1):
        c.wait_restart(job, times - 1)
        began = time.monotonic()
        (rank,) = c.wait_ranks(run, 1)
        time.sleep(chosen.uniform(0, 0.1))  # and found a fifth of a second late
        send(rank.pid, signal.SIGTERM)  # SLURM's own comes too late for python's first moments
        c.strike(job, "pre-emption")
        c.bed.wait_for(lambda times=times: c.bed.restart_count(job) == times, 90, f"pre-emption {times}")
        held_s += time.monotonic() - began
    state = c.bed.wait_state(job, timeout_s=120)
    events = read_events(run)
    struck = [e for e in events if e["event"] == "allocated" or e["restart"] < count]  # lives; the last one began
    told_s = sum(breakdown(struck, {}, 0).values())
    blamed = [e for e in events if e["event"] == "failed" or (e["event"] == "requeued" and e["reason"] == "crash")]
    trained = sum(s > 0 for s in steps_at(run, "stop_requested"))
    passed = state == "COMPLETED" and not blamed and c.bed.restart_count(job) >= count and metrics_whole(run)
    return Result(f"{count} pre-emptions during start-up",
                  "none counts as a failure; the run completes; goodput counts the nodes' time",
                  f"{state} after {c.bed.restart_count(job)} restarts, {len(blamed)} counted as failures; {trained} "
                  f"came after a first step; they held nodes for {held_s:.0f} s at least, goodput says {told_s:.0f} s",
                  passed and told_s > 0.8 * held_s)  # fmt: skip


def pre_empted_without_grace(c: Cluster, count: int) -> Result:
    """GraceTime=0: nothing but KillWait between the signal and the end."""
    with c.partition(GraceTime="0"):
        own_s = c.own_time_s(lambda job: c.strike(job, "pre-emption"))
        run, job = c.submit(LONG, "checkpoint.every_steps=50")
        loss, worst_s = Loss(run, 50), 0.0
        for times in range(1, count + 1):
            c.wait_saved(run)
            loss.before_fault()
            began = time.monotonic()
            c.strike(job, "pre-emption")
            c.wait_dead(job, times)
            died_at = last_logged(run)
            c.wait_restart(job, times)
            worst_s = max(worst_s, time.monotonic() - began)
            loss.measure(died_at, c.wait_resumed(run, times))
        c.bed.cancel(job)
    return Result(f"pre-emption without a grace period × {count}",
                  "loss ≤ one save interval; back within SLURM's own time + 10 s",
                  f"{loss.worst_steps} steps lost at most (interval 50); back in {worst_s:.0f} s at most, SLURM's own "
                  f"{own_s:.0f} s", not loss.too_much and worst_s <= own_s + 10)  # fmt: skip


def pre_empted_where_slurm_cancels(c: Cluster, _: int) -> Result:
    """PreemptMode=CANCEL with a grace period: the run continues, once; under scancel it does not."""
    with c.partition(PreemptMode="CANCEL"):
        return _continues_once(c, "pre-empted where SLURM cancels")


def pre_empted_where_slurm_cancels_at_once(c: Cluster, _: int) -> Result:
    """PreemptMode=CANCEL without a grace period: the run continues, once; under scancel it does not."""
    with c.partition(PreemptMode="CANCEL", GraceTime="0"):
        return _continues_once(c, "pre-empted where SLURM cancels at once")


def requeue_forbidden(c: Cluster, _: int) -> Result:
    """--no-requeue and pre-empted: a successor job continues, once; under scancel there is none."""
    return _continues_once(c, "requeue forbidden", "--sbatch", "no-requeue")


def _continues_once(c: Cluster, fault: str, *words: str) -> Result:
    """Pre-empted, and scancelled, where SLURM will not put the job back by itself."""
    run, job = c.submit(LONG, *words)
    c.wait_steps(run, 2)
    c.strike(job, "pre-emption")
    (stopped,) = {c.wait_resumed(run, 1)} & set(steps_at(run, "stop_requested")) or {-1}
    time.sleep(HELD_BACK_S)  # long enough for another one to come
    heirs = [e["job"] for e in read_events(run) if e["event"] == "submitted" and e.get("successor_of") == job]
    own = c.bed.restart_count(job)
    state = c.stop(run, heirs[0] if heirs else job)
    exit_code = c.bed.records(heirs[0] if heirs else job)[0]["ExitCode"]
    resumed, back = steps_at(run, "resumed"), _after_scancel(c, *words)
    # where PreemptMode=CANCEL, SLURM 24.11 calls PREEMPTED for ever what it had pre-empted once, though it completed
    well = exit_code == "0:0" and state in ("COMPLETED", "PREEMPTED")
    passed = well and len(heirs) + own == 1 and resumed == [stopped] and back == 0
    return Result(fault, "continues, once, with no step lost; scancel ends it for good",
                  f"{len(heirs)} successors, {own} requeues, resumed at {resumed} of {stopped}, {state} with "
                  f"{exit_code}; after scancel {back} came back", passed and metrics_whole(run))  # fmt: skip


def _after_scancel(c: Cluster, *words: str) -> int:
    """How often a run comes back after scancel, in the same job or another."""
    run, job = c.submit(LONG, *words)
    c.wait_steps(run, 1)
    c.bed.cancel(job)
    c.wait_dead(job, 1)
    time.sleep(HELD_BACK_S)
    return c.bed.restart_count(job) + sum("successor_of" in e for e in read_events(run))


def cancelled(c: Cluster, count: int) -> Result:
    """scancel in training, while saving, in the grace period, and of jobs that do not wait for a long one's end."""
    chosen = random.Random(3)
    jobs: list[tuple[str, str]] = []
    for i in range(count):
        moment = ("in training", "in a save", "in the grace period", "where the grace period is long")[i % 4]
        with c.partition(GraceTime="120" if i % 4 == 3 else "10"):
            every = ["checkpoint.every_steps=1"] if moment == "in a save" else []
            run, job = c.submit(LONG, *every)
            c.wait_steps(run, 1)
            time.sleep(chosen.uniform(0, 0.5))
            if moment == "in the grace period":
                c.strike(job, "pre-emption")
                c.bed.wait_for(lambda run=run: steps_at(run, "stop_requested"), 30, "the grace period")
            c.bed.cancel(job)
            c.wait_dead(job, 1)
        jobs.append((job, moment))
    time.sleep(HELD_BACK_S)
    back = [f"{job} ({moment})" for job, moment in jobs
            if c.bed.job_state(job) != "CANCELLED" or c.bed.restart_count(job)]  # fmt: skip
    return Result(f"scancel × {count}", "0 resurrections", f"{len(back)} came back: {' '.join(back)}", not back)


def out_of_time(c: Cluster, count: int) -> Result:
    """Time limits of a minute, SLURM's least; after `count` of them the run is given its length and ends."""
    run, job = c.submit(LONG, "--time", "1")

    def stops() -> list[int]:
        return steps_at(run, "stop_requested", "time_limit")

    c.bed.wait_for(lambda: len(stops()) == count and len(steps_at(run, "requeued")) == count, 120 * count, "the end")
    c.set_length(run, stops()[-1] + 300)  # while the job is held back
    state = c.bed.wait_state(job, timeout_s=120)
    resumed, whole, restarts = steps_at(run, "resumed"), metrics_whole(run), c.bed.restart_count(job)
    passed = state == "COMPLETED" and whole and stops() == resumed and restarts == len(resumed) >= count
    return Result(f"the time limit × {count}", "COMPLETED, one job id, every metrics line once",
                  f"{state}, {restarts} restarts, resumed where stopped: {stops() == resumed}, lines whole: {whole}",
                  passed)  # fmt: skip


def one_signal_to_one_rank(c: Cluster, count: int) -> Result:
    """USR2 to one rank of four: every rank stops at the same step, and the job is put back."""
    chosen = random.Random(4)
    run, job = c.submit(LONG, ranks=4)
    for times in range(1, count + 1):
        c.wait_steps(run, 1)
        os.kill(chosen.choice(c.wait_ranks(run, 4)).pid, signal.SIGUSR2)
        c.wait_restart(job, times)
    c.wait_steps(run, 1)
    c.bed.cancel(job)
    stops, resumed = steps_at(run, "stop_requested")[:count], steps_at(run, "resumed")
    reasons = {e["reason"] for e in read_events(run) if e["event"] == "requeued"}
    passed = stops == resumed and len(stops) == count and reasons == {"time_limit"}
    return Result(f"the signal to one rank of four × {count}", f"the same stop step on all, {count} requeues",
                  f"{len(resumed)} requeues, {sum(a != b for a, b in zip(stops, resumed, strict=False))} steps lost",
                  passed)  # fmt: skip


def term_by_hand(c: Cluster, _: int) -> Result:
    """scancel -s TERM, and nothing follows: saved, then training goes on in the same life."""
    run, job = c.submit(LONG)
    c.wait_steps(run, 1)
    c.bed.run(["scancel", "-s", "TERM", job], check=True)
    c.bed.wait_for(lambda: steps_at(run, "checkpoint"), 30, "a save")
    stopped = steps_at(run, "stop_requested")[-1]
    c.bed.wait_for(lambda: last_logged(run) > stopped + 3, 90, "training going on")
    goes_on = c.bed.job_state(job) == "RUNNING" and c.bed.restart_count(job) == 0
    c.bed.cancel(job)
    return Result("SIGTERM by hand, nothing follows", "saved, then training goes on",
                  f"saved at {run.latest_step()}, running on: {goes_on}", goes_on)  # fmt: skip


def stop_file(c: Cluster, _: int) -> Result:
    """A STOP file: the next step is the last, saved, and the job stays away."""
    run, job = c.submit(LONG)
    c.wait_steps(run, 1)
    state = c.stop(run, job)
    time.sleep(HELD_BACK_S)
    stopped, saved, restarts = steps_at(run, "stop_requested", "STOP"), run.latest_step(), c.bed.restart_count(job)
    passed = state == c.bed.job_state(job) == "COMPLETED" and restarts == 0 and stopped == [saved]
    return Result("a STOP file", "ends at the next step with a save, COMPLETED, never requeued",
                  f"stopped at {stopped}, saved {saved}, {state}, {restarts} requeues", passed)  # fmt: skip


# ---------------------------------------------------------------- a stop that comes while something else is done


def signal_in_a_save(c: Cluster, count: int) -> Result:
    """A run that saves every step, pre-empted and signalled in turn."""
    run, job = c.submit(LONG, "checkpoint.every_steps=1")
    for times in range(1, count + 1):
        c.wait_steps(run, 2)
        c.strike(job, BOTH[(times - 1) % 2])
        c.wait_restart(job, times)
        c.wait_resumed(run, times)
    c.wait_steps(run, 2)
    state = c.stop(run, job)
    stops, resumed = steps_at(run, "stop_requested")[:count], steps_at(run, "resumed")
    passed = state == "COMPLETED" and stops == resumed and metrics_whole(run)
    return Result(f"a stop during a save × {count}", "no hang, 0 steps lost, COMPLETED",
                  f"{len(resumed)} stops, {sum(a != b for a, b in zip(stops, resumed, strict=False))} lost, {state}",
                  passed)  # fmt: skip


def signal_in_packing(c: Cluster, count: int) -> Result:
    """The packed cache is gone when a job of two ranks starts; it is struck while it packs again."""
    pictures = slow_zip(c.root / "slow.zip", 3000)
    run, job = c.submit("train.total_steps=60", "data.name=images", f"data.path={pictures}", "--sbatch", "hold",
                        ranks=2)  # fmt: skip
    data = (read_json(run.run_json) or {})["data"]
    shutil.rmtree(Path(data["cache"]) / data["key"])
    c.bed.run(["scontrol", "release", job], check=True)
    seen: set[Path] = set()

    def packing() -> bool:
        new = set(Path(data["cache"]).glob(f".tmp-{data['key']}*")) - seen
        seen.update(new)
        return bool(new)

    for times in range(1, count + 1):
        c.bed.wait_for(packing, 90, "packing")
        c.strike(job, BOTH[(times - 1) % 2])
        c.wait_restart(job, times)
    state = c.bed.wait_state(job, timeout_s=240)
    passed = state == "COMPLETED" and metrics_whole(run) and not steps_at(run, "failed")
    return Result(f"a stop while data are packed × {count}", "no hang, packed again, COMPLETED",
                  f"{c.bed.restart_count(job)} restarts, {state}", passed)  # fmt: skip


def signal_in_compiling(c: Cluster, count: int) -> Result:
    """Struck while torch.compile is at work, before a life's first step; its linker is killed within a file."""
    if shutil.which("g++") is None:
        raise NotRun("torch.compile needs g++ here")
    run, job = c.submit(LONG, "train.compile=true", "checkpoint.every_steps=20")
    trained = 0
    for times in range(1, count + 1):
        by = BOTH[(times - 1) % 2]
        c.bed.wait_for(lambda times=times: _lives(run) == times, 120, f"life {times}")
        began = time.time()
        seen = "main.so" if by == "pre-emption" else "cpp"
        c.bed.wait_for(
            lambda began=began, seen=seen: any(t > began for t in _compiled(seen)), 240, "the compiler at work"
        )
        trained += last_logged(run) > 0
        c.strike(job, by)
        c.bed.wait_for(lambda times=times: c.bed.restart_count(job) == times, 400, f"stop {times}")
        with contextlib.suppress(FileNotFoundError):  # all was compiled before that stop: or there is nothing to do
            os.truncate(run.compiled, 4096)  # and what is harmed is compiled anew
    c.wait_steps(run, 3, timeout_s=400)
    starts = c.bed.restart_count(job) - count  # SLURM 24.11 adds one after the end
    state = c.stop(run, job)
    passed = state == "COMPLETED" and metrics_whole(run) and not trained and starts == 0
    return Result(f"a stop while the network is compiled × {count}", "no hang, no crash after it, COMPLETED",
                  f"{count + starts} restarts, {state}; {trained} came after a first step", passed)  # fmt: skip


def _compiled(suffix: str) -> list[float]:
    """When the files of compilers that are at work on this host last changed."""
    found = []
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/*/*.{suffix}"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_mtime)
    return found


def _lives(run: RunDir) -> int:
    """Lives that are past their start: each says where it begins."""
    said = "".join(p.read_text(errors="replace") for p in run.logs.glob("train-*.out"))
    return len(re.findall(r"no checkpoint: starting at step 0| resumed step=", said))


def signal_in_scoring(c: Cluster, count: int) -> Result:
    """Struck while features of the samples are computed."""
    run, job = c.submit("train.total_steps=30", "evaluate.extractor=random-inception")
    c.bed.wait_state(job, timeout_s=120)
    said = c.script("sample", run.name, "--set", "few", "--num-samples", str(32 * (count + 1)), "--shards",
                    str(2 * (count + 1)), "--batch", "16", "--steps", "2")  # fmt: skip
    c.bed.wait_state(said.split(" as job ")[1].split()[0], timeout_s=240)
    reference = slow_zip(c.root / "eight.zip", 16, size=8)
    said = c.script("evaluate", run.name, "--set", "few", "--reference", reference)
    job = said.split("evaluate as job ")[1].split(";")[0]
    done = run.sample_set("few").path
    for times in range(1, count + 1):
        goal = len(list(done.glob("features-*.json"))) + 1
        c.bed.wait_for(lambda goal=goal: len(list(done.glob("features-*.json"))) >= goal, 120, "features")
        c.strike(job, BOTH[(times - 1) % 2])
        c.wait_restart(job, times)
    early = not (run.eval / "few.json").exists()
    state = c.bed.wait_state(job, timeout_s=240)
    score = (read_json(run.eval / "few.json") or {}).get("frechet_distance")
    passed = state == "COMPLETED" and isinstance(score, float) and early
    return Result(f"a stop while a set is scored × {count}", "no hang, COMPLETED with a score",
                  f"{c.bed.restart_count(job)} restarts, {state}, score {score}, struck before it: {early}",
                  passed)  # fmt: skip


def slow_zip(path: Path, num: int, size: int = 512) -> Path:
    """A zip of `num` pictures that all take a while to decode (they are one and the same)."""
    from PIL import Image

    one = io.BytesIO()
    Image.effect_noise((size, size), 80).convert("RGB").save(one, format="PNG" if size < 64 else "JPEG")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(num):
            archive.writestr(f"train/{i % 2}/{i:05d}.{'png' if size < 64 else 'jpg'}", one.getvalue())
    path.chmod(0o644)
    return path


ROWS = {
    # name: (row, full count, reduced count)
    "pre-emptions": (pre_empted_in_a_row, 20, 1),
    "startup-pre-emptions": (pre_empted_while_starting, 5, 2),
    "no-grace": (pre_empted_without_grace, 3, 1),
    "preempt-cancel": (pre_empted_where_slurm_cancels, 1, 1),
    "preempt-cancel-at-once": (pre_empted_where_slurm_cancels_at_once, 1, 1),
    "requeue-forbidden": (requeue_forbidden, 1, 1),
    "scancel": (cancelled, 20, 4),
    "time-limit": (out_of_time, 5, 1),
    "one-rank-signalled": (one_signal_to_one_rank, 20, 1),
    "term-by-hand": (term_by_hand, 1, 1),
    "stop-file": (stop_file, 1, 1),
    "signal-in-save": (signal_in_a_save, 2, 1),
    "signal-in-packing": (signal_in_packing, 2, 1),
    "signal-in-compile": (signal_in_compiling, 2, 1),
    "signal-in-evaluation": (signal_in_scoring, 2, 1),
}
