"""Why a life ended, from its log: its last error, whether memory ran out, and on which node."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ddpm.errors import GPU_MEMORY
from ddpm.run.paths import RunDir
from launch.cluster.environment import JobEnvironment
from launch.cluster.job import numbers
from launch.terminal.logfiles import NOISE

TAIL_BYTES = 256 * 1024
CHARACTERS = 600
OWN = re.compile(
    r"^\S+Z failed: |^setup failed|^(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Unfit|Lacks)\b"
    r"|(?i:\berror\b|cannot|no such file|not found|denied|fault|killed|abort)"
)
HOST_MEMORY = re.compile(
    r"oom.kill|: Out Of Memory|exceeded (?:job )?memory limit|^MemoryError|Cannot allocate memory", re.I | re.M
)
TOLD = r"\d{4}-\S+Z (?!failed: )"
"""The beginning of a line that a life logs about its work, which may tell of an error that it survived."""
SCANCEL = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+ (?:DUE to SIGNAL \w+ )?\*\*\*")
"""SLURM's line for a job that a person cancels; for others it adds DUE TO: PREEMPTION, TIME LIMIT, JOB REQUEUE …"""
FEWER = {
    "train": "hold fewer images at a time: train.micro_batch=auto",
    "sample": "compute fewer images at a time: launch/sample.py --set OTHER --batch …, or ask for GPUs with more",
}
FROM_SETUP = r"^\S*setup\.sh: (?:eval: )?line \d+: "
"""How the shell begins what it says of a setup line."""
FRAME = re.compile(r'File "(?:.*/)?((?:ddpm|launch)/[\w./-]+\.py)", line (\d+)')
"""A line of a traceback that is about this project's code, which a student may have changed."""
TASK_DIED = re.compile(r"^srun: error: ([\w.-]+): (tasks? [\d,-]+): (.+)", re.M)
KILLED = "Killed"
SILENT = re.compile(r"^\S+Z failed: ranks? [\d, ]+ on (\S+(?:, \S+)*|an unknown node) (?:did not|could not be) ", re.M)
"""What ranks say of others that hang (ddpm/training/peers.py); who says it leaves first."""
NO_NODES = re.compile(
    r"^\S+Z failed: port \d+ is another process's|Watchdog caught collective operation timeout"
    r"|^srun: error: Unable to create step", re.M,
)  # fmt: skip
"""Where ranks did not find each other, NCCL does not say which of them hangs, or SLURM starts none."""
OF_ANOTHER = re.compile(r"^\S+Z failed: rank (\d+) lost its connection to another", re.M)
"""What a rank says whose peer died: no cause."""


@dataclass(frozen=True)
class LastWords:
    log: Path | None = None
    error: str = ""
    lacked: str = ""
    """What ran out: memory, or GPU memory; else ""."""
    node: str = ""
    """The node of the rank that did not answer the others, else of the one that died first, if srun names it."""
    by_no_node: bool = False
    """Whether ranks did not hear each other, and which node that is owed to is not known."""
    cancelled: bool = False
    """Whether SLURM says that it was cancelled by scancel."""

    def told(self, stage: str, host: str, mem: str) -> str:
        """For a message: where and why it ended. mem: the memory that the job had asked for."""
        what = f"out of {self.lacked}" if self.lacked else ""
        what += f" (it had asked for {mem}: ask for more, --mem)" if self.lacked == "memory" else ""
        what += f" ({FEWER.get(stage, 'ask for GPUs with more')})" if self.lacked == "GPU memory" else ""
        parts = [what, f"stage {stage} on node {self.node or host}", f"log {self.log}" if self.log else "",
                 f"its last error: {self.error}" if self.error else ""]  # fmt: skip
        return "; ".join(filter(None, parts))


def last_words(run: RunDir, stage: str, env: JobEnvironment) -> LastWords:
    """The last words of the life that ends now; empty if the log cannot be read."""
    names = (f"{stage}-{env.job}.out", f"{stage}-{env.job}_0.out")  # the second by hand, without an array, once
    try:
        there = [path for path in (run.logs / name for name in names) if path.exists()]
        path = max(there, key=lambda p: p.stat().st_mtime)
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return read(path, f.read().decode(errors="replace"), env.restart)
    except (OSError, ValueError):
        return LastWords()


def read(path: Path, text: str, restart: int) -> LastWords:
    """The last words in `text`, the end of the log, since life number `restart` began."""
    began = list(re.finditer(rf"^\[batch\] .* restart={restart} ", text, re.M))
    said = text[began[-1].start() :] if began else text
    own = [
        line.strip()
        for line in said.splitlines()
        if line.strip() and not (line.startswith("[batch]") or NOISE.match(line) or OF_ANOTHER.match(line))
    ]
    at = next((i for i in reversed(range(len(own))) if OWN.search(own[i])), None)
    error = own[at] if at is not None else ""
    place = _place(own[: at + 1]) if at else ""
    if at and error.startswith("setup failed"):  # and what the line itself said, as modul: command not found
        error = f"{re.sub(FROM_SETUP, '', own[at - 1])[: CHARACTERS // 2]}; {error}"
    error = "".join(c if c.isprintable() else " " for c in re.sub(r"^\S+Z (?:failed: )?", "", error))
    ends = "\n".join(line for line in said.splitlines() if not re.match(TOLD, line))
    lacked = "GPU memory" if GPU_MEMORY.search(ends) else "memory" if HOST_MEMORY.search(ends) else ""
    left = {int(rank) for rank in OF_ANOTHER.findall(said)}  # who leaves may be heard of before who died
    died = next((one for one in TASK_DIED.finditer(said) if not left.issuperset(numbers(one[2].split()[1]))), None)
    if left and not died and not error:
        error = "ranks lost their connections to each other, and none had died"
    silent = set(SILENT.findall(said))
    told = left or (died and not died[3].startswith("Exited"))
    if died and ((told and not error) or (died[3] == KILLED and not silent)):  # who is killed says nothing himself
        error, place = f"{died[2].replace('task', 'rank')} on {died[1]}: {died[3]}", ""
    node = silent.pop() if len(silent) == 1 else ""
    by_no_node = bool(silent or NO_NODES.search(said) or " " in node or (left and not died and not node))
    if len(error) > CHARACTERS:
        error = f"{error[:CHARACTERS].rpartition(' ')[0] or error[:CHARACTERS]} …"
    node = "" if by_no_node else node or (died[1] if died else "")
    return LastWords(path, error + place, lacked, node, by_no_node, bool(SCANCEL.search(said)))


def _place(said: list[str]) -> str:
    """Where in this project's code the exception was raised that `said` ends with, as " (FILE, line N)"; "" if that is
    no exception, or of other code."""
    *before, error = said
    for line in reversed(before) if not re.match(r"\d{4}-\S+Z ", error) else ():
        if line.startswith("Traceback ("):
            break
        if found := FRAME.match(line):
            return f" ({found[1]}, line {found[2]})"
    return ""
