"""A first site profile, of what was seen."""

from __future__ import annotations

from launch.cluster import inquiry, scheduler
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.cluster.values import slurm_minutes, written


def draft(site: Site) -> str:
    """Its text."""
    site = settle(site, dry_run=False)
    there = scheduler.partitions()
    name = site.partition or next((n for n, p in there.items() if p.is_default), None)
    lines = ["# Drafted by launch/doctor.py from what this cluster says; configs/cluster/example.yaml has the rest."]
    lines += [f"partition: {name}"] if name else ["# partition:"]
    accounts = inquiry.accounts()
    if accounts:
        lines.append(f"account: {accounts[0]}" if len(accounts) == 1 else f"# account: one of {', '.join(accounts)}")
    limit = there[name].time_limit if name in there else None
    most = slurm_minutes(limit) if limit else 24 * 60
    lines.append(
        f"time: {written(min(most, 4 * 60))}                  # of one job; the run comes back until it is done"
    )
    lines.append(f"gpus_per_node: {site.gpus_per_node}")
    lines.append("# setup: ['module load cuda']")
    return "\n".join(lines) + "\n"
