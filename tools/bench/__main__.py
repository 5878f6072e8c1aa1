"""What this project does on this machine, beside its limits, its peers and its goals.

    python -m tools.bench                              all rows for this machine, in ten minutes
    python -m tools.bench training scores --json F     some of them, kept
    python -m tools.bench --against F                  beside what an earlier call kept

Peers are taken in turns with ours in one process; a ratio is the median of its pairs, with its 95 % interval. Exit
code: 1 where a goal is missed or a row failed, 0 else; a row for which there was no time is named.
"""

from __future__ import annotations

import launch.first  # noqa: F401

# isort: split
import argparse
import contextlib
import json
import math
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm.network.device import keep_freed_memory
from ddpm.run.files import read_json, write_json
from launch.cluster import environment
from launch.terminal import console
from tools.bench import checkpoint, commands, feed, machine, ranks, sampling, scores, starting, training
from tools.bench.figures import HEAD, Result, lines
from tools.bench.measure import Bench


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    run: Callable[[Bench], Result]
    on: str = "cpu cuda"
    """Where it is run unasked."""


def _loop(batch: int, *overrides: str, goal: float | None = None, **options: Any) -> Callable[[Bench], Result]:
    """A row of the trainer's loop: at `batch` on a GPU, rehearsed with 4 images elsewhere."""

    def run(bench: Bench) -> Result:
        eager = () if bench.gpu else (training.EAGER,)
        return training.loop(bench, batch if bench.gpu else 4, *eager, *overrides, goal=bench.goal(gpu=goal), **options)

    return run


ROWS = (
    Row("peaks", "this machine's, and the roofline from them", machine.row),
    Row("loop", "the trainer's loop at batch 128", _loop(128, profile=True, goal=6000)),
    Row("training", "a step beside those of others", training.against_others),
    Row("network", "an evaluation and DDIM beside diffusers'", sampling.against_diffusers),
    Row("parts", "of a step: time, operations, launches, waits", training.parts),
    Row("sampler", "operations of its steps beside the network", sampling.beside_the_network),
    Row("frechet", "the distance at 2048 beside pytorch-fid's", scores.frechet),
    Row("inception", "features beside pytorch-fid's", scores.inception),
    Row("checkpoint", "what training waits for, and reading one", checkpoint.row),
    Row("feed", "batches beside an ImageFolder's", feed.row),
    Row("start", "from a job's start to its first step", starting.start),
    Row("ranks", "two beside twice one", ranks.row, "cpu"),
    Row("compile", "a small network's, cold and kept", starting.compiling),
    Row("command", "400 PNGs to their distance, whole, beside pytorch-fid's", commands.row, "cpu"),
    Row("batch-512", "the loop", _loop(512, goal=7600), "cuda"),
    Row("batch-16", "the loop", _loop(16, goal=3500), "cuda"),
    Row("deterministic", "what it costs the loop", training.determinism, "cuda"),
    Row("kernel-by-kernel", "the loop, nothing replayed", _loop(128, replayed=False), "cuda"),
    Row("compiled", "the loop by torch.compile", _loop(128, "train.compile=true", profile=True), "cuda"),
    Row("batch-1024", "the loop", _loop(1024), "cuda"),
    Row("recipes", "the loop of every other recipe", training.recipes, "cuda"),
    Row("sampling-compiled", "DDIM by torch.compile", sampling.compiled, "cuda"),
)
"""All rows, the most important first: those for which there is no time are named, and left out."""
QUICK = ("peaks", "loop", "training", "network", "inception", "checkpoint")


def run_row(row: Row, bench: Bench) -> Result:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a trainer tells is no part of the table
            return row.run(bench)
    except ImportError as e:
        return Result(notes=[f"not run: {e}"])
    except Exception as e:
        traceback.print_exc()
        return Result(notes=[f"failed: {type(e).__name__}: {e}"])


