"""A life of training on all its ranks: join, lock the run, load the data, train until the end or a stop. Loads torch.

starting.py does what comes before torch.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch

from ddpm.config.schema import Config
from ddpm.errors import DoNotRetry, Stopped
from ddpm.network import device
from ddpm.network.device import Resolved
from ddpm.run.fence import Fence
from ddpm.run.files import sign, write_json
from ddpm.run.log import amount, say
from ddpm.run.paths import RunDir
from ddpm.run.records import read_run
from ddpm.run.saving import SPARE_BYTES, num_bytes
from ddpm.training import ranks
from ddpm.training.ranks import World
from ddpm.training.trainer import Trainer
from launch.cluster import environment, scheduler
from launch.cluster.environment import JobEnvironment
from launch.life import compiled, devices, inputs
from launch.life.life import Life
from launch.life.showing import mirror_of
from launch.queue import work
from launch.queue.chain import nothing_to_train
from launch.queue.directory import site_of
from launch.queue.waiting import mercy_for
from launch.terminal import faults

TRY_TO_SAVE_S = 30

QUEUE_AT_MOST_S = 120.0


def train(life: Life, config: Config, why: str | None) -> int:
    """Train on all ranks; returns the exit code. why: on rank 0, the reason for which there is nothing to train."""
    env = life.env
    devices.one_device(env)  # a rank without one must not let the others wait for it
    site = site_of(life.run)
    timeout_s = site.rank_timeout_s
    if env.is_scheduled and env.world_size > 1:
        _choose_network(site.network_interface, env.master_addr)
    world = ranks.join(
        rank=env.rank,
        world_size=env.world_size,
        local_rank=env.local_rank,
        master_addr=env.master_addr,
        master_port=env.master_port,
        timeout_s=timeout_s,
        host=env.host,
        host_of=environment.hosts_of_ranks,
    )
    with world.heeded():
        return _in_step(life, config, why, world, timeout_s)


def _in_step(life: Life, config: Config, why: str | None, world: World, timeout_s: float) -> int:
    """As `train`, once the ranks have found each other."""
    run, env = life.run, life.env
    devices.check_apart(world, env.host)
    fence = None
    if world.is_main and not why:
        fence = _take(life, wait_s=min(60, timeout_s / 2))
        why = nothing_to_train(run, config)  # whoever held the run until now may have finished it
    if why := world.broadcast(why):
        if world.is_main:
            say(why)
        return _leave_together(life, world, 0)
    while True:
        try:
            packed = inputs.packed_data(life, config, world, fence)
            held_out = inputs.held_out(life, config, world)
            break
        except Stopped as e:
            if (code := life.until_killed_or_on(e.reason, world.broadcast)) is not None:
                return _leave_together(life, world, code, e.reason)
    trainer = Trainer(
        config,
        run,
        world,
        packed,
        _resolved(life, config, world, fence),
        fence=fence,
        owner=env.owner(),
        events=env.events(run) if world.is_main else None,
        start=read_run(run).get("from"),
        held_out=held_out,
        mirror=mirror_of(run, config, life.stop.held),
        on_milestone=lambda: score_milestones(life, config),
    )
    trainer.resume()
    size = num_bytes(trainer.state.state_dict())  # and logs grow, by what a save leaves free for them
    if why := world.broadcast(faults.small_files(size + SPARE_BYTES) if world.is_main else None):
        needs = f"a checkpoint has {amount(size)}, and logs up to {amount(SPARE_BYTES)}"
        raise DoNotRetry(f"{needs}; {why}, then submit again")
    return _until_the_end(life, world, trainer, fence, timeout_s)


def save_patience_s(life: Life, reason: str, rank_timeout_s: float) -> float:
    """Seconds for which a stop may retry its save: as long as the job has time and the other ranks wait."""
    ranks_wait = rank_timeout_s / 2
    if reason != "preempted":  # USR2 comes at least 54 s before the end where 60 were asked for
        return min(ranks_wait, TRY_TO_SAVE_S)
    mercy = mercy_for(life.run, life.env.job)
    return min(ranks_wait, max(mercy.grace_s + mercy.kill_wait_s, 10))


def _choose_network(asked: str | None, rank_0: str) -> None:
    """Set the interface on which gloo listens; NCCL finds its own unless one is given."""
    if asked:
        environment.set_defaults(NCCL_SOCKET_IFNAME=asked)
    if name := asked or environment.interface_of_peers(rank_0):
        environment.set_defaults(GLOO_SOCKET_IFNAME=name)


def _take(life: Life, wait_s: float) -> Fence:
    """Lock the run for this life. Raises RunBusy."""
    return Fence(
        life.run,
        life.env.owner(),
        wait_s=wait_s,
        is_orphan=lambda other: is_orphan(other, life.env),
        how_to_end=work.to_end(life.run),
        log=say,
    )


def is_orphan(other: dict[str, Any], env: JobEnvironment) -> bool:
    """Whether the lock's holder is an earlier life of this job, or a job that SLURM no longer runs."""
    if not env.is_scheduled or not str(other.get("job", ""))[:1].isdigit():
        return False  # a run on this machine is nothing that SLURM knows of
    if env.cluster and other.get("cluster", env.cluster) != env.cluster:
        return False  # nor is another cluster's, whose job may have this one's id
    if other.get("job") == env.job:
        return int(other.get("restart", 0)) < env.restart
    try:
        shown = scheduler.show(str(other["job"]))
        return shown is None or shown.state not in ("RUNNING", "COMPLETING", "SUSPENDED")
    except scheduler.SchedulerError:
        return False


