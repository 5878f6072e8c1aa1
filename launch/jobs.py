"""The one entry of every job, by submitit, by template, or on this machine:

    python -m launch.jobs train RUN
    python -m launch.jobs sample RUN SET [--shard I] [--offset O]
    python -m launch.jobs evaluate RUN SET [--reference R] [--round N]

Each stage checks in the run directory that its predecessor is done, whatever the scheduler's dependency said, and a
job that starts on finished work changes nothing. Exit codes: ddpm/errors.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm import config as configs
from ddpm.errors import EXIT_REQUEUE, DDPMError, DoNotRetry, NodeUnfit, RunBusy, Stopped
from ddpm.rundir import DamagedFile, RunDir, read_json, write_json
from ddpm.scoring.against import open_reference
from launch import environment, preemption, slurm
from launch.cluster.site import site_of
from launch.queue import chain, sets

if TYPE_CHECKING:
    import torch

    from ddpm.data import PackedImages
    from ddpm.distributed import World
    from ddpm.fence import Fence
    from ddpm.runtime import Resolved

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


class Life:
    """One start of one job: its environment, its stop flag, and how it leaves."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.stop = preemption.StopFlag()
        self.stop.install()  # before all that takes time
        self.env = environment.current()

    def leave(self, code: int, reason: str = "") -> int:
        """Leave word for the batch shell, past srun, and end without unwinding: exit codes survive only so."""
        if self.env.rank == 0 and self.env.scheduler == "slurm":
            with contextlib.suppress(OSError):  # then srun's exit code has to do
                self.run.logs.mkdir(exist_ok=True)
                self.run.exit_marker(self.env.job, self.env.restart).write_text(f"{code} {reason or 'crash'}")
        return code

    def until_killed_or_on(
        self, reason: str, share: Callable[[Any], Any] = lambda v: v, alive: Callable[[], None] = lambda: None
    ) -> int | None:
        """After a saved stop, on all ranks: the exit code to leave with, or None to go on."""
        code = preemption.after_stop(self.stop, reason, self.env, _say, share, alive)
        if code is None:
            self.stop.clear(reason)
        return code


def _say(message: str, **fields: Any) -> None:
    from ddpm.run.log import say

    say(message, **fields)


def run_record(run: RunDir) -> dict[str, Any]:
    record = read_json(run.run_json)
    if record is None:
        raise DoNotRetry(f"{run.run_json} is missing or no JSON: this is no run directory; submit the run again")
    return record


# ---------------------------------------------------------------- train


def train(life: Life) -> int:
    run, env = life.run, life.env
    config = configs.load(run.config)
    why = chain.nothing_to_train(run, config) if env.rank == 0 else None
    if why and env.world_size == 1:
        _say(why)  # at once, without loading torch
        return life.leave(0)
    if env.rank == 0 and not why:
        _note_allocation(life)
    life.stop.watch(run.stop_file)
    kernels = run.path.parent / ".cache" / "inductor" / run.name
    environment.set_defaults(CUBLAS_WORKSPACE_CONFIG=":4096:8", TORCHINDUCTOR_CACHE_DIR=str(kernels))
    from ddpm import distributed
    from ddpm.fence import Fence
    from ddpm.trainer import Trainer

    _one_device(env)  # a rank without one must not let the others wait for it
    timeout_s = site_of(run).rank_timeout_s
    world = distributed.join(
        rank=env.rank,
        world_size=env.world_size,
        local_rank=env.local_rank,
        master_addr=env.master_addr,
        master_port=env.master_port,
        timeout_s=timeout_s,
    )
    fence = None
    if world.is_main and not why:
        fence = Fence(
            run, env.owner(), wait_s=min(60, timeout_s / 2), is_orphan=lambda other: _is_orphan(other, env), log=_say
        )
        why = chain.nothing_to_train(run, config)  # whoever held the run until now may have finished it
    if why := world.share(why):
        if world.is_main:
            _say(why)
        return _leave_together(life, world, 0)
    while True:
        try:
            packed = _data(life, config, world)
            break
        except Stopped as e:
            if (code := life.until_killed_or_on(e.reason, world.share)) is not None:
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
    )
    trainer.resume()
    while True:
        if not trainer.warm:
            # compilers that start here must not die of a signal meant for us
            with life.stop.held(), _compiling(kernels, world, trainer.resolved.compile):
                trainer.warm_up(life.stop)
        outcome = trainer.train(life.stop)
        if not outcome.saved:
            return life.leave(1, "save_failed")
        if outcome.finished:
            return _leave_together(life, world, 0)
        code = life.until_killed_or_on(outcome.reason, world.share, trainer.alive)
        if code is not None:
            return _leave_together(life, world, code, outcome.reason)


