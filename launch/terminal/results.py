"""What came out of a run whose chain is done, as a table."""

from __future__ import annotations

import shlex
import statistics

from ddpm.config.schema import Config
from ddpm.run.log import plain
from ddpm.run.paths import RunDir
from ddpm.run.records import read_metrics
from ddpm.scoring.record import all_scores, key_of, scores_of, told
from launch.queue.sets import chain_set, of_other_samples, score_by


def print_results(run: RunDir, config: Config, stages: list[str]) -> None:
    """stages: what followed training."""
    step = run.latest_step()
    name = chain_set(run, config)
    score = score_by(run, name, config.evaluate) if "evaluate" in stages else None
    metrics = [m for m in read_metrics(run) if m["step"] <= step]
    rows = {"steps": f"{step}"}
    if metrics:
        rows["images/s"] = f"{statistics.median(m['images_per_s'] for m in metrics):.0f}"
        rows["loss"] = f"{metrics[-1]['loss']:.4f}"
    if score:
        rows["score"] = told(score.record) + ("" if key_of(score.record) == "fid" else ": no FID")
        rows["score file"] = f"{score.path}"
    elif "evaluate" in stages:
        wrong = [s.damage or of_other_samples(run, s) for s in scores_of(run, name)]
        rows["score"] = plain("; ".join(["none that holds", *filter(None, wrong)]))
    for bound in all_scores(run):
        is_here = "bits_per_dim" in bound.record and bound.record["checkpoint"]["step"] == step
        if is_here and not of_other_samples(run, bound):
            rows["likelihood"] = told(bound.record)
    if run.grid(step).exists():
        rows["grid"] = f"{run.grid(step)}"
    rows["all of it"] = plain(shlex.join(["python", "launch/report.py", str(run.path)]))
    print(f"run {run.name} is complete: {step} steps")
    for what, value in rows.items():
        print(f"  {what:18}{value}")
