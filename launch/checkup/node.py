"""What a node of the partition has, asked by a job on it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from ddpm.run.files import read_json, write_json
from ddpm.run.log import amount, counted, plain
from ddpm.run.paths import RunDir
from launch.checkup.finding import Finding, Findings, judged
from launch.cluster import code, inquiry, scheduler
from launch.cluster.job import Job, at_home
from launch.cluster.settling import settle
from launch.cluster.site import Site

SKEW_S = 2.0
POLL_S = 2.0
ENDED = "it ended"
SCRIPT = """\
#!/bin/bash
DDPM_RUN={run}
ddpm_node=${{SLURMD_NODENAME:-$(hostname)}}
ddpm_end() {{
  local code=$?
  [ -z "$ddpm_setup" ] ||
    echo "setup failed on $ddpm_node: it ended the shell (exit code $code), at the line: $ddpm_setup"
  exit "$code"
}}
trap ddpm_end EXIT
. "$DDPM_HOME/slurm/setup.sh"
[ -z "$ddpm_setup" ] || exit 1   # a line of them has returned
exec "$DDPM_PYTHON" -m launch.checkup.node_report "$1"
"""
"""The site profile's `setup` lines as jobs run them, which end at one that fails; then the report."""


def probe(site: Site, root: Path, patience_s: float) -> Findings:
    """What a node of the partition has, by a job of a minute on one."""
    site = settle(site, dry_run=False)
    where = root / ".cache" / "doctor"
    where.mkdir(parents=True, exist_ok=True)
    asked = where / f"{os.getpid()}.json"
    said, asked_at = {"token": os.urandom(8).hex()}, time.time()
    write_json(asked, said, replace=True)
    answer, log, script = (asked.with_suffix(suffix) for suffix in (".node.json", ".out", ".sh"))
    kept = RunDir(where / "run")
    kept.path.mkdir(exist_ok=True)
    home = at_home(code.unpack(kept))
    try:
        (kept.path / "setup.sh").write_text("".join(f"{line}\n" for line in site.setup))
        script.write_text(SCRIPT.format(run=shlex.quote(str(kept.path))))
        brief = site.model_copy(update={"nodes": 1, "time": 5})
        job = inquiry.submit_probe(Job("train", kept, brief), home, script, asked, log)
        state = _wait(job, answer, patience_s)
        if (told := read_json(answer)) is None:
            lines = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
            heard = "".join(f"\n      {plain(line)}" for line in lines)
            remedy = "mend what it says: `setup` lines, the environment that nodes see; or a longer --wait-s"
            if state == ENDED and not log.exists():
                remedy = f"it could not even begin a log: do nodes see {root}? Choose a --root that they share"
            yield Finding("fail", f"job {job} told nothing of its node ({state}){heard}", remedy)
            return
        yield from _node(told, said, asked_at, site)
    finally:
        for path in (asked, answer, log, script):
            path.unlink(missing_ok=True)
        shutil.rmtree(kept.path, ignore_errors=True)


def _wait(job: str, answer: Path, patience_s: float) -> str:
    """Until it has answered or is gone; what it was last, ENDED if it is gone. Takes it back where it does neither."""
    until = time.monotonic() + patience_s
    gone = 0
    while time.monotonic() < until and not answer.exists():
        with contextlib.suppress(scheduler.SchedulerError):
            found = scheduler.look_up([job]).get(job)
            gone = 0 if found else gone + 1
            if gone > 3:  # a shared file may come later than the end of its job
                return ENDED
        time.sleep(POLL_S)
    if answer.exists():
        return ENDED
    found = scheduler.look_up([job]).get(job)
    scheduler.cancel([job])
    wait = scheduler.explain(job, found) if found else None
    return f"still {found.state.lower() if found else 'waiting'} after {patience_s:.0f} s" + (f": {wait}" * bool(wait))


def _node(told: dict[str, Any], said: dict[str, Any], asked_at: float, site: Site) -> Findings:
    host = told["host"]
    told_seen = f"node {host} and this machine see the same files in the runs' place"
    yield judged(told["sees"] == said, told_seen, f"they do not: choose a --root that {host} shares", "fail")
    if (off := max(asked_at - told["time"], told["time"] - time.time())) > SKEW_S:  # it was asked in between
        yield Finding(
            "warn",
            f"the clock of {host} is {off:.0f} s off, at least",
            "tell your site: times of events are wrong by as much",
        )
    for name in set(told["lacks"]) & set(inquiry.NEEDED):
        yield Finding("warn", f"no {name} on {host}, which {inquiry.COMMANDS[name]}", "have a `setup` line bring it")
    if error := told.get("torch_error"):
        remedy = f"is its driver too old (nvidia-smi on {host}; README, CUDA)? Else rm -r .venv, then tools/env.sh anew"
        if "no kernel image" in error:
            remedy = (
                f"torch {told['torch']} (CUDA {told['cuda']}) is for others: README, Installing, names one for these"
            )
        on = f"{host}, on a {told['gpu']}" if "gpu" in told else host
        yield Finding("fail", f"torch on {on}: {error.splitlines()[0]}", remedy)
        return
    gpus = f"{told['gpus']} x {told.get('gpu')}, NCCL {told.get('nccl')}" if told["gpus"] else "no GPU"
    parts = [f"Python {told['python']}", f"torch {told['torch']} (CUDA {told['cuda']})", gpus]
    parts += [f"{counted(told['cpus'], 'CPU')} for us", f"{amount(told['tmp_bytes'])} free in its tmp"]
    good = not site.num_gpus or told["gpus"] > 0
    yield judged(good, f"node {host}: {', '.join(parts)}", _no_gpu_there(told, site), "fail")


def _no_gpu_there(told: dict[str, Any], site: Site) -> str:
    """What to do where torch sees none on a node."""
    asked = f"the probe asked for --gpus-per-node {site.gpus_per_node}, and torch sees none"
    if told["cuda"] is None:
        return f"{asked}: it is one without CUDA; rm -r .venv, then TORCH=default tools/env.sh makes another"
    return (
        f"{asked}, though it is one for CUDA: is there a driver for it (nvidia-smi on {told['host']}; README, CUDA), "
        f"and was the job given a GPU? Else ask for it in your site's words: gpu_request in the profile"
    )
