"""How many images at a time fit a rank: tried out for train.micro_batch=auto, and where a given number does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import torch

from ddpm.config.train import divisors
from ddpm.errors import DDPMError, DoNotRetry, NodeUnfit, lacks_gpu_memory
from ddpm.run.log import amount, counted
from ddpm.training.ranks import World
from ddpm.training.step import Step

T = TypeVar("T")

NOT_ONE = "not one image fits here: take a smaller network, or a GPU with more memory"
OTHERS_SHARE = 4
"""Other processes have the GPU where they have more than this part of its memory: what is not torch's in this process,
as of CUDA and NCCL, is less."""


def fit(step: Step) -> int:
    """Set the step's micro-batch to the largest divisor of a rank's share that fits on all ranks, and return it.

    Called on all ranks. Without a GPU it is the whole share. Raises DoNotRetry if not one image fits, NodeUnfit where
    another node may have room.
    """
    if step.world.device.type == "cuda":
        found = largest(divisors(step.share)[::-1], step.try_out, step.world)
        if found is None:
            lacking = step.world.all_of(_lacking(step, NOT_ONE))
            raise next((e for e in lacking if isinstance(e, NodeUnfit)), lacking[0])  # rank 0's word is the job's
        step.micro = found
    return step.micro


def largest(sizes: Iterable[int], trial: Callable[[int], None], world: World) -> int | None:
    """The first of `sizes` for which no rank runs out of memory; None if there is none.

    sizes: decreasing, the same on all ranks. trial: computes this many images; may find no room for them.
    """
    for size in sizes:
        failed = 0
        try:
            trial(size)
        except RuntimeError as e:
            if not lacks_gpu_memory(e):
                raise
            failed = 1
        free(world.device)
        if not world.agree([failed])[0]:
            return size
    return None


def free(device: torch.device) -> None:
    """Give back what torch keeps of a trial that is over, or of an aside that did not fit beside the steps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first(step: Step, work: Callable[[], T]) -> T:
    """Run `work`, a life's first step or its warm-up. If its images do not fit, raises DoNotRetry that says how many
    do; NodeUnfit where another node may have room."""
    try:
        return work()
    except RuntimeError as e:
        if not lacks_gpu_memory(e):
            raise
        why = str(e).partition("\n")[0]
    step.state.optimizer.zero_grad(set_to_none=True)
    smaller = [size for size in divisors(step.share)[::-1] if size < step.micro]
    alone = replace(step.world, rank=0, world_size=1)  # the others are in their own first step
    fits = largest(smaller, step.try_out, alone)
    auto = "" if step.config.train.micro_batch == "auto" else ", or auto"  # found where there was more memory
    instead = NOT_ONE if fits is None else f"{fits} do: use train.micro_batch={fits}{auto}, which changes no step"
    images = counted(step.micro, "image")
    raise _lacking(step, f"there is no room here for {images} at a time on each rank ({why}); {instead}")


def _lacking(step: Step, told: str) -> DDPMError:
    """DoNotRetry; NodeUnfit where another node may have room: this one's GPU is other processes' too, or the run has
    already taken steps on another."""
    device = step.world.device
    if device.type == "cuda":
        left, total = torch.cuda.mem_get_info(device)
        others = total - left - torch.cuda.memory_reserved(device)
        if others > total // OTHERS_SHARE:
            return NodeUnfit(f"other processes have {amount(others)} of this GPU's {amount(total)}: {told}")
    if step.state.at.step:
        return NodeUnfit(f"{told}. The run has taken {counted(step.state.at.step, 'step')}: another node may have room")
    return DoNotRetry(told)
