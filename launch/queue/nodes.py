"""Nodes on which lives of a run died by themselves, and whether a job can do without them."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from typing import Any

from ddpm.run.events import life_of, read_events
from ddpm.run.files import seconds
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.cluster.environment import default_partition
from launch.cluster.job import Job
from launch.queue.waiting import of_this_cluster

MENDED_AFTER_S = 7 * 86_400
"""After this time without being tried a node counts as mended."""


def may_do_without(node: str, total: int, spare: list[str], needed: int) -> bool:
    """Whether enough nodes of a partition are left without `node`: as many as are needed, and half of all (`total`)."""
    left = len([other for other in spare if other != node])
    return node in spare and left >= max(needed, total // 2)


def bad_nodes(run: RunDir) -> list[str]:
    """Nodes on which lives of the run died by themselves lately, by its events; [] if they cannot be read.

    Not those on which they died in the same words before anything began: what fails on two nodes alike, as a wrong line
    of the profile's `setup`, is not theirs.
    """
    events = []
    with contextlib.suppress(OSError):
        events = of_this_cluster(read_events(run))
    lately = [e for e in events if e.get("bad_node") and time.time() - seconds(e["time"]) < MENDED_AFTER_S]
    began = {life_of(e) for e in events if e["event"] in ("started", "resumed")}
    alike: dict[str, set[str]] = {}
    for e in lately:
        if e.get("error") and life_of(e) not in began:
            alike.setdefault(_of_any_node(e), set()).add(e["bad_node"])
    cleared = {error for error, nodes in alike.items() if len(nodes) > 1}
    blamed = (e for e in lately if life_of(e) in began or _of_any_node(e) not in cleared)
    return list(dict.fromkeys(e["bad_node"] for e in blamed))


def _of_any_node(event: dict[str, Any]) -> str:
    """A life's last error, without the name of its node and without numbers."""
    return re.sub(r"\d+", "0", str(event.get("error") or "").replace(event["bad_node"], "NODE"))


def to_avoid(job: Job) -> tuple[str, ...]:
    """Nodes to exclude from a new job of the run, beside those that its site excludes.

    () if SLURM or the events cannot be asked, or if the job names the nodes that it wants.
    """
    bad, options = bad_nodes(job.run), job.options()
    if not bad or "nodelist" in options:
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
                  f"week (--sbatch nodelist=… asks for one all the same)", file=sys.stderr, flush=True)  # fmt: skip
    return tuple(found)