def _resolved(life: Life, config: Config, world: World, fence: Fence | None) -> Resolved:
    """What `auto` means for the run, as its first life found and recorded; also applies it to this process."""
    run = life.run
    kept = world.broadcast(read_run(run).get("resolved") if world.is_main else None)
    with life.stop.held():  # it may build kernels, to see whether that can be done
        resolved = device.resolve(config, world.device, life.env.cpus, kept)
    if not kept:  # as rank 0 finds it, whatever another rank's node lacks
        resolved = device.resolve(config, world.device, life.env.cpus, world.broadcast(resolved.as_dict()))
    devices.check_precision(life.env, world.device, resolved.amp)
    device.apply(resolved)
    if resolved.deterministic:  # NVLink's switches sum in no fixed order; NCCL, not in use yet, will read this
        environment.set_defaults(NCCL_NVLS_ENABLE="0")
    now = devices.kind(world.device)
    if fence is not None and not kept:
        _keep(run, fence, {**resolved.as_dict(), **now, "world_size": world.world_size})
    for what, it in now.items() if world.is_main and kept else ():
        if (first := kept.get(what, it)) != it:
            it = f"torch {it}" if what == "torch" else f"a CPU with {it}" if what == "cpu" else it
            say(f"{it} goes on where {first} began: the same images and noise, sums rounded otherwise")
    return resolved


def _keep(run: RunDir, fence: Fence, resolved: dict[str, Any]) -> None:
    record = {**read_run(run), "resolved": resolved}
    write_json(run.run_json, sign(record), replace=True, may_publish=fence.check)


def _until_the_end(life: Life, world: World, trainer: Trainer, fence: Fence | None, timeout_s: float) -> int:
    while True:
        if not trainer.warm:
            # compilers that start here must not die of a signal meant for us
            with life.stop.held(), _compiling(life, world, trainer, fence):
                found = trainer.fit()
                if fence is not None and found is not None:
                    _keep(life.run, fence, {**read_run(life.run)["resolved"], "micro_batch": found})
                trainer.warm_up(life.stop)
        outcome = trainer.train(life.stop, lambda reason: save_patience_s(life, reason, timeout_s))
        if not outcome.saved:
            return _leave_together(life, world, 1, "save_failed")
        if outcome.finished:
            if world.is_main and (asked := score_milestones(life, trainer.config)):
                with suppress(subprocess.TimeoutExpired):
                    asked.wait(QUEUE_AT_MOST_S)
            return _leave_together(life, world, 0)
        code = life.until_killed_or_on(outcome.reason, world.broadcast, trainer.alive)
        if code is not None:
            return _leave_together(life, world, code, outcome.reason)


def score_milestones(life: Life, config: Config) -> subprocess.Popen[bytes] | None:
    """Start a process that queues jobs to sample and score milestones, if the config asks for it; training does not
    wait for it. Not with --cluster local, where such jobs would slow training down."""
    if config.evaluate.milestones is None or not life.env.is_scheduled or life.run.is_stopped():
        return None
    command = [sys.executable, str(environment.PROJECT / "launch" / "evaluate.py"), str(life.run.path)]
    command += ["--all-milestones", "--unless-stopped"]
    try:
        with (life.run.logs / "milestones.out").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    except OSError as e:  # it ends no training; what is not queued now is at the next milestone
        say("milestones are not queued", error=e)
        return None


def _compiling(life: Life, world: World, trainer: Trainer, fence: Fence | None) -> AbstractContextManager[None]:
    if not trainer.compiles:
        return nullcontext()
    return compiled.compiling(
        life.run,
        _kind(trainer.resolved, world),
        world=world,
        may_publish=fence.check if fence is not None else None,
        anew=lambda grown: (_compiled_anew() if trainer.resolved.compile else grown) if trainer.warm else None,
    )


def _kind(resolved: Resolved, world: World) -> str:
    """The kind of device and torch that compiled code is for."""
    name = device.name_of(world.device) if world.device.type == "cuda" else compiled.this_cpu()
    return f"torch {torch.__version__}, {resolved.amp}, {name}"


def _compiled_anew() -> bool:
    """Whether this process's compiler had to compile anything."""
    from torch._dynamo.utils import counters

    told = counters["inductor"]
    return told["fxgraph_cache_miss"] > 0 or not told["fxgraph_cache_hit"]


def _leave_together(life: Life, world: World, code: int, reason: str = "") -> int:
    """Write rank 0's exit marker before any rank exits, since srun ends a step at its first bad exit; returns
    `code`, though another rank dies now."""
    life.leave(code, reason)
    with suppress(RuntimeError):
        world.barrier()
        ranks.leave()
    return code
