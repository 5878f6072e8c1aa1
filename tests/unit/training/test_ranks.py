"""ddpm/training/ranks.py: what ranks know of each other, one alone as well as two."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ddpm.errors import DDPMError, RequestError
from ddpm.training.ranks import World
from tests.training import ALONE, on_ranks


def know_each_other(world: World, there: Path) -> None:
    rank, last = world.rank, world.world_size - 1
    assert world.agree([rank, -rank]) == world.agree_later([rank, -rank])() == [last, 0]
    assert world.broadcast({"of": rank}) == {"of": 0} and world.all_of({"of": rank}) == [
        {"of": r} for r in range(last + 1)
    ]
    assert world.sum(torch.tensor(rank + 1.0)) == sum(range(1, last + 2))
    assert world.mean(torch.tensor(float(rank))) == last / 2
    assert world.gather(torch.tensor(rank + 3.0)).tolist() == [r + 3.0 for r in range(last + 1)]
    assert world.agreed_stop(lambda: "time_limit" if rank == last else None) == "time_limit"
    assert world.agreed_stop(lambda: None) == ""

    def refuse() -> None:
        assert rank == 0, "rank 0 finds out for all"
        raise RequestError("no such run")

    with pytest.raises(DDPMError, match="no such run"):
        world.of_main(refuse)
    assert world.of_main(lambda: rank) == 0
    if rank == last:
        time.sleep(0.5)  # the others would be past it by then
        there.touch()
    world.barrier()
    assert there.exists()


def test_one_rank_alone_agrees_with_itself(tmp_path: Path) -> None:
    know_each_other(ALONE, tmp_path / "there")


def test_ranks_agree_and_wait_for_each_other(tmp_path: Path) -> None:
    on_ranks(3, know_each_other, tmp_path / "there")
