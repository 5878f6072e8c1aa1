"""`--cluster local`: the same jobs, one after another, as background processes on this machine.

    python -m launch.queue.local RUN 'JSON list of commands' [PID JOB … of other runs' jobs to wait for]

They are not restarted: the user submits again. Output goes to logs/local-JOB.out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from ddpm.errors import EXIT_REQUEUE, DDPMError, EnvironmentLacks
from ddpm.run.events import EventLog, read_events
from ddpm.run.files import DamagedFile
from ddpm.run.log import say
from ddpm.run.paths import RunDir
from launch.cluster import code, environment, scheduler
from launch.cluster.job import Job
from launch.queue import ending
from launch.queue.waiting import is_of, is_told_to_stop

POLL_S = 0.5
KILLED_AS: dict[int, str] = {
    signal.SIGKILL: ", as by the kernel where memory runs out",
    signal.SIGBUS: ", as where a file that is mapped can be read no more",
}
TORCHRUN = re.compile(r"^[WE]\d{4} \S+ +\d+ torch/distributed/elastic/", re.M)
"""How torchrun begins what it says of a rank's end, after which it ends the others."""
TAIL_BYTES = 64 << 10
ERROR_CHARACTERS = 600
Place = tuple[int, str]
"""A background job of this machine: its process and its name."""


def stage_command(job: Job) -> list[str]:
    """The command of `job` on this machine, where one process makes all shards; torchrun starts training's ranks."""
    python = [sys.executable, "-u"]
    if job.stage == "train" and job.site.world_size > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.site.world_size}"]
    return [*python, "-m", "launch.jobs", *job.arguments(job.shards)]


def running(run: RunDir) -> int | None:
    """The pid of the background job on this machine that trains the run or will train it; None if there is none."""
    return next((pid for pid, stages in at_work(run).values() if "train" in stages), None)


def at_work(run: RunDir, events: list[dict[str, Any]] | None = None) -> dict[str, tuple[int, list[str]]]:
    """The run's background jobs on this machine that have not ended: job -> (pid, stages), the newest first.

    events: the run's events, if they have been read already.
    """
    found = {}
    for e in reversed(read_events(run) if events is None else events):
        here = e["event"] == "submitted" and e.get("via") == "local" and e.get("host") == environment.host()
        if here and e.get("pid") and is_of(run, e):
            with contextlib.suppress(OSError):  # it has ended
                if _is_at_work(Path(f"/proc/{e['pid']}"), e):
                    found[str(e["job"])] = int(e["pid"]), (e.get("stage") or "").split("+")
    return found


def _is_at_work(process: Path, submitted: dict[str, Any]) -> bool:
    """Whether a process is the one that was submitted, and not a later one with the same pid. Raises OSError."""
    try:
        return f"DDPM_JOB={submitted['job']}".encode() in (process / "environ").read_bytes().split(b"\0")
    except PermissionError:  # another user's, whose words can be read
        words = (process / "cmdline").read_bytes().split(b"\0")
        return b"launch.queue.local" in words and str(submitted.get("run")).encode() in words


def is_behind(events: list[dict[str, Any]]) -> bool:
    """Whether the newest job of a run with these events is on this machine and waits for other runs' jobs to end."""
    newest: dict[str, Any] = next((e for e in reversed(events) if e["event"] == "submitted"), {})
    before = newest.get("behind")
    if newest.get("via") != "local" or newest.get("host") != environment.host() or not isinstance(before, list):
        return False
    return any(is_there(pid, job) for pid, job in _pairs(before))


def _pairs(words: list[Any]) -> list[tuple[str, str]]:
    """PID JOB PID JOB … as processes with their jobs."""
    return [(str(pid), str(job)) for pid, job in zip(words[::2], words[1::2], strict=False)]


def is_there(pid: str, job: str) -> bool:
    """Whether background job `job` of this machine, started as process `pid`, is still running."""
    try:
        return _is_at_work(Path(f"/proc/{pid}"), {"job": job})
    except OSError:
        return False


def start(run: RunDir, jobs: list[Job], behind: Sequence[Place] = ()) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `jobs` in a session of their own, so that closing the terminal does not end them.

    behind: background jobs for which these wait. Returns the process and its log, which is named after this job.
    """
    name = f"local-{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.getpid()}"
    run.logs.mkdir(exist_ok=True)
    log = run.logs / f"{name}.out"
    commands = [stage_command(job) for job in jobs]
    chosen = jobs[0].site.cpus_per_task or environment.threads_asked()
    cpus = {"DDPM_CPUS": str(chosen)} if chosen else {}
    before = [str(word) for place in behind for word in place]
    home = code.unpack(run)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "launch.queue.local", str(run.path), json.dumps(commands), *before],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=home,
            env={**environment.for_jobs(home), "DDPM_JOB": name, **cpus},
        )
    events = EventLog(run, name, 0, environment.host(), prefix="submit-")
    told = {"stage": "+".join(job.stage for job in jobs), "via": "local", "pid": process.pid, "run": str(run.path)}
    told |= {"code": home.name, **({"despite": jobs[0].despite} if jobs[0].despite else {})}
    told |= {"behind": before} if before else {}
    try:
        events.append("submitted", **told)
    except BaseException as e:  # without its event nobody could find it again
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(e, OSError):
            raise
        raise EnvironmentLacks(
            f"{events.path} cannot be written ({e.strerror}), so what was started for it was ended: make room there, "
            f"or make it writable, and submit again"
        ) from None
    return process, log


def how_ended(code: int) -> str:
    """In words, of a process that did not end well. code: as Popen tells it."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {scheduler.signal_name(-code)}{KILLED_AS.get(-code, '')}"


