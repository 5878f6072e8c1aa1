"""Requests for bits per dimension, on a login node: the request, its cost, its publication."""

from __future__ import annotations

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import generations
from ddpm.run.log import counted
from ddpm.run.paths import RunDir
from ddpm.sampling.request import CheckpointRef
from ddpm.scoring import bound_request
from ddpm.scoring.against import SPLITS
from ddpm.scoring.bound_request import BoundRequest
from launch.queue.sets import publish_while_kept


def request_for(
    run: RunDir, config: Config, split: str, step: int | None, num_images: int | None
) -> tuple[BoundRequest, int]:
    """The request, and its number of parts. Raises RequestError for a split, step or number of images that there is
    not."""
    from ddpm.data.packed import open_source

    if split not in SPLITS:
        raise RequestError(f"--reference {split}: bits per dimension are of the run's own data: test, or train")
    source = open_source(config.data)
    if split not in source.members:
        use = " or ".join(f"--reference {member}" for member in sorted(source.members))
        raise RequestError(f"bits per dimension are of the {split} images, and {config.data.name} has none here: {use}")
    there = source.num_images(split)
    if num_images is not None and not 1 <= num_images <= there:
        raise RequestError(f"--num-images {num_images}: must be from 1 to {there:,}, the images to {split} with")
    found = generations.choose(run, step)
    generations.check_mathematics(run.checkpoint(found.step), found.manifest, config.digest())
    at = CheckpointRef(found.step, found.sha256)
    num = None if num_images == there else num_images
    request = bound_request.request_of(run, config, at, split, num)
    return request, -(-(num or there) // request.batch)


def cost(request: BoundRequest, config: Config) -> str:
    """What the request costs, in words."""
    images = (
        "each image"
        if request.num_images is None
        else f"each of {counted(request.num_images, 'image', ',')} (seed {request.seed})"
    )
    return (
        f"{request.name}: {config.diffusion.timesteps:,} evaluations of the network for {images} of "
        f"{request.split}, as ancestral sampling of as many would take"
    )


def publish(run: RunDir, request: BoundRequest) -> None:
    """Publish the request. Raises RequestError where its checkpoint is gone."""
    where = run.bound_set(request.name)
    publish_while_kept(run, where, request.checkpoint.step, lambda: bound_request.publish(where, request))
