"""A life that computes bits per dimension, alone or as one of several tasks that share its parts. Loads torch."""

from __future__ import annotations

from typing import Any

from ddpm.config import reading
from ddpm.data.packed import PackedImages
from ddpm.run.log import say
from ddpm.scoring import bound_request
from ddpm.scoring.against import open_reference
from ddpm.scoring.likelihood import bits_per_dim
from ddpm.scoring.record import told as told_of
from launch.life.life import Life
from launch.life.pace import shown
from launch.life.sampling import denoiser_of
from launch.life.showing import show_score


def evaluate(life: Life, name: str) -> int:
    """Compute what bits-per-dim/NAME/request.json asks for; an array's first task merges the parts. Returns the exit
    code."""
    run = life.run
    config = reading.of_run(run)
    request = bound_request.read(run.bound_set(name))
    life.heed_stop()
    command = ["python", "launch/evaluate.py", str(run.path), "--bits-per-dim", "--reference", request.split]
    command += ["--step", str(request.checkpoint.step)]
    command += [] if request.num_images is None else ["--num-images", str(request.num_images)]
    show = shown("bits per dimension")

    def compute() -> dict[str, Any]:
        images = open_reference(run, config, request.split, life.stop)
        assert isinstance(images, PackedImages)  # of a split
        return bits_per_dim(
            run,
            request,
            images,
            lambda: denoiser_of(life, name, config, request),
            timesteps=config.diffusion.timesteps,
            num_classes=config.model.num_classes,
            command=command,
            progress=show,
            worker=life.worker,
        )

    result = life.result_of(compute)
    if isinstance(result, int):
        return result
    show_score(run, config, result)
    say(f"computed {told_of(result)}")
    return life.leave(0)
