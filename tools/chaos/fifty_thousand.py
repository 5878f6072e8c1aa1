"""A whole sample set made in a storm, and scored: a row on SLURM, and one without for the slow extractor.

The tasks of an array are pre-empted, failed and killed while they make 64 shards; half way the array is cancelled and
others, fewer, make the rest; at the end its last task is put back though all is done. The set is then compared with
one that few tasks made undisturbed in 7 shards. A tenth of it is scored by the whole Inception network, with random
weights, by tasks that share its shards and are struck too.
"""

from __future__ import annotations

import hashlib
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from ddpm.run.files import read_json, read_signed
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling.request import read_request
from ddpm.sampling.shards import verify_shard
from ddpm.scoring.record import scores_of
from launch.cluster.environment import PROJECT
from tools.chaos import lives
from tools.chaos.cluster import Cluster, send
from tools.chaos.files import Result
from tools.slurm_testbed.harness import patience

SHARDS, CALM_SHARDS, TASKS, FEWER_TASKS = 64, 7, 8, 5
PREEMPTED, FAULTS = 10, (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
NETWORKS_SHARE, SCORING_TASKS = 10, 3
MODEL = ["train.total_steps=30", "sample.batch=100", "sample.steps=5", "evaluate.extractor=pixels"]
PROGRESS = re.compile(r"(\S+Z) shard (?:\d+ images=|done )")


@dataclass
class Storm:
    """What is yet to come over the tasks of an array, and what has been seen of them."""

    cluster: Cluster
    run: RunDir
    set: SampleSet
    strikes: list[str | signal.Signals]
    chosen: random.Random = field(default_factory=lambda: random.Random(0))
    restarts: int = 0
    held_s: float = 0.0
    """Seconds for which tasks held a node, all together."""
    published: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Each manifest's inode and time when it was first seen."""
    again: set[str] = field(default_factory=set)
    """Manifests that were another's when they were seen later."""

    def over(self, array: str, shards: int, timeout_s: float = 900) -> None:
        """Until so many shards are there and, where these are all, all tasks have ended."""
        hit: dict[int, tuple[int, int]] = {}
        began = seen = time.monotonic()
        while True:
            tasks = {int(r["ArrayTaskId"]): r for r in self.cluster.bed.records(array) if r["ArrayTaskId"].isdigit()}
            running = {task: r for task, r in tasks.items() if r["JobState"] == "RUNNING"}
            self.held_s += (time.monotonic() - seen) * len(running)
            seen = time.monotonic()
            done = self.look()
            if done >= shards and (shards < SHARDS or not self.cluster.bed.squeue("-j", array)):
                break
            assert seen - began < timeout_s * patience(), f"{done} of {shards} shards after {timeout_s:.0f} s"
            ranks = {p.task: p.pid for p in self.cluster.ranks(self.run)}
            lives = {t: (int(r["Restarts"]), self._told(array, t)) for t, r in running.items() if t in ranks}
            new = [t for t, life in lives.items() if all(a > b for a, b in zip(life, hit.get(t, (-1, 0)), strict=True))]
            if self.strikes and new:
                task = self.chosen.choice(sorted(new))
                hit[task] = lives[task]
                self._strike(self.strikes.pop(), ranks[task], running[task]["BatchHost"])
            time.sleep(1)
        self.restarts += sum(int(r["Restarts"]) for r in tasks.values())

    def _told(self, array: str, task: int) -> int:
        """How many lines of a task's log tell of images."""
        log = self.run.logs / f"sample-{array}_{task}.out"
        return len(re.findall(rf"^{PROGRESS.pattern}", log.read_text(errors="replace"), re.M)) if log.exists() else 0

    def _strike(self, by: str | signal.Signals, pid: int, node: str) -> None:
        if isinstance(by, signal.Signals):
            send(pid, by)
        else:
            self.cluster.bed.preempt(node, 1)

    def look(self) -> int:
        """How many shards are done; keeps in mind which ones were published when."""
        for path in self.set.path.glob("shard-*.json"):
            now = (path.stat().st_ino, path.stat().st_mtime_ns)
            if self.published.setdefault(path.name, now) != now:
                self.again.add(path.name)
        return len(self.published)

    def useful_s(self) -> float:
        """Seconds of tasks that ended in images, by their logs."""
        total = 0.0
        for log in self.run.logs.glob("sample-*.out"):
            before = None
            for line in log.read_text(errors="replace").splitlines():
                found = PROGRESS.match(line)
                at = datetime.fromisoformat(found[1].replace("Z", "+00:00")).timestamp() if found else None
                total += at - before if at and before else 0.0
                before = at
        return total


def whole(sample_set: SampleSet, most: int | None = None) -> tuple[int, str]:
    """How many distinct samples a set has, each shard read and verified, and the sha256 of all in their order: of their
    images, then of their labels, however they were sharded. most: of so many, the first ones."""
    request, digest, indices, labels = read_request(sample_set), hashlib.sha256(), set(), b""
    for index in range(request.shards):
        shard = verify_shard(sample_set, request, index)
        first = int(read_signed(sample_set.shard_manifest(index, request.shards))["first"])
        these = slice(None if most is None else max(0, most - first))
        indices.update(range(first, first + len(shard.images[these])))
        digest.update(shard.images[these].tobytes())
        labels += shard.labels[these].tobytes()
    digest.update(labels)
    return len(indices), digest.hexdigest()


def _array(said: str) -> str:
    return re.findall(r" as job (\d+)", said)[0]


def sampled_in_a_storm(c: Cluster, count: int) -> Result:
    """A set of so many images in 64 shards under ten pre-emptions, three faults, a kill, other tasks half way."""
    run, job = c.submit(*MODEL)
    c.bed.wait_state(job, timeout_s=180)
    each = ["--max-parallel", "4", "--sbatch", "exclusive", "--cpus-per-task", "1"]  # of four, on a node of its own
    asked = ["sample", run.name, "--num-samples", str(count), *each]
    strikes: list[str | signal.Signals] = ["pre-emption"] * PREEMPTED + [*FAULTS, signal.SIGKILL]
    storm = Storm(c, run, run.sample_set("stormy"), strikes)
    storm.chosen.shuffle(strikes)
    began = time.monotonic()
    stormy = [*asked, "--set", "stormy", "--shards", str(SHARDS), "--tasks"]
    first = _array(c.script(*stormy, str(TASKS)))
    storm.over(first, SHARDS // 2)
    c.bed.cancel(first)
    c.bed.wait_for(lambda: not c.bed.squeue("-j", first), 60, "the end of the first tasks")
    second = _array(c.script(*stormy, str(FEWER_TASKS)))
    storm.over(second, SHARDS)
    wall_s, useful_s = time.monotonic() - began, storm.useful_s()
    last = f"{second}_{FEWER_TASKS - 1}"
    c.requeue(last)  # though it is done
    c.bed.wait_for(lambda: c.bed.job_state(last) == "COMPLETED" and c.bed.restart_count(last), 90, "the last task")
    storm.look()

    began = time.monotonic()
    calm = _array(c.script(*asked, "--set", "calm", "--shards", str(CALM_SHARDS), "--tasks", "4"))
    c.bed.wait_state(calm, timeout_s=600)
    calm_s = time.monotonic() - began
    (num, digest), (_, calm_digest) = whole(storm.set), whole(run.sample_set("calm"))
    score = _score(c, run)
    scored, by_network = _scored_in_a_storm(c, run, count // NETWORKS_SHARE, asked)
    passed = num == count == score and digest == calm_digest and not strikes and not storm.again and scored
    return Result(
        f"{count:,} images: {PREEMPTED} pre-emptions, {len(FAULTS)} faults, kill -9, other tasks half way",
        "each index once, no finished shard again, the bytes of a calm set in 7 shards",
        f"{num:,} indices, {len(storm.again)} shards again, same sha256: {digest == calm_digest} ({digest[:12]}), "
        f"{storm.restarts} restarts, {len(strikes)} strikes left; {wall_s:.0f} s, calm {calm_s:.0f} s; "
        f"{1 - useful_s / storm.held_s:.0%} of {storm.held_s:.0f} s on nodes made no image; {score:,} scored by "
        f"pixels; {by_network}",
        passed,
    )


def _score(c: Cluster, run: RunDir) -> int:
    """How many samples the set's score is of."""
    job = _array(c.script("evaluate", run.name, "--set", "stormy"))
    c.bed.wait_state(job, timeout_s=300)
    return int((read_json(run.eval / "stormy.json") or {}).get("num_samples", 0))


def _scored_in_a_storm(c: Cluster, run: RunDir, num: int, asked: list[str]) -> tuple[bool, str]:
    """The first `num` of the set by Inception's network, by tasks of which one is pre-empted and one killed."""
    part, shards = run.sample_set("part"), min(SHARDS, num // 4)
    few = _reference(c.bed.mkdir("reference"))
    words = [*asked, "--set", part.name, "--shards", str(shards), "--tasks", "1"]
    words[words.index("--num-samples") + 1] = str(num)
    c.bed.wait_state(_array(c.script(*words)), timeout_s=600)
    same = whole(part) == whole(run.sample_set("stormy"), most=num)
    network = ["--reference", str(few), "--extractor", "random-inception", "--tasks", str(SCORING_TASKS)]
    site = ["--sbatch", "exclusive", "--cpus-per-task", "1"]
    began = time.monotonic()
    job = _array(c.script("evaluate", run.name, "--set", part.name, *network, *site))
    seen: dict[str, int] = {}
    again: set[str] = set()
    strikes = ["pre-emption", "kill -9"]
    while c.bed.squeue("-j", job):
        assert time.monotonic() - began < 1800 * patience(), f"features of {len(seen)} of {shards} shards"
        for name, at in _features(part).items():
            again |= {name} if seen.setdefault(name, at) != at else set()
        if strikes and len(seen) > shards // 4 * (3 - len(strikes)) and (ranks := c.ranks(run)):
            struck = ranks[-1]
            if strikes.pop(0) == "kill -9":
                send(struck.pid, signal.SIGKILL)
            else:
                c.bed.preempt(c.bed.node_of(f"{job}_{struck.task}") or "", 1)
        time.sleep(1)
    wall_s = time.monotonic() - began
    (record,) = [score.record for score in scores_of(run, part.name)]
    distance, features = record["frechet_distance"], _features(part)
    good = same and record["num_samples"] == num and len(features) == shards and not (again or strikes) and distance > 0
    return good, (
        f"{num:,} of them scored by random-inception in {wall_s:.0f} s by {SCORING_TASKS} tasks, one pre-empted, one "
        f"killed: {distance:.4g}, {len(again)} of {len(features)} shards' features again"
    )


def _reference(folder: Path) -> Path:
    """Fewer images than a reduced set has, which the training images are not."""
    few = folder / "reference.npz"
    np.savez(few, arr_0=np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    return few


# ---------------------------------------------------------------- without SLURM


def scored_and_killed(count: int) -> Result:
    """So many images scored by the whole Inception network, with random weights: killed half way, then once more."""
    shards = min(SHARDS, count // 4)
    with lives.new_root() as root:
        run = lives.prepare(root, "scored", *MODEL)
        for words in (["train"], ["sample", "scored", "--shards", f"0-{shards - 1}"]):
            if words[0] == "sample":
                asked = ["--set", "scored", "--num-samples", str(count), "--shards", str(shards), "--prepare"]
                subprocess.run([*_script("sample"), str(run.path), *asked], check=True, capture_output=True)
            subprocess.run(_job(run, *words), check=True, stdout=lives.log_of(run).open("ab"), cwd=PROJECT)
        few = _reference(root)
        scoring = _job(run, "evaluate", "scored", "--reference", str(few), "--extractor", "random-inception")
        half = subprocess.Popen(scoring, stdout=lives.log_of(run).open("ab"), cwd=PROJECT)
        while len(kept := _features(run.sample_set("scored"))) < shards // 2 and half.poll() is None:
            time.sleep(0.2)
        half.kill()
        half.wait()
        subprocess.run(scoring, check=True, stdout=lives.log_of(run).open("ab"), cwd=PROJECT)
        now = _features(run.sample_set("scored"))
        twice = sum(now.get(name) != time_ns for name, time_ns in kept.items())
        record = read_json(run.eval / "scored.json") or {}
        distance = record["frechet_distance"]
    passed = record["num_samples"] == count and not twice and len(kept) >= shards // 2 and distance > 0
    return Result(f"{count:,} images by random-inception, kill -9 half way", "scored; no feature is computed twice",
                  f"{record['num_samples']:,} scored, distance {distance:.4g}; of {len(kept)} shards' features that "
                  f"were there {twice} again", passed)  # fmt: skip


def _script(name: str) -> list[str]:
    return [sys.executable, str(PROJECT / "launch" / f"{name}.py")]


def _job(run: RunDir, stage: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "launch.jobs", stage, str(run.path), *words]


def _features(of: SampleSet) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in of.path.glob("features-*.npy")}


HERE_ROWS = {"inception-killed": (scored_and_killed, 5000, 256)}
ROWS = {"fifty-thousand": (sampled_in_a_storm, 50_000, 6400)}
