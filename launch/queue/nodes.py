"""Nodes on which lives of a run died by themselves, and whether a job can do without them."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from ddpm.run.events import read_events
from ddpm.run.files import seconds
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.cluster.environment import default_partition
from launch.cluster.job import Job
from launch.cluster.site import NO_NODE
from launch.queue import work
from launch.queue.waiting import of_this_cluster

MENDED_AFTER_S = 7 * 86_400
"""After this time without being tried a node counts as mended."""

OF_LIVES = ("submitted", "allocated", "started", "resumed", "requeued", "finished", "failed")
SETUP = re.compile(
    r"setup failed on \S+?(?: \(exit code (\d+)\))?: "
    r"(?:it ended the job's shell .*?, at the line: |no whole command: )?(.+)"
)
"""A life's last error where a line of the site profile's `setup` failed: its exit code, and the line."""
NO_PYTHON = re.compile(r"(.+) does not run on node \S+")
"""Why the batch shell put a job back by itself (slurm/supervise.sh)."""
NOT_FOUND = "127"
MISTAKE = re.compile(r"(?:Name|UnboundLocal|Attribute|Type|Key|Index|NotImplemented)Error\b")
"""A last error by a mistake of the code. Not what a file system that is away causes too, as a failed import."""


def may_do_without(node: str, total: int, spare: list[str], needed: int) -> bool:
    """Whether enough nodes of a partition are left without `node`: as many as are needed, and half of all (`total`)."""
    left = len([other for other in spare if other != node])
    return node in spare and left >= max(needed, total // 2)


def setup_line(event: dict[str, Any]) -> tuple[str, str]:
    """Exit code and line of the `setup` by which a life died; ("", "") where it died of something else."""
    found = SETUP.search(str(event.get("error", "")))
    return (found[1] or "", found[2].strip()) if found else ("", "")


def by_the_profile(events: Sequence[dict[str, Any]], this: dict[str, Any]) -> bool:
    """Whether the life that `this` event tells of died by the site's fault, and not by its node's: a `setup` line is no
    command, or failed on two nodes, or on neither of two is the Python that was to run."""
    code, line = setup_line(this)
    python = _no_python(this)
    same = [e for e in (*events, this) if (setup_line(e)[1] == line if line else python and _no_python(e) == python)]
    return code == NOT_FOUND or len({e["bad_node"] for e in same if e.get("bad_node")}) > 1


def _no_python(event: dict[str, Any]) -> str:
    found = NO_PYTHON.match(str(event.get("reason", "")))
    return found[1] if found else ""


def why_died(run: RunDir, events: Sequence[dict[str, Any]]) -> str | None:
    """Why the last life ended that died by itself, while none has begun since and its job waits to."""
    last: dict[str, Any] = next((e for e in reversed(events) if e["event"] in OF_LIVES), {})
    if not last.get("bad_node") and not last.get("error"):
        return None
    where = f" on node {last['bad_node']}" if last.get("bad_node") else ""
    why = last.get("error") or last.get("reason")
    mend = f"; mend the site profile's `setup`, then {work.to_end(run)}, and submit again with --profile"
    of_setup = setup_line(last)[1] and by_the_profile(events, last)
    return f"its last life died{where}: {why}{mend if of_setup else ''}"


def bad_nodes(run: RunDir, setup: Sequence[str] | None = None) -> list[str]:
    """Nodes on which lives of the run died by themselves lately, by its events; [] if they cannot be read. Not those
    where what failed is the site profile's, a line that is not in `setup` any more, or the code, elsewhere too."""
    events = []
    with contextlib.suppress(OSError):
        events = of_this_cluster(read_events(run))
    failed = {str(e.get("last_error")) for e in events if e["event"] == "failed"}
    mistakes = {error for error in failed if MISTAKE.match(error)}
    lately = [e for e in events if e.get("bad_node") and time.time() - seconds(e["time"]) < MENDED_AFTER_S]

    def counts(event: dict[str, Any]) -> bool:
        _, line = setup_line(event)
        gone = bool(line) and setup is not None and not any(line in lines for lines in setup)
        return not gone and event.get("error") not in mistakes and not by_the_profile(lately, event)

    return list(dict.fromkeys(e["bad_node"] for e in lately if counts(e)))


def to_avoid(job: Job) -> tuple[str, ...]:
    """Nodes to exclude from a new job of the run, beside those that its site excludes.

    () if SLURM or the events cannot be asked, if the job names the nodes that it wants, or with --exclude none.
    """
    bad, options = bad_nodes(job.run, job.site.setup), job.options()
    if not bad or "nodelist" in options or job.site.at(job.stage).exclude == NO_NODE:
        return ()
    site = job.site.at(job.stage)
    try:
        default = "" if site.partition else next((p.name for p in scheduler.partitions().values() if p.is_default), "")
        partition = (site.partition or default_partition() or default).split(",")[0]
        total, spare = scheduler.spare_nodes(partition, str(options.get("exclude", "")))
    except scheduler.SchedulerError:
        return ()
    found: list[str] = []
    for node in bad:
        if may_do_without(node, total, spare, site.nodes):
            spare.remove(node)
            found.append(node)
    if found:
        with contextlib.suppress(OSError):  # nobody may read it
            print(f"{job.stage} job without node {', '.join(found)}: a life of the run died there by itself within a "
                  f"week (--exclude {NO_NODE} lets it have them all)", file=sys.stderr, flush=True)  # fmt: skip
    return tuple(found)
