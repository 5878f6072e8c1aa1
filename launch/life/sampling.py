"""A life that makes shards of a sample set, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpm.config.schema import Config
from ddpm.errors import DoNotRetry, RunBusy, Stopped
from ddpm.run.log import say
from ddpm.sampling.request import Request, shard_range
from launch.cluster import code
from launch.life import devices
from launch.life.life import Life
from launch.life.pace import Pace
from launch.life.starting import request_of

if TYPE_CHECKING:
    from ddpm.sampling.denoiser import Denoiser
    from ddpm.scoring.bound_request import BoundRequest


def sample(life: Life, set_name: str, shards: list[int]) -> int:
    """Make the missing ones of `shards`; in a chain the first job also publishes the set's request. Returns the exit
    code."""
    run, env = life.run, life.env
    config, request = request_of(life, set_name)
    sample_set = run.sample_set(set_name)
    for shard in shards:
        if not 0 <= shard < request.shards:
            raise DoNotRetry(f"shard {shard} of {set_name}: it has shards 0 to {request.shards - 1}")
    life.heed_stop()

    from ddpm.sampling.generate import generate_shard

    denoiser = denoiser_of(life, set_name, config, request)
    todo, pace = list(shards), Pace()
    sizes = {shard: shard_range(request.num_samples, request.shards, shard)[1] for shard in shards}

    def told(done: int, total: int) -> None:
        of_all = sum(sizes.values())
        before = of_all - sum(sizes[shard] for shard in todo)
        say(f"shard {todo[0]}", images=f"{done}/{total}", **pace.told(before + done, of_all))

    busy: RunBusy | None = None
    while todo:
        shard = todo[0]
        try:
            manifest = generate_shard(
                sample_set,
                request,
                shard,
                denoiser,
                stop_requested=life.stop,
                progress=told,
                token=env.token,
                code=code.digest(code.of_checkout()),
            )
        except Stopped as e:
            say("stopped; finished batches are kept", reason=e.reason, shard=shard)
            answer = life.until_killed_or_on(e.reason)
            if answer is None:
                continue
            return life.leave(answer, e.reason)
        except RunBusy as e:  # a twin makes this one; the others are ours all the same
            say(str(e))
            busy = e
        else:
            sha256 = manifest["sha256"][:12]
            say("shard done", shard=f"{shard}/{request.shards}", images=manifest["num"], sha256=sha256)
        todo.pop(0)
    if busy is not None:
        raise busy
    return life.leave(0)


def denoiser_of(life: Life, set_name: str, config: Config, request: Request | BoundRequest) -> Denoiser:
    """The request's network on this job's device. Raises NodeUnfit, DamagedFile; DoNotRetry if its checkpoint is gone
    or another one."""
    import torch

    from ddpm.network.device import threads_of
    from ddpm.network.weights import cast_once, load_network
    from ddpm.run import generations
    from ddpm.sampling.denoiser import Denoiser

    run, env = life.run, life.env
    other = f"python launch/sample.py {run.quoted} --set OTHER"
    if not isinstance(request, Request):
        other = f"python launch/evaluate.py {run.quoted} --bits-per-dim --step STEP"
    torch.set_num_threads(threads_of(config, config.sample.batch, env.cpus))
    device = devices.one_device(env)
    devices.check_precision(env, device, request.precision)
    try:
        generation = generations.verify(run, request.checkpoint.step)
    except FileNotFoundError:
        raise DoNotRetry(
            f"the checkpoint of step {request.checkpoint.step} that {set_name} is of is gone: bring it back, or "
            f"take another one: {other}"
        ) from None
    if generation.sha256 != request.checkpoint.sha256:
        raise DoNotRetry(
            f"{run.checkpoint(generation.step).name} is not the one that {set_name} was begun with; "
            f"take another: {other}"
        )
    network = load_network(config, run, generation.step, request.weights, device, request.precision)
    cast_once(network, request.precision)
    return Denoiser.of(config, network, request.precision)