def _note_allocation(life: Life) -> None:
    """Tell goodput of this life, which may die before it trains, and when SLURM had freed the nodes of the one before.

    A life that is killed says nothing more; its last heartbeat is too early, and from before training there is none.
    """
    run, env = life.run, life.env
    shown = None
    if env.scheduler == "slurm" and env.restart > 0:
        with contextlib.suppress(slurm.SlurmError):
            shown = slurm.show(env.job, timeout_s=5)
    former = {"former_life_ended": shown.queued_at} if shown and shown.queued_at else {}
    try:
        env.events(run).append("allocated", world_size=env.world_size, step=run.latest_step(), **former)
    except OSError as e:  # a full disk ends no training
        _say("event not written", event="allocated", error=e)


def _resolved(life: Life, config: configs.Config, world: World, fence: Fence | None) -> Resolved:
    """What `auto` means here, as the run's first life found it and wrote down; applied to this process."""
    from ddpm import runtime

    run = life.run
    kept = world.share(run_record(run).get("resolved") if world.is_main else None)
    resolved = runtime.resolve(config, world.device, life.env.cpus, kept)
    runtime.apply(resolved)
    if fence is not None and not kept:
        found = {**resolved.as_dict(), "device": _device_name(world), "world_size": world.world_size}
        record = {**run_record(run), "resolved": found}
        write_json(run.run_json, record, replace=True, may_publish=fence.check)
    return resolved


@contextlib.contextmanager
def _compiling(kernels: Path, world: World, wanted: bool) -> Iterator[None]:
    """Within: the network is compiled, on all ranks, or loaded from where an earlier life left it compiled.

    A linker writes in place, so a life that dies here may leave half a library, which ends each later life that loads
    it. What a life found in the folder, or left there, is trusted once that life is past this.
    """
    if not wanted:
        yield
        return
    unproven = kernels.parent / f".unproven-{kernels.name}"  # no run's name begins with a dot
    if world.is_main:
        if unproven.exists():
            _say("an earlier life did not get past compiling: compiling anew", removed=kernels)
            shutil.rmtree(kernels, ignore_errors=True)
        unproven.parent.mkdir(parents=True, exist_ok=True)
        unproven.touch()
    world.barrier()
    yield
    world.barrier()
    if world.is_main:
        unproven.unlink(missing_ok=True)


def _leave_together(life: Life, world: World, code: int, reason: str = "") -> int:
    """The batch shell has rank 0's word before any rank is gone: srun ends a step with its first bad exit."""
    from ddpm import distributed

    life.leave(code, reason)
    world.barrier()
    distributed.leave()
    return code


def _is_orphan(other: dict[str, Any], env: environment.JobEnvironment) -> bool:
    """Whether the lock's holder is an earlier life of this very job, or a job that SLURM no longer runs."""
    if env.scheduler != "slurm" or not str(other.get("job", ""))[:1].isdigit():
        return False  # a run on this machine is nothing that SLURM knows of
    if other.get("job") == env.job:
        return int(other.get("restart", 0)) < env.restart
    try:
        shown = slurm.show(str(other["job"]))
        return shown is None or shown.state not in ("RUNNING", "COMPLETING", "SUSPENDED")
    except slurm.SlurmError:
        return False


def _device_name(world: World) -> str:
    import torch

    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def _check_device(env: environment.JobEnvironment, device: torch.device) -> None:
    """Raises NodeUnfit where SLURM gave this job GPUs of a node that has them, and torch cannot use them."""
    if device.type == "cuda" or not environment.gpus_given() or not any(NVIDIA_GPUS.glob("*")):
        return
    import torch

    why = f"torch {torch.__version__} was built with CUDA {torch.version.cuda}: is the driver as new, nvidia-smi well?"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is its CPU build: delete .venv and run tools/env.sh, or install the other"
    raise NodeUnfit(f"{env.host} has GPUs for this job, but torch cannot use them. {why}")


