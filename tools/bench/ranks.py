"""Two ranks of one thread each, over gloo on this machine, beside one: round by round in the same processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ddpm.training import ranks
from ddpm.training.ranks import World
from tools.bench import die_with_parent
from tools.bench.figures import Figure, Result, ratio
from tools.bench.measure import Bench
from tools.bench.workloads import own_step, trainer_of

LIMIT_S = 300


def _rank(*arguments: Any) -> None:
    die_with_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else ranks would take the GPU, where there is one
    with contextlib.redirect_stdout(sys.stderr):  # what trainers tell is no part of the table
        _measure(*arguments)


def _measure(rank: int, port: int, bench: Bench, batch: int, rounds: int, out: Path) -> None:
    here = {"master_addr": "127.0.0.1", "master_port": port, "timeout_s": LIMIT_S}
    world = ranks.join(rank=rank, world_size=2, local_rank=rank, **here)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {"one": [], "two": [], "agreement": []}
    with trainer_of(bench, f"train.global_batch={2 * batch}", world=world, threads=1) as both:
        both.warm_up(lambda: None)
        with trainer_of(bench, f"train.global_batch={batch}", world=World(0, 1, bench.device), threads=1) as alone:
            single, double = own_step(alone), own_step(both)
            single(), double()
            for i in range(rounds):
                if world.agree([int(i > 0 and time.monotonic() > bench.ends)])[0]:
                    break
                if world.is_main:  # the other one waits
                    found["one"].append(bench.once(single))
                world.barrier()
                found["two"].append(bench.once(double))
                found["agreement"].append(_agreement(world))
    if world.is_main:
        out.write_text(json.dumps(found))
    ranks.leave()


def _agreement(world: World) -> float:
    """Seconds that asking takes, and hearing the answer a step of 5 ms later."""
    began = time.perf_counter()
    asked = world.agree_later([0, 0, 0])
    begun = time.perf_counter()
    time.sleep(0.005)
    waits = time.perf_counter()
    asked()
    return time.perf_counter() - waits + begun - began


def row(bench: Bench) -> Result:
    batch, rounds = bench.pick(gpu=2, cpu=2, small=1), bench.pick(gpu=7, cpu=7, small=2)
    cpu = Bench(torch.device("cpu"), bench.small, bench.ends)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as where:
        out = Path(where) / "times.json"
        processes = [context.Process(target=_rank, args=(r, port, cpu, batch, rounds, out)) for r in range(2)]
        for p in processes:
            p.start()
        ends = time.monotonic() + LIMIT_S
        for p in processes:
            p.join(max(0.0, ends - time.monotonic()))
        for p in processes:
            p.kill()
        if not out.exists():
            raise RuntimeError(f"ranks left with {[p.exitcode for p in processes]}")
        found: dict[str, Any] = json.loads(out.read_text())
    goal = cpu.goal(cpu=0.85)
    return Result([
        Figure(f"one rank, batch {batch}", batch / statistics.median(found["one"]), "images/s"),
        ratio("two ranks to twice one", found["one"], found["two"], at_least=goal),
        Figure("their agreement after a step", statistics.median(found["agreement"]) * 1e3, "ms"),
    ])  # fmt: skip
