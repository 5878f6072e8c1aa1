"""Ranks of several, on one GPU: two that exchange their gradients over gloo, as NCCL lets no two share a GPU; and one
alone, whose collectives are NCCL's all the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddpm.run import generations
from ddpm.training import ranks
from ddpm.training.ranks import World
from ddpm.training.replay import Exchange
from ddpm.training.step import Step
from ddpm.training.trainer import Trainer
from tests.gpu.test_training import CALM, column
from tests.training import Life, differences, joined, make_config, make_images, make_run, on_ranks

TOTAL = 30
CHANGES: dict[str, Any] = {**CALM, "model__base_channels": 32, "model__dropout": 0.1, "train__deterministic": True}
WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"train__amp": "bf16"},
    "fp16": {"train__amp": "fp16", "train__micro_batch": 1},  # two micro-batches on each rank
}


def live(
    path: Path, world: World, way: str, before_resume: Callable[[Trainer], None] = lambda trainer: None
) -> Trainer:
    config, images = make_config(**CHANGES, **WAYS[way]), make_images(50)
    with Life(config, make_run(path), world=world, images=images, before_resume=before_resume) as life:
        assert life.train().finished
        assert life.trainer.resolved.kernels == "own" and life.trainer.step.own is not None
    return life.trainer


def by_gloo(*arguments: Any) -> None:
    ranks.BACKENDS["cuda"] = "gloo"
    joined(*arguments)


def live_twice(world: World, path: Path) -> None:
    """Once all steps are replayed, once rank 1 finds no memory for that."""
    assert world.device.type == "cuda"
    move = Step.move

    def move_without_room(self: Step, *arguments: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("of a second copy")
        return move(self, *arguments)

    for way in WAYS:
        for name in ("replayed", "in part"):
            fails = name == "in part" and not world.is_main
            Step.move = move_without_room if fails else move  # type: ignore[method-assign]
            trainer = live(path / f"{name} {way}", world, way)
            assert (trainer.step._replay is None) is fails and trainer.step.exchange is not None
            weights = torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()]).cpu()
            told = world.all_of(weights.numpy().tobytes())
            assert all(one == told[0] for one in told), "weights have come apart"


def test_two_ranks_on_one_gpu_learn_what_one_learns_and_one_that_cannot_record_costs_no_bit(
    device: torch.device, tmp_path: Path
) -> None:
    on_ranks(2, live_twice, tmp_path, join=by_gloo, start="spawn")
    for way in WAYS:
        both, in_part, one = (make_run(tmp_path / f"{name} {way}") for name in ("replayed", "in part", "alone"))
        live(one.path, World(0, 1, device), way)
        assert differences(generations.load(both, TOTAL), generations.load(in_part, TOTAL)) == []
        assert column(both) == column(in_part)
        # the same images, timesteps, noise and masks: what differs is rounding, as between a GPU and a CPU
        assert column(both) == pytest.approx(column(one), rel=0.01)
        assert column(both, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=0.05)


class OfOne(World):
    """A rank alone that asks its group all the same."""

    def agree_later(self, values: list[int]) -> Callable[[], list[int]]:
        t = torch.tensor(values)
        work = dist.all_reduce(t, op=dist.ReduceOp.MAX, async_op=True)
        return lambda: (work.wait(), t.tolist())[1]

    def agree(self, values: list[int]) -> list[int]:
        return self.agree_later(values)()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values


def by_nccl(rank: int, world_size: int, port: int, timeout_s: float, work: Callable[..., None], *args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"  # this machine may have no other
    world = OfOne(rank, world_size, torch.device("cuda", 0))
    torch.cuda.set_device(world.device)
    dist.init_process_group(
        ranks.BACKENDS["cuda"], init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    work(world, *args)
    ranks.leave()


def live_by_the_group(world: World, path: Path) -> None:
    def exchange(trainer: Trainer) -> None:
        trainer.step.exchange = Exchange(trainer.state.model.parameters(), world)
        trainer.step.exchange()

    for name, replays in (("replayed", True), ("kernel by kernel", False)):
        if not replays:
            Step.replays = False  # type: ignore[method-assign,assignment]
        trainer = live(path / name, world, "bf16", exchange)
        assert (trainer.step._replay is not None) is replays


def test_a_rank_of_several_replays_its_two_recordings_beside_nccl_with_the_bits_of_one_alone(
    device: torch.device, tmp_path: Path
) -> None:
    on_ranks(1, live_by_the_group, tmp_path, join=by_nccl, start="spawn")
    live(tmp_path / "alone", World(0, 1, device), "bf16")
    ends = [generations.load(make_run(tmp_path / name), TOTAL) for name in ("alone", "replayed", "kernel by kernel")]
    assert differences(ends[0], ends[1]) == [] and differences(ends[1], ends[2]) == []