def _does(command: list[str]) -> tuple[str, str]:
    """Stage and set of a `stage_command`."""
    stage, _, *of = command[command.index("launch.jobs") + 1 :]
    return stage, of[0] if of else ""


def _note(run: RunDir, event: str, stage: str, set_name: str) -> None:
    """Record when sampling or scoring starts and ends; training writes its own events."""
    if stage != "train":
        log = EventLog(run, f"{environment.current().job}-then", 0, environment.host())
        with contextlib.suppress(OSError):  # a full disk ends nothing
            log.append(event, stage=stage, set=set_name, step=run.latest_step())


def _tell(run: RunDir, stage: str, set_name: str, code: int) -> None:
    """Tell the owner that the run has ended, unless the owner stopped it; and the run itself why, where its processes
    could not."""
    env = environment.current()
    if code == 0:
        ending.of_success(run, env, stage, set_name)
        return
    with contextlib.suppress(OSError):
        mine = [e for e in read_events(run) if e["job"] == env.job]
        if code in (EXIT_REQUEUE, -signal.SIGTERM, -signal.SIGINT) or any(e["event"] == "stop_requested" for e in mine):
            return
        said = next((e["reason"] for e in reversed(mine) if e["event"] == "failed" and e.get("reason")), "")
        told = f"{stage} ended with exit code {code}: {said}"
        if not said:
            told = f"{stage} {_how_said(run, env.job, code)}"
            with contextlib.suppress(OSError):  # a full disk
                env.events(run).append("failed", step=run.latest_step(), stage=stage, exit_code=code, reason=told)
        ending.of_failure(run, env, stage, set_name, code, told)


def _how_said(run: RunDir, job: str, code: int) -> str:
    """`how_ended`, as the end of the job's log tells it: of several ranks torchrun says which was killed."""
    said = ""
    with contextlib.suppress(OSError), (run.logs / f"{job}.out").open("rb") as f:
        f.seek(max(0, f.seek(0, 2) - TAIL_BYTES))
        said = f.read().decode(errors="replace")
    first = said.rpartition("Root Cause (first observed failure):")[2]
    if killed := re.search(r"rank +: (\d+) .*\n +exitcode +: -(\d+) ", first):
        return f"ended, since rank {killed[1]} {how_ended(-int(killed[2]))}"
    of_ranks = TORCHRUN.split(said)[0]
    errors = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*[A-Z]\w*(?:Error|Exception)\b.*)", of_ranks, re.M)
    return f"{how_ended(code)}: {errors[-1][:ERROR_CHARACTERS]}" if errors and code > 0 else how_ended(code)


def main() -> int:
    """Run the commands in turn, until one fails or STOP exists; a stop signal is passed on to the running command.

    If this waits for other runs' jobs, it first waits until those have ended in any way.
    """
    run, commands = RunDir(Path(sys.argv[1])), json.loads(sys.argv[2])
    work = [_does(command) for command in commands]
    stages = [stage for stage, _ in work]
    child: subprocess.Popen[bytes] | None = None
    heard: list[int] = []
    unheard: list[int] = []  # while no command was running

    def forward(signum: int, _: FrameType | None) -> None:
        heard.append(signum)
        if child is not None:
            child.send_signal(signum)
        else:
            unheard.append(signum)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, forward)
    before = _pairs(sys.argv[3:])
    while not heard and not run.is_stopped() and any(is_there(pid, job) for pid, job in before):
        time.sleep(POLL_S)
    for i, command in enumerate(commands):
        if heard:  # the command before too, and had its work done by then
            return 128 + heard[0]
        # it has ended the command before, and what would follow has nothing to go on
        if (i or before) and is_told_to_stop(run, environment.current().job):
            return 0
        if stages[i] not in stages[:i]:
            _note(run, "stage_began", *work[i])
        with contextlib.suppress(DDPMError, DamagedFile):  # what is not there shows where it is needed
            code.unpack(run)  # it may have been purged meanwhile
        started = subprocess.Popen(command)
        child = started
        while unheard:
            child.send_signal(unheard.pop())
        ended = child.wait()
        child = None
        if ended:
            if ended < 0 and not heard:  # what it could not say itself
                say(f"{stages[i]} {how_ended(ended)}")
            if not heard:
                _tell(run, *work[i], ended)
            return ended if ended > 0 else 128 - ended
        if stages[i] not in stages[i + 1 :]:
            _note(run, "stage_done", *work[i])
    _tell(run, *work[-1], 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
