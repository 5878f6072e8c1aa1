"""A first site profile, of what was seen."""

from __future__ import annotations

import json

from launch.cluster import inquiry, scheduler
from launch.cluster.settling import settle
from launch.cluster.site import Site
from launch.cluster.values import slurm_minutes, written

TOLD = ("cluster", "partition", "account", "time", "gpus_per_node")
"""Keys with a line of their own, or none."""


def draft(site: Site) -> str:
    """The text of a profile: what is asked for, and what else is known of the site."""
    asked = site.model_dump(mode="json", exclude_defaults=True)
    site = settle(site, dry_run=False)
    there = scheduler.partitions()
    name = site.partition or next((n for n, p in there.items() if p.is_default), None)
    lines = ["# Drafted by launch/doctor.py from what this cluster says; configs/cluster/example.yaml has the rest."]
    lines += [f"partition: {name}"] if name else ["# partition:"]
    accounts = [site.account] if site.account else inquiry.accounts()
    if accounts:
        lines.append(f"account: {accounts[0]}" if len(accounts) == 1 else f"# account: one of {', '.join(accounts)}")
    limit = there[name].time_limit if name in there else None
    most = slurm_minutes(limit) if limit else 24 * 60
    time = written(site.time or min(most, 4 * 60))
    lines.append(f"time: {time}                  # of one job; the run comes back until it is done")
    lines.append(f"gpus_per_node: {site.gpus_per_node}")
    rest = ((key, value) for key, value in asked.items() if key not in TOLD)
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in rest]  # JSON is YAML
    if not site.setup:
        lines.append("# setup: ['module load cuda']")
    return "\n".join(lines) + "\n"