def _one_device(env: environment.JobEnvironment) -> torch.device:
    """Where a job of one process computes. Raises NodeUnfit."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(env, device)
    return device


def _data(life: Life, config: configs.Config, world: World) -> PackedImages:
    """The packed training data, from node-local scratch where the site has one; packed here if the cache is gone."""
    from ddpm import data

    record = run_record(life.run)
    cache = Path(record["data"]["cache"])
    key = record["data"]["key"]
    if world.share(world.is_main and not (cache / key / "meta.json").exists()):
        key = _pack_again(life, config, world, cache)
    local = None
    if scratch := record["data"].get("scratch"):
        local = environment.expand(scratch) / "ddpm-hpc"
        if life.env.local_rank == 0:
            try:
                data.copy_to_scratch(cache, key, local)
            except OSError as e:
                _say(f"scratch {local} cannot be used ({e}); reading the data from {cache}")
        world.barrier()
    packed = data.open_packed(cache, key, scratch=local)
    if packed.digest != record["data"]["digest"]:
        raise DoNotRetry(
            f"the data changed under this run: digest {packed.digest[:12]} now, "
            f"{record['data']['digest'][:12]} when it was submitted. Restore it, or train another run"
        )
    return packed


def _pack_again(life: Life, config: configs.Config, world: World, cache: Path) -> str:
    """Rank 0 packs, the others answer it meanwhile: none takes its silence for death. Returns the key, on all ranks.

    Raises Stopped, on all ranks.
    """
    from ddpm import data
    from ddpm.run.stopping import STOP_REASONS

    def agreed(packed: bool = False) -> tuple[str, bool]:
        code, done = world.agree([STOP_REASONS.index(life.stop() or ""), int(packed)])
        return STOP_REASONS[code], bool(done)

    key, packed = "", False
    if world.is_main:
        _say("the packed data is gone from the cache: packing it again", cache=cache)
        key, _ = data.pack(config.data, "train", cache, stop_requested=lambda: agreed()[0] or None)
        agreed(packed=True)
    while not (world.is_main or packed):
        reason, packed = agreed()
        if reason and not packed:
            raise Stopped(reason)
    return str(world.share(key))


# ---------------------------------------------------------------- sample


def sample(life: Life, set_name: str, shard: int) -> int:
    """One shard of a set; publishes the set's request first where a chained job is the first to come by."""
    import torch

    from ddpm import checkpoint, generate, runtime
    from ddpm.schedule import build as build_schedule

    run, env = life.run, life.env
    config = configs.load(run.config)
    sample_set = run.sample_set(set_name)
    request = sets.ensure_request(run, config, set_name)
    if not 0 <= shard < request.shards:
        raise DoNotRetry(f"shard {shard} of {set_name}: it has shards 0 to {request.shards - 1}")
    life.stop.watch(run.stop_file)
    torch.set_num_threads(env.cpus)
    device = _one_device(env)
    try:
        generation = checkpoint.verify(run, request.checkpoint.step)
    except FileNotFoundError:
        raise DoNotRetry(f"the checkpoint of step {request.checkpoint.step} that {set_name} samples is gone") from None
    if generation.sha256 != request.checkpoint.sha256:
        raise DoNotRetry(
            f"{run.checkpoint(generation.step).name} is not the one that {set_name} was begun with; "
            f"sample into another set: python launch/sample.py {run.path} --set OTHER"
        )
    model = runtime.build_model(config, device, request.precision)
    model.load_state_dict(checkpoint.load(run, generation.step)["ema" if request.weights == "ema" else "model"])
    model.eval()

    def eps_model(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad(), runtime.autocast(request.precision, device):
            return model(x_t, t, labels).float()

    size = config.data.image_size
    while True:
        try:
            manifest = generate.generate_shard(
                sample_set,
                request,
                shard,
                eps_model=eps_model,
                schedule=build_schedule(config.diffusion),
                image_shape=(3, size, size),
                variance=config.diffusion.variance,
                num_classes=config.model.num_classes,
                device=device,
                stop_requested=life.stop,
                progress=lambda done, total: _say(f"shard {shard}", images=f"{done}/{total}"),
                token=f"{env.job}.{env.restart}",
            )
        except Stopped as e:
            _say("stopped; finished batches are kept", reason=e.reason, shard=shard)
            code = life.until_killed_or_on(e.reason)
            if code is None:
                continue
            return life.leave(code, e.reason)
        _say("shard done", shard=f"{shard}/{request.shards}", images=manifest["num"], sha256=manifest["sha256"][:12])
        return life.leave(0)


# ---------------------------------------------------------------- evaluate


def evaluate(life: Life, set_name: str, reference: str | None, round_: str) -> int:
    """Score a set; where shards are missing and SLURM is here, have them made and come after them again."""
    import torch

    from ddpm import evaluate as scoring
    from ddpm import features, sampleset

    run, env = life.run, life.env
    config = configs.load(run.config)
    sample_set = run.sample_set(set_name)
    request = sets.ensure_request(run, config, set_name)
    if missing := sampleset.missing_shards(sample_set, request):
        return life.leave(chain.fill_gaps(run, set_name, missing, reference, round_, env))
    life.stop.watch(run.stop_file)
    torch.set_num_threads(env.cpus)
    device = _one_device(env)
    cache = Path(run_record(run)["data"]["cache"])
    against = reference or config.evaluate.reference
    command = ["python", "launch/evaluate.py", str(run.path), "--set", set_name, "--reference", against]
    while True:
        try:
            result = scoring.evaluate_set(
                run,
                set_name,
                reference=open_reference(config, against, cache, life.stop),
                extractor=features.build_extractor(config.evaluate.extractor, device),
                cache_dir=cache / "reference",
                command=command,
                stop_requested=life.stop,
                progress=lambda done, total: _say("features", shards=f"{done}/{total}"),
                token=f"{env.job}.{env.restart}",
            )
        except scoring.BrokenSet as e:
            if not e.shards:
                raise  # nothing that computing anew would mend
            _say(str(e))
            return life.leave(chain.fill_gaps(run, set_name, list(e.shards), reference, round_, env))
        except Stopped as e:
            code = life.until_killed_or_on(e.reason)
            if code is None:
                continue
            return life.leave(code, e.reason)
        score = "fid" if "fid" in result else "frechet_distance"
        _say(
            "scored",
            **{score: f"{result[score]:.4f}"},
            num_samples=result["num_samples"],
            file=run.eval / f"{set_name}.json",
        )
        return life.leave(0)


# ---------------------------------------------------------------- entry


def main(argv: list[str]) -> int:
    """Run one stage and end the process with its exit code (submitit must not unwind past us either)."""
    parser = argparse.ArgumentParser(prog="python -m launch.jobs", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["train", "sample", "evaluate"])
    parser.add_argument("run", type=Path)
    parser.add_argument("set_name", nargs="?", default="")
    parser.add_argument("--shard", type=int, default=None)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--reference", default=None)
    parser.add_argument("--round", default="")
    args = parser.parse_args(argv)
    run = RunDir(args.run.absolute())
    life = Life(run)
    try:
        if args.stage == "train":
            code = train(life)
        elif args.stage == "sample":
            shard = args.shard if args.shard is not None else (life.env.array_task or 0) + args.offset
            code = sample(life, args.set_name, shard)
        else:
            code = evaluate(life, args.set_name, args.reference, args.round)
    except Stopped as e:  # before anything was computed: nothing to save
        answer = life.until_killed_or_on(e.reason)  # 0 for STOP
        code = life.leave(EXIT_REQUEUE if answer is None else answer, e.reason)
    except RunBusy as e:
        _say(str(e))
        code = life.leave(e.exit_code)
    except (slurm.SlurmError, NodeUnfit) as e:  # SLURM may answer the next life, another node serve it
        _say(str(e))
        code = life.leave(1)
    except (DDPMError, DamagedFile) as e:
        _say(f"failed: {e}")
        code = life.leave(DoNotRetry.exit_code)
        if life.env.scheduler == "local" and life.env.rank == 0:  # elsewhere the batch shell says so
            told = {"stage": args.stage, "exit_code": code, "reason": str(e)}
            with contextlib.suppress(OSError):
                life.env.events(run).append("failed", world_size=life.env.world_size, step=run.latest_step(), **told)
    except BaseException:
        code = 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
    with contextlib.suppress(OSError):  # a log on a full disk must not change the exit code
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
