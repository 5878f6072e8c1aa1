"""How many images a rank can hold at a time: tried out, where nobody has said, and where what was said does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import torch

from ddpm.config.train import divisors
from ddpm.errors import DoNotRetry
from ddpm.training.ranks import World
from ddpm.training.step import Step

T = TypeVar("T")

NOT_ONE = "not one image fits here: take a smaller network, or a GPU with more memory"


def fit(step: Step) -> int:
    """The largest part of a rank's share that fits on all ranks; the step takes it from here on. On all ranks.

    Where memory is not a GPU's it is the whole share. Raises DoNotRetry where nothing fits.
    """
    if step.world.device.type == "cuda":
        found = largest(divisors(step.share)[::-1], step.try_out, step.world)
        if found is None:
            raise DoNotRetry(NOT_ONE)
        step.micro = found
    return step.micro


def largest(sizes: Iterable[int], trial: Callable[[int], None], world: World) -> int | None:
    """The first of `sizes` whose trial has memory enough on every rank; None where none has.

    sizes: falling, the same on all ranks. trial: of so many images; raises torch.OutOfMemoryError.
    """
    for size in sizes:
        failed = 0
        try:
            trial(size)
        except torch.OutOfMemoryError:
            failed = 1
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        if not world.agree([failed])[0]:
            return size
    return None


def first(step: Step, work: Callable[[], T]) -> T:
    """A life's first step, or its warming up. Raises DoNotRetry, with what does, where its images do not fit."""
    try:
        return work()
    except torch.OutOfMemoryError as e:
        why = str(e).partition("\n")[0]
    step.state.optimizer.zero_grad(set_to_none=True)
    smaller = [size for size in divisors(step.share)[::-1] if size < step.micro]
    alone = replace(step.world, rank=0, world_size=1)  # the others are in their own first step
    fits = largest(smaller, step.try_out, alone)
    instead = NOT_ONE if fits is None else f"{fits} do: use train.micro_batch={fits}, or auto, which changes no step"
    raise DoNotRetry(f"{step.micro} images at a time on each rank do not fit here ({why}); {instead}")
