from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm import data
from ddpm.errors import NodeUnfit, Stopped
from ddpm.training.ranks import World
from launch import environment, jobs
from launch.jobs import Life, _compiling
from tests.training import make_config, on_ranks


def test_what_a_life_compiled_is_kept_once_it_got_past_that_and_dropped_where_it_did_not(tmp_path: Path) -> None:
    kernels, world = tmp_path / "run.v2", World(0, 1, torch.device("cpu"))
    library = kernels / "ab" / "kernel.so"

    with _compiling(kernels, world, True):
        library.parent.mkdir(parents=True)
        library.write_bytes(b"whole")
    with _compiling(kernels, world, True):
        assert library.read_bytes() == b"whole"

    with pytest.raises(OSError, match="short"), _compiling(kernels, world, True):
        library.write_bytes(b"wh")
        raise OSError("file too short")
    with _compiling(kernels, world, True):
        assert not library.exists()
    assert list(tmp_path.iterdir()) == []


class Packing(Life):
    """What jobs._pack_again asks of a life."""

    def __init__(self, stop: Callable[[], str | None]) -> None:
        self.stop = stop  # type: ignore[assignment]


def pack_on_rank_0(world: World, where: Path, stops: int) -> None:
    def pack(*_: Any, stop_requested: Callable[[], str | None]) -> tuple[str, None]:
        for _ in range(30):
            time.sleep(0.2)
            if reason := stop_requested():
                raise Stopped(reason)
        return "key", None

    data.pack = pack  # type: ignore[assignment]
    asked = iter(range(100))
    life = Packing(lambda: "preempted" if world.rank and next(asked) >= stops else None)
    try:
        answer = jobs._pack_again(life, make_config(), world, where)
    except Stopped as e:
        answer = e.reason
    (where / str(world.rank)).write_text(answer)


@pytest.mark.parametrize(("stops", "answer"), [(99, "key"), (5, "preempted")])
def test_ranks_wait_for_the_one_that_packs_longer_than_they_wait_for_any_other(
    tmp_path: Path, stops: int, answer: str
) -> None:
    on_ranks(2, pack_on_rank_0, tmp_path, stops, timeout_s=4)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [answer, answer]


def test_a_job_that_was_given_a_gpu_does_not_go_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    monkeypatch.setattr(jobs, "NVIDIA_GPUS", tmp_path)
    cpu = torch.device("cpu")
    jobs._check_device(environment.current(), cpu)  # given by name only, as on a testbed
    (tmp_path / "0000:01:00.0").mkdir()
    with pytest.raises(NodeUnfit, match="torch cannot use them"):
        jobs._check_device(environment.current(), cpu)
    monkeypatch.delenv("SLURM_STEP_GPUS")
    jobs._check_device(environment.current(), cpu)  # none was asked for
