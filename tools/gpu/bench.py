"""What this machine's GPU (or CPU, smaller) does with Ho et al.'s network: one figure a line, each written at once.

Training is the trainer's own loop, whole: data, randomness, network, optimizer, average, agreement. Peers take the same
step as their own example does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor import config as inductor_config

from ddpm.config import reading, schema
from ddpm.data import packed as data
from ddpm.diffusion import rng, samplers, schedule
from ddpm.network.build import build_model
from ddpm.network.device import apply, resolve
from ddpm.run import generations
from ddpm.run import saving as savings
from ddpm.run.events import EventLog
from ddpm.run.fence import Fence
from ddpm.run.paths import RunDir
from ddpm.sampling.denoiser import eps_of
from ddpm.scoring.extractors import build_extractor
from ddpm.training.ranks import World
from ddpm.training.trainer import Trainer
from tools.gpu import PROJECT

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPE = (3, 32, 32)
NUM_QUICK = 7
"""Of the first rows, which say most."""


class Enough(Exception):
    """Raised out of a trainer's loop once it has been measured."""


def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], *, rounds: int = 5, warm_up: int = 2, calls: int = 1) -> float:
    """Median time of one call."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(rounds):
        sync()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        sync()
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def cifar10(*overrides: str) -> schema.Config:
    small = [] if GPU else ["model.base_channels=32"]
    return reading.load(PROJECT / "configs" / "cifar10.yaml", [*small, *overrides])


def noise_images() -> data.PackedImages:
    images = np.random.default_rng(0).integers(0, 256, size=(50_000, 32, 32, 3), dtype=np.uint8)
    return data.PackedImages(images, np.zeros(len(images), np.int64), "noise", "train", data.images_digest(images))


# ---------------------------------------------------------------- peaks


def peaks() -> dict[str, Any]:
    """TFLOP/s of the network's two main convolutions and of a matrix product, GB/s of a copy."""
    out: dict[str, Any] = {}
    dtype, batch = (torch.bfloat16, 512) if GPU else (torch.float32, 4)
    for channels, size in ((128, 32), (256, 16)):
        x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
        flops = 2 * batch * size * size * channels * channels * 9
        took = seconds(lambda x=x, w=w: torch.nn.functional.conv2d(x, w, padding=1), calls=10)  # type: ignore[misc]
        out[f"conv_{channels}x{size}_tflops"] = flops / took / 1e12
    n = 8192 if GPU else 512
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    out["matmul_tflops"] = 2 * n**3 / seconds(lambda: a @ a, calls=5) / 1e12
    b = torch.empty(2**30 if GPU else 2**24, dtype=torch.uint8, device=DEVICE)
    c = torch.empty_like(b)
    out["copy_gb_per_s"] = 2 * b.numel() / seconds(lambda: c.copy_(b), calls=5) / 1e9
    return out


# ---------------------------------------------------------------- training


def trainer_of(asked: schema.Config, run: RunDir, packed: data.PackedImages) -> tuple[Trainer, Fence]:
    resolved = resolve(asked, DEVICE, 1)
    apply(resolved)
    fence = Fence(run, {"job": "bench", "restart": 0, "host": "here"})
    return Trainer(
        asked,
        run,
        World(0, 1, DEVICE),
        packed,
        resolved,
        fence=fence,
        events=EventLog(run, "bench", 0, "here"),
        owner={},
    ), fence


