"""A life that makes one shard of a sample set."""

from __future__ import annotations

from ddpm.config import reading
from ddpm.errors import DoNotRetry, Stopped
from ddpm.run.log import say
from launch.life import devices
from launch.life.life import Life
from launch.queue.sets import ensure_request


def sample(life: Life, set_name: str, shard: int) -> int:
    """One shard of a set; publishes the set's request first where a chained job is the first to come by."""
    import torch

    from ddpm.network.weights import load_network
    from ddpm.run import generations
    from ddpm.sampling.denoiser import Denoiser
    from ddpm.sampling.generate import generate_shard

    run, env = life.run, life.env
    config = reading.of_run(run)
    sample_set = run.sample_set(set_name)
    request = ensure_request(run, config, set_name)
    if not 0 <= shard < request.shards:
        raise DoNotRetry(f"shard {shard} of {set_name}: it has shards 0 to {request.shards - 1}")
    life.stop.watch(run.stop_file)
    torch.set_num_threads(env.cpus)
    device = devices.one_device(env)
    try:
        generation = generations.verify(run, request.checkpoint.step)
    except FileNotFoundError:
        raise DoNotRetry(f"the checkpoint of step {request.checkpoint.step} that {set_name} samples is gone") from None
    if generation.sha256 != request.checkpoint.sha256:
        raise DoNotRetry(
            f"{run.checkpoint(generation.step).name} is not the one that {set_name} was begun with; "
            f"sample into another set: python launch/sample.py {run.path} --set OTHER"
        )
    network = load_network(config, run, generation.step, request.weights, device, request.precision)
    denoiser = Denoiser.of(config, network, request.precision)
    while True:
        try:
            manifest = generate_shard(
                sample_set,
                request,
                shard,
                denoiser,
                stop_requested=life.stop,
                progress=lambda done, total: say(f"shard {shard}", images=f"{done}/{total}"),
                token=f"{env.job}.{env.restart}",
            )
        except Stopped as e:
            say("stopped; finished batches are kept", reason=e.reason, shard=shard)
            code = life.until_killed_or_on(e.reason)
            if code is None:
                continue
            return life.leave(code, e.reason)
        say("shard done", shard=f"{shard}/{request.shards}", images=manifest["num"], sha256=manifest["sha256"][:12])
        return life.leave(0)
