"""What came out of a run whose chain is done, as a table."""

from __future__ import annotations

import statistics

from ddpm.config.schema import Config
from ddpm.run.files import read_json
from ddpm.run.paths import RunDir
from ddpm.run.records import read_metrics
from ddpm.scoring.record import SCORE_NAMES, key_of
from launch.queue.sets import chain_set


def print_results(run: RunDir, config: Config, stages: list[str]) -> None:
    """stages: what followed training."""
    step = run.latest_step()
    name = chain_set(run, config)
    record = read_json(run.score(name)) if "evaluate" in stages else None
    metrics = [m for m in read_metrics(run) if m["step"] <= step]
    rows = {"steps": f"{step}"}
    if metrics:
        rows["images/s"] = f"{statistics.median(m['images_per_s'] for m in metrics):.0f}"
        rows["loss"] = f"{metrics[-1]['loss']:.4f}"
    if record:
        key = key_of(record)
        against = " ".join(filter(None, [record["reference"]["name"], record["reference"].get("split")]))
        rows[SCORE_NAMES[key]] = (
            f"{record[key]:.4f} ({record['num_samples']} samples against "
            f"{against}, {record['extractor']['name']} features{'' if key == 'fid' else ': no FID'})"
        )
        rows["score"] = f"{run.score(name)}"
    if run.grid(step).exists():
        rows["grid"] = f"{run.grid(step)}"
    print(f"run {run.name} is complete: {step} steps")
    for what, told in rows.items():
        print(f"  {what:18}{told}")