def training(
    batch: int, *overrides: str, steps: int = 60, warm_up: int = 15, profile: bool = False, graphs: bool = False
) -> dict[str, Any]:
    """Images/s of the trainer's loop at one global batch, its compile time and memory; with `profile`, its launches."""
    steps, warm_up = (steps, warm_up) if GPU else (4, 2)
    asked = cifar10(f"train.global_batch={batch}", "log.every_steps=100000", "checkpoint.every_min=null", *overrides)
    torch.compiler.reset()
    inductor_config.triton.cudagraphs = graphs
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    out: dict[str, Any] = {"batch": batch, "overrides": list(overrides)}
    with tempfile.TemporaryDirectory() as where:
        trainer, fence = trainer_of(asked, RunDir(Path(where)), noise_images())
        out["amp"], out["compile"] = trainer.resolved.amp, trainer.resolved.compile
        trainer.resume()
        began = time.perf_counter()
        trainer.warm_up(lambda: None)
        sync()
        out["warm_up_s"] = time.perf_counter() - began
        marks: list[float] = []
        prof: Any = None

        def stop_requested() -> None:
            nonlocal prof
            if trainer.at.step in (warm_up, warm_up + steps):
                sync()
                marks.append(time.perf_counter())
            if len(marks) == 2 and not profile:
                raise Enough
            if profile and trainer.at.step == warm_up + steps + 2:
                prof = torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CPU]
                    + ([torch.profiler.ProfilerActivity.CUDA] if GPU else []),
                    record_shapes=True,
                )
                prof.start()
            if profile and trainer.at.step == warm_up + steps + 7:
                sync()
                prof.stop()
                raise Enough

        try:
            trainer.train(stop_requested)
        except Enough:
            pass
        finally:
            fence.release()
        out["images_per_s"] = steps * batch / (marks[1] - marks[0])
        out["ms_per_step"] = (marks[1] - marks[0]) / steps * 1e3
        if prof is not None:
            out |= launches(prof, 5)
    if GPU:
        out["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return out


def launches(prof: Any, steps: int) -> dict[str, Any]:
    """Per step: kernels, their time, operators, host waits; and the kernels and operators that take most."""
    averages = prof.key_averages()
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    runtime_calls = {e.key: e.count / steps for e in averages if e.key.startswith(("cuda", "cu")) and "_" not in e.key}
    top = sorted(kernels, key=lambda e: -e.self_device_time_total)[:25]
    return {
        "kernels_per_step": sum(e.count for e in kernels) / steps,
        "kernel_ms_per_step": sum(e.self_device_time_total for e in kernels) / steps / 1e3,
        "aten_ops_per_step": sum(e.count for e in averages if e.key.startswith("aten::")) / steps,
        "runtime_calls_per_step": runtime_calls,
        "top_kernels": [
            {"name": e.key[:100], "calls": e.count / steps, "ms": e.self_device_time_total / steps / 1e3} for e in top
        ],
        "top_host_ms": [
            {"name": e.key[:60], "calls": e.count / steps, "ms": e.self_cpu_time_total / steps / 1e3}
            for e in sorted(averages, key=lambda e: -e.self_cpu_time_total)[:20]
        ],
        "top_operators": [
            {
                "name": e.key,
                "shapes": str(e.input_shapes)[:90],
                "calls": e.count / steps,
                "ms": e.self_device_time_total / steps / 1e3,
            }
            for e in sorted(prof.key_averages(group_by_input_shape=True), key=lambda e: -e.self_device_time_total)
            if e.key.startswith("aten::")
        ][:60],
    }


# ---------------------------------------------------------------- peers


def diffusers_unet() -> Any:
    from diffusers import UNet2DModel

    width = 128 if GPU else 32
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        dropout=0.1,
        norm_eps=1e-6,
        norm_num_groups=32 if GPU else 8,
    )


def diffusers_training(batch: int, *, amp: bool, compiled: bool, steps: int = 30) -> dict[str, Any]:
    """The step of diffusers' unconditional example: DDPMScheduler, mse, clip, AdamW, EMAModel."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # its example's default
    torch.use_deterministic_algorithms(False)
    model: Any = diffusers_unet().to(DEVICE)
    ema = EMAModel(model.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
    network = torch.compile(model) if compiled else model
    images = torch.from_numpy(noise_images().images[: 4 * batch]).permute(0, 3, 1, 2).float().div(127.5).sub(1)

    def step(i: int) -> None:
        x_0 = images[i % 4 * batch : (i % 4 + 1) * batch].to(DEVICE)
        eps = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (batch,), device=DEVICE)
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            loss = torch.nn.functional.mse_loss(network(x_t, t).sample.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        loss.item()  # logged at every step

    steps, warm_up = (steps, 8) if GPU else (3, 1)
    for i in range(warm_up):
        step(i)
    sync()
    began = time.perf_counter()
    for i in range(steps):
        step(i)
    sync()
    took = (time.perf_counter() - began) / steps
    return {"batch": batch, "amp": amp, "compile": compiled, "images_per_s": batch / took, "ms_per_step": took * 1e3}


# ---------------------------------------------------------------- sampling, features, checkpoints


def sampling(batch: int, *, compiled: bool = False, cast: bool = False, steps: int = 20) -> dict[str, Any]:
    """Network evaluations x images/s of a DDIM loop as a sample job runs it; `cast`: weights in bf16 throughout."""
    asked = cifar10()
    torch.compiler.reset()
    precision = "bf16" if GPU else "fp32"
    model: Any = build_model(asked, DEVICE, precision).eval()
    if cast:
        model = model.to(torch.bfloat16)
    network: Any = torch.compile(model) if compiled else model
    x_T = rng.normal(rng.key(0, "x_T"), torch.arange(batch, device=DEVICE), 0, SHAPE)

    eps = eps_of(network, "fp32" if cast else precision)
    table = schedule.build(asked.diffusion)

    def ddim(num_steps: int) -> None:
        samplers.sample(lambda x, t: eps(x, t, None), samplers.ddim(table, num_steps), x_T, noise=lambda t: x_T)

    steps = steps if GPU else 2
    with torch.inference_mode():
        began = time.perf_counter()
        ddim(1)
        sync()
        first = time.perf_counter() - began
        took = seconds(lambda: ddim(steps), rounds=3, warm_up=1)
        noise = seconds(lambda: rng.normal(rng.key(0, "x_T"), torch.arange(batch, device=DEVICE), 3, SHAPE), calls=5)
    return {
        "batch": batch,
        "compile": compiled,
        "cast": cast,
        "evaluations_images_per_s": steps * batch / took,
        "first_call_s": first,
        "noise_ms": noise * 1e3,
    }


def inception() -> dict[str, Any]:
    """Images/s of the Inception network in float32 without TF32, as scores are computed."""
    out = {}
    extractor = build_extractor("random-inception", DEVICE)
    for batch in (64, 256) if GPU else (4,):
        images = np.random.default_rng(0).integers(0, 256, size=(batch, 32, 32, 3), dtype=np.uint8)
        took = seconds(lambda images=images: extractor(images), rounds=5, calls=2)  # type: ignore[misc]
        out[f"images_per_s_{batch}"] = batch / took
    return out


def saving() -> dict[str, Any]:
    """How long training waits for a save, and what reading one takes; Ho et al.'s network with Adam and average."""
    with tempfile.TemporaryDirectory() as where:
        run = RunDir(Path(where))
        trainer, fence = trainer_of(cifar10("train.compile=false", "train.global_batch=16"), run, noise_images())
        trainer.resume()

        def stop_requested() -> str | None:
            return "preempted" if trainer.at.step == 3 else None

        began = time.perf_counter()
        trainer.train(stop_requested)
        sync()
        whole = time.perf_counter() - began
        copy, state = savings.HostCopy(), trainer.state.state_dict()
        first = seconds(lambda: copy.take(state), rounds=1, warm_up=0)
        again = seconds(lambda: copy.take(state), rounds=5, warm_up=1)
        size = run.checkpoint(3).stat().st_size
        load = seconds(lambda: (generations.verify(run, 3), generations.load(run, 3)), rounds=1, warm_up=0)
        fence.release()
    return {
        "bytes": size,
        "blocked_first_ms": first * 1e3,
        "blocked_ms": again * 1e3,
        "three_steps_and_save_s": whole,
        "verify_and_load_s": load,
    }


