"""Drives the SLURM testbed of tools/slurm_testbed as an ordinary user would, without a shell in between.

Jobs are named by SLURM's ids: "17", "17_3" for an array task. Times are seconds.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

USER = "games"  # exists on every Debian and owns nothing; nobody is another one to SLURM from 25.11 on, with uid 99
KNOBS = {
    "NODES": "4", "CPUS": "2", "GPUS": "2", "GRACE": "10", "KILLWAIT": "5", "CRED_EXPIRE": "5", "SLURMD_TIMEOUT": "20"
}  # fmt: skip
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
         "PREEMPTED")  # fmt: skip
DAEMONS = ("slurmctld", "slurmd", "sbatch", "munged")
ACCOUNTING = ("slurmdbd", "mariadbd")
SBIN_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

T = TypeVar("T")


def _as_user(argv: Sequence[str], cwd: str | Path, timeout: float = 60,
             env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
    # Not setpriv, which looks the command up with root's rights before it gives them up.
    entry = pwd.getpwnam(USER)
    return subprocess.run(
        argv, user=entry.pw_uid, group=entry.pw_gid, extra_groups=[], umask=0o022, cwd=cwd, env=env,
        timeout=timeout * patience(),
        text=True, stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip


def patience() -> float:
    """The factor by which to wait longer than on an idle machine: runnable processes for each core, at least 1."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def missing(daemons: Sequence[str]) -> list[str]:
    return [name for name in daemons if shutil.which(name, path=SBIN_PATH) is None]


def what_lacks(project: Path, python: str) -> tuple[str, str] | None:
    """The first thing that keeps the testbed from running here, and how to get it; None if nothing does."""
    if os.geteuid() != 0:
        return "not root: slurmd starts jobs as their users", "run tools/test.sh as root, say in a container"
    if lacking := missing(DAEMONS):
        return f"{', '.join(lacking)} missing", "on Debian as root: tools/slurm_testbed/start.sh --install"
    checks = [
        (["cat", str(project / "pyproject.toml")], f"user {USER} cannot read {project}",
         "check the project out where other users can read it (chmod o+x on the folders above it)"),
        ([python, "-c", "import ssl"], f"user {USER} cannot execute {python}",
         "delete .venv and run tools/test.sh, which then takes a Python that all users can execute"),
    ]  # fmt: skip
    for argv, reason, enable in checks:
        try:
            failed = _as_user(argv, cwd="/").returncode != 0
        except OSError:
            failed = True
        if failed:
            return reason, enable
    return None