def about(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {_isa()}"
    return {"device": device.type, "name": name, "torch": torch.__version__, "cuda": torch.version.cuda,
            "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}  # fmt: skip


def _isa() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _keep(record: dict[str, Any], path: Path | None) -> None:
    """Write the record whole or not at all: neither a kill nor a full disk takes what was kept before."""
    if path is None:
        return
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout
        path.write_text(json.dumps(record, indent=1) + "\n")
    else:
        write_json(path.resolve(), record, replace=True)


def _is_record(kept: dict[str, Any]) -> bool:
    """Whether this is what `_keep` has written."""
    rows = kept.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        return False
    figures = [row.get("figures") for row in rows.values()]
    if not all(isinstance(of_row, dict) for of_row in figures):
        return False
    values = [figure.get("value") if isinstance(figure, dict) else None for row in figures for figure in row.values()]
    return all(isinstance(value, int | float) for value in values)


def run_rows(
    chosen: Sequence[Row],
    args: argparse.Namespace,
    device: torch.device,
    record: dict[str, Any],
    before: dict[str, Any],
) -> bool:
    """Run rows one after another, within args.minutes; each is printed, and kept in `record` and the file for it.
    Returns whether none failed, and none missed its goal. before: an earlier call's figures, shown beside."""
    print(HEAD, flush=True)
    ends, good = time.monotonic() + args.minutes * 60, True
    for i, row in enumerate(chosen):
        began = time.monotonic()
        if began > ends:
            print(f"no time left: {', '.join(r.name for r in chosen[i:])}")
            break
        share = (ends - began) / min(3, len(chosen) - i)  # the last one has all that is left
        bench = Bench(device, args.small, min(ends, began + max(20.0, share)))
        result = run_row(row, bench)
        good = good and not result.failed and not any(f.missed for f in result.figures)
        record["rows"][row.name] = {**result.as_record(), "took_s": time.monotonic() - began}
        then = before["rows"].get(row.name, {}).get("figures")
        print("\n".join(lines(f"{row.name} ({time.monotonic() - began:.0f} s)", result, then)), flush=True)
        try:
            _keep(record, args.json)
        except OSError as e:  # the next row may find room
            print(f"--json {args.json}: {e.strerror}; it has the rows before", flush=True)
            good = False
        if bench.gpu:
            torch.cuda.empty_cache()
    return good


def main() -> int:
    rows = {row.name: row for row in ROWS}
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="rows:\n" + "\n".join(f"  {r.name:20}{r.what}" for r in ROWS))  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows (default: all; quick: {', '.join(QUICK)})")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10, help="no row is begun after them (default: 10)")
    parser.add_argument(
        "--json", type=Path, metavar="F", help="keep this call's figures here, rewritten after each row"
    )
    parser.add_argument("--against", type=Path, metavar="F", help="what --json kept: shown beside")
    parser.add_argument("--small", action="store_true", help="a quarter of the width, one round: a rehearsal, no goals")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    names = [name for asked in args.names for name in (QUICK if asked == "quick" else [asked])]
    if unknown := [name for name in names if name not in rows]:
        parser.error(f"no row {', '.join(unknown)}; there are: {', '.join(rows)}")
    if not 0 <= args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes:g}: give a number from 0 on")
    before = read_json(args.against) if args.against else {"rows": {}}
    if before is None or not _is_record(before):
        parser.error(f"--against {args.against}: not what --json keeps, or not there")
    if args.json is not None:
        console.check_outside_runs(args.json, "--json")
        if args.json.is_file() and args.json.stat().st_size and not _is_record(read_json(args.json) or {}):
            parser.error(f"--json {args.json}: exists, and is not what --json has kept; name another file")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what a row has started is then ended too
    device = torch.device(args.device)
    environment.prepare_cublas()  # as jobs do
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else jobs and commands that are measured would take a GPU
        keep_freed_memory()  # as jobs do; here the others have it too
    chosen = [rows[name] for name in names] or [row for row in ROWS if args.device in row.on]
    record: dict[str, Any] = {**about(device), "small": args.small, "rows": {}}
    try:
        _keep(record, args.json)
    except OSError as e:
        parser.error(f"--json {args.json}: {e.strerror}; give a file in a folder that is there and can be written")
    print(" ".join(f"{k}={v}" for k, v in record.items() if k != "rows"))
    if args.against and not {row.name for row in chosen} & before["rows"].keys():
        print(f"--against has none of these rows: {', '.join(before['rows']) or 'none at all'}")
    if args.against and (before.get("name"), before.get("small")) != (record["name"], record["small"]):
        print(f"--against is of another machine or size: {before.get('name')}, small={before.get('small')}")
    return int(not run_rows(chosen, args, device, record, before))


if __name__ == "__main__":
    console.run_script(main)
