"""Runs of every kind, as `overview.describe` has them: for what draws them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from ddpm.run.files import stamp

NOTHING: dict[str, Any] = {
    "name": "run", "path": "/runs/run", "state": "prepared", "step": 0, "saved_step": 0, "total_steps": 800_000,
    "loss": None, "validation_loss": None, "images_per_s": None, "epoch": None, "expected_end": None, "jobs": {},
    "waits": [], "bad_nodes": [], "bad_nodes_error": None, "restarts": 0, "goodput": None, "allocated_s": {},
    "heartbeat_age_s": None, "host": None, "making": None, "stages": {}, "sets": {}, "samples": {}, "scores": {},
    "scores_told": {}, "problem": None,
}  # fmt: skip
PRIORITY = {"job": "1234567", "reason": "Priority", "words": "others are before it", "next_step": "",
            "can_start": True, "held": False, "expected_start": None}  # fmt: skip
TOLD = "FID 3.17, ddim 100, 50,000 vs train"


def row(name: str, **fields: Any) -> dict[str, Any]:
    return {**NOTHING, "name": name, "path": f"/runs/{name}", **fields}


def of_every_kind() -> list[dict[str, Any]]:
    going = {"step": 412_300, "saved_step": 411_900, "loss": 0.02871, "images_per_s": 2231.4, "goodput": 0.972}
    paper, fast = "ddim100-step800000-seed0", "dpmpp_2m20-step800000-seed0"
    set_of = {paper: "64/64", fast: "3/64"}
    held = {**PRIORITY, "reason": "JobHeldUser", "held": True, "words": "its owner holds it",
            "next_step": "scontrol release 1234567"}  # fmt: skip
    return [
        row("cifar10", state="running", **going, restarts=14, jobs={"1234567": "RUNNING", "1234568": "PENDING"},
            expected_end=stamp(datetime.now() + timedelta(days=3, hours=2))),
        row("low-lr", state="queued", jobs={"1234567": "PENDING"}, waits=[PRIORITY]),
        row("a-run-with-a-long-name-of-its-own", state="held", jobs={"1234567": "PENDING"}, waits=[held]),
        row("done", state="complete", step=800_000, saved_step=800_000, loss=0.0281, images_per_s=2230.0, restarts=3,
            goodput=0.991, samples=set_of, scores={paper: {"fid": 3.17}}, scores_told={paper: TOLD, fast: TOLD}),
        row("here", state="running", **going, jobs={"local-20261126T171639-15913": "RUNNING"}),
        row("no-disk", state="running", step=7000, jobs={"1234569": "RUNNING"}, loss=0.031, images_per_s=2200.0,
            problem="nothing was saved since step 0, and what is trained since then is lost if it ends now: 8.0 MiB "
                    "free for a checkpoint of 572 MiB and 16.0 MiB to spare"),
        row("bad", state="failed", step=100, saved_step=100, restarts=3,
            problem="4 lives in a row ended (crash, exit code 1) without progress beyond 100"),
        row("torn", state="unreadable", total_steps=0, problem="config.yaml: Permission denied"),
    ]  # fmt: skip