class SlurmTestbed:
    """A running testbed.

    user: the ordinary user that `run` becomes; home, workdir: directories that this user owns;
    project, python: the checkout and its interpreter, which this user can read and execute; knobs: start.sh's settings.
    """

    def __init__(self, project: Path, python: str, **knobs: str) -> None:
        self.user = USER
        self.project = project
        self.python = python
        self._knobs = {**KNOBS, **knobs}
        self.directory = Path(tempfile.mkdtemp(prefix="ddpm-slurm-", dir="/tmp"))
        self.cluster = self.directory / "cluster"
        self.conf = self.cluster / "slurm.conf"
        self.logs = self.cluster / "log"
        self.directory.chmod(0o755)
        self.home = self._own_directory(self.directory / "home")
        self.workdir = self._own_directory(self.directory / "work")
        # A checkout that belongs to root is "dubious" to this user's git; whoever runs jobs owns theirs.
        (self.home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")

    def start(self) -> None:
        """Starts the daemons; about a second."""
        self._tool("start.sh", str(self.cluster))

    def stop(self) -> None:
        """Ends jobs and daemons and deletes everything; safe to call at any moment."""
        try:
            if self.conf.exists():
                self._tool("stop.sh", str(self.cluster), "--purge")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _tool(self, name: str, *args: str) -> None:
        # In a session of its own: ctrl-C is for pytest, which then calls stop().
        script = str(self.project / "tools" / "slurm_testbed" / name)
        done = subprocess.run([script, *args], env={**os.environ, **self._knobs}, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=120, start_new_session=True)  # fmt: skip
        assert done.returncode == 0, f"{name} exited with {done.returncode}:\n{done.stdout}{done.stderr}"

    def _own_directory(self, path: Path) -> Path:
        path.mkdir()
        shutil.chown(path, USER, pwd.getpwnam(USER).pw_gid)
        return path

    def admin(self, argv: Sequence[str]) -> str:
        """Runs argv as root against this cluster: sacctmgr, scontrol update node …"""
        env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": SBIN_PATH}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
        return done.stdout

    def mkdir(self, name: str) -> Path:
        """A new directory in workdir that belongs to the user."""
        return self._own_directory(self.workdir / name)

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        check: bool = False,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs argv as the user in `cwd` (default workdir), in a login-like environment plus `env`."""
        environment = {
            "PATH": f"{Path(self.python).parent}:{SBIN_PATH}", "HOME": str(self.home), "USER": USER, "LOGNAME": USER,
            "SHELL": "/bin/bash", "LANG": "C.UTF-8", "TMPDIR": str(self.home),
            "SLURM_CONF": str(self.conf), **(env or {}),
        }  # fmt: skip
        done = _as_user([os.fspath(a) for a in argv], cwd or self.workdir, timeout, environment)
        if check and done.returncode != 0:
            raise AssertionError(
                f"{done.args} exited with {done.returncode}\n{done.stdout}{done.stderr}\n{self.dump()}"
            )
        return done

    def sbatch(self, *options: str, command: str) -> str:
        """Submits the shell line `command` as the user and gives its job id; logs go to workdir by default."""
        return self.run(["sbatch", "--parsable", *options, "--wrap", command], check=True).stdout.strip().split(";")[0]

    def preempt(self, node: str, seconds: int = 3) -> str:
        """Submits an urgent job that takes all of `node` for `seconds`, pre-empting what runs there; gives its id."""
        return self.sbatch("-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", command=f"sleep {seconds}")

    def cancel(self, job_id: str) -> None:
        """scancel, as the user."""
        self.run(["scancel", job_id], check=True)

    def squeue(self, *options: str) -> str:
        """squeue's table, without header: id, state, node or reason, name."""
        return self.run(["squeue", "-h", "-r", "-o", "%i %T %R %j", *options], check=True).stdout

    def records(self, job_id: str) -> list[dict[str, str]]:
        """What `scontrol show job` says, one record per array task; finished jobs stay known for ten minutes."""
        shown = self.run(["scontrol", "-o", "show", "job", job_id], check=True).stdout
        shown = re.sub(r"(?s) SubmitLine=.*?(?= WorkDir=)", "", shown)  # from 25.11 on, of many lines if --wrap is
        return [dict(re.findall(r"(?:^| )([\w/:]+)=(\S*)", line)) for line in shown.splitlines() if line]

    def _record(self, job_id: str) -> dict[str, str]:
        records = self.records(job_id)
        assert len(records) == 1, f"job {job_id} is an array of {len(records)}: ask for one task, or use job_states"
        return records[0]

    def job_state(self, job_id: str) -> str:
        """SLURM's state of one job or array task, say RUNNING."""
        return self._record(job_id)["JobState"]

    def job_states(self, job_id: str) -> list[str]:
        """The states of all tasks of an array. Tasks that were never started share one record."""
        return [record["JobState"] for record in self.records(job_id)]

    def restart_count(self, job_id: str) -> int:
        """How often SLURM has put the job back."""
        return int(self._record(job_id)["Restarts"])

    def node_of(self, job_id: str) -> str | None:
        """The first node of the job, None while it waits."""
        record = self._record(job_id)
        return record.get("BatchHost") if record["NodeList"] != "(null)" else None

    def wait_for(self, predicate: Callable[[], T], timeout_s: float, what: str, poll_s: float = 0.2) -> T:
        """Polls until `predicate` is true and gives its value; fails the test with the cluster's state otherwise.

        timeout_s: on a machine that others leave alone. poll_s: longer for what only SLURM is asked, in processes that
        take the time of jobs.
        """
        began = time.monotonic()
        while True:
            value = predicate()
            if value:
                return value
            if time.monotonic() > began + timeout_s * patience():
                raise AssertionError(f"not within {timeout_s:g} s: {what}\n{self.dump()}")
            time.sleep(poll_s)

    def wait_state(self, job_id: str, *states: str, timeout_s: float = 30) -> str:
        """Waits until the job (of an array: every task) is in one of `states`, ENDED by default; gives the state."""
        wanted = states or ENDED
        what = f"job {job_id} {wanted}"
        self.wait_for(lambda: set(self.job_states(job_id)) <= set(wanted), timeout_s, what, poll_s=0.5)
        return self.job_states(job_id)[0]

    def end_all_jobs(self, timeout_s: float = 30) -> None:
        """Cancels everything in the queue and waits until it is empty: KillWait, where a job ignores SIGTERM."""

        def ended() -> bool:
            jobs = sorted({line.split()[0] for line in self.squeue().splitlines()})
            if jobs:
                self.run(["scancel", *jobs])  # each time, for those that put themselves back
            return not jobs

        self.wait_for(ended, timeout_s, "an empty queue")

    def dump(self) -> str:
        """The cluster's state for a failure's message: queue, jobs, and the ends of logs, the jobs' newest last."""
        parts = []
        for argv in (["sinfo", "-N"], ["squeue", "-a", "-r"], ["scontrol", "-o", "show", "job"]):
            done = self.run(argv)
            parts.append(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}")
        jobs_logs = [p for p in self.workdir.rglob("*") if p.suffix in (".out", ".err", ".log") and p.is_file()]
        jobs_logs.sort(key=lambda p: p.stat().st_mtime)
        daemons_logs = sorted(self.logs.glob("slurm*.log"))
        for path in [*daemons_logs, *jobs_logs[-6:]]:
            num_lines = 10 if path in daemons_logs else 25
            lines = [line for line in path.read_text(errors="replace").splitlines() if "pmi" not in line.lower()]
            parts.append("\n".join([f"--- {path}", *lines[-num_lines:]]))
        return "\n".join(parts)