def table() -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """The figures, in order of their worth: what does not fit the time is left out, and said."""
    batch = 128 if GPU else 8
    auto = [] if GPU else ["train.compile=false"]
    return [
        ("peaks", peaks),
        ("training", lambda: training(batch, *auto, profile=True)),
        ("training, graphs", lambda: training(batch, *auto, graphs=True)),
        ("training, not compiled", lambda: training(batch, "train.compile=false", profile=True)),
        ("sampling", lambda: sampling(500 if GPU else 4)),
        ("inception", inception),
        ("checkpoint", saving),
        ("training at 512", lambda: training(512 if GPU else 16, *auto)),
        ("training at 16", lambda: training(16, *auto, profile=True)),
        ("training, deterministic", lambda: training(batch, "train.deterministic=true", *auto)),
        ("diffusers, bf16", lambda: diffusers_training(batch, amp=True, compiled=False)),
        ("diffusers, fp32", lambda: diffusers_training(batch, amp=False, compiled=False)),
        ("sampling, compiled", lambda: sampling(500 if GPU else 4, compiled=True)),
        ("sampling, weights cast, compiled", lambda: sampling(500 if GPU else 4, compiled=True, cast=True)),
        ("diffusers, bf16, compiled", lambda: diffusers_training(batch, amp=True, compiled=True)),
        ("training at 1024", lambda: training(1024 if GPU else 32, *auto)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows by name (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after each row")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--quick", action="store_true", help="the first rows alone, which say most")
    args = parser.parse_args()
    rows = dict(table())
    if unknown := [name for name in args.names if name not in rows]:
        parser.error(f"no row {', '.join(unknown)}; there are: {'; '.join(rows)}")
    chosen = args.names or (list(rows)[:NUM_QUICK] if args.quick else list(rows))
    ends = time.monotonic() + args.minutes * 60
    card = torch.cuda.get_device_name() if GPU else "cpu"
    record: dict[str, Any] = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": {}}
    failed = 0
    for name in chosen:
        if time.monotonic() > ends:
            print(f"{name}: not run, no time left", flush=True)
            continue
        began = time.monotonic()
        try:
            row = rows[name]()
        except ImportError as e:  # a peer that is not installed
            row = {"not_run": str(e)}
        except Exception as e:
            traceback.print_exc()
            failed, row = 1, {"error": f"{type(e).__name__}: {e}"}
        row["took_s"] = time.monotonic() - began
        record["rows"][name] = row
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        shown = {
            k: (f"{v:.4g}" if isinstance(v, float) else v) for k, v in row.items() if not isinstance(v, list | dict)
        }
        print(f"{name}: " + " ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        if GPU:
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
