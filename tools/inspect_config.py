#!/usr/bin/env python
"""What a config costs and looks like, without data or GPU: layers, parameters, FLOPs, memory, noise schedule."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.files import write_bytes
from ddpm.run.log import counted
from launch.cluster.environment import PROJECT
from launch.terminal import console, recipes, streams

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ddpm.diffusion.schedule import Schedule
    from ddpm.network.unet import UNet

EXAMPLES = """examples:
  python tools/inspect_config.py configs/cifar10.yaml
  python tools/inspect_config.py configs/cifar10.yaml model.base_channels=64 train.micro_batch=32
  python tools/inspect_config.py configs/cifar10-cosine.yaml --plot schedule.svg
"""
BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "Adam's two moments": 8, "EMA": 4}
"""All fp32, also under autocast."""
BARS = "▁▂▃▄▅▆▇█"
PLOT_POINTS = 60


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="a config file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, e.g. model.base_channels=64")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the schedule's alpha_bar and SNR there")
    args = parser.parse_intermixed_args()
    if args.plot is not None and args.plot.suffix != ".svg":
        raise RequestError(f"--plot {args.plot}: it draws SVG alone; name a file that ends in .svg")
    if args.plot is not None and not args.plot.parent.is_dir():
        raise RequestError(f"--plot {args.plot}: there is no folder {args.plot.parent}; make it, or name another")
    if args.plot is not None:
        console.check_outside_runs(args.plot, "--plot")
    return args


# ---------------------------------------------------------------- network


def build(config: Config) -> "UNet":
    """The configured network in training mode, on the meta device: shapes without memory or arithmetic."""
    import torch

    from ddpm.network.build import build_model

    with torch.device("meta"):
        return build_model(config, torch.device("meta"), "off")


def num_parameters(module: "nn.Module | None") -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def layers(config: Config, model: "UNet") -> list[tuple[str, ...]]:
    """Rows (part, resolution, channels, blocks, attention, parameters) from input to output; "" where it has none."""
    s = config.network
    levels = list(zip(s.sizes, s.widths, strict=True))

    def level(part: str, module: Any, size: int, width: int) -> tuple[str, ...]:
        attention = sum(num_parameters(a) > 0 for a in module.attentions)
        heads = f"{attention} x {s.attention_heads} head{'s' if s.attention_heads > 1 else ''}" if attention else ""
        return part, f"{size}x{size}", str(width), str(len(module.blocks)), heads, f"{num_parameters(module):,}"

    def single(part: str, module: "nn.Module | None", size: str, width: int) -> tuple[str, ...]:
        return part, size, str(width), "", "", f"{num_parameters(module):,}"

    full = f"{s.image_size}x{s.image_size}"
    out = num_parameters(model.norm_out) + num_parameters(model.conv_out)
    return [
        single("time MLP", model.time_mlp, "", s.embedding),
        *([single("class embedding", model.class_embedding, "", s.embedding)] if s.num_classes else []),
        single("input", model.conv_in, full, s.base_channels),
        *(level(f"encoder {i}", m, *levels[i]) for i, m in enumerate(model.encoder)),
        level("bottleneck", model.bottleneck, *levels[-1]),
        *(level(f"decoder {i}", m, *levels[i]) for i, m in zip(range(len(levels))[::-1], model.decoder, strict=True)),
        ("output", full, str(s.in_channels), "", "", f"{out:,}"),
    ]


def activation_bytes(config: Config) -> int:
    """What autograd keeps of one image for the backward pass, in fp32 without compiling; each tensor once."""
    from torch.autograd.graph import saved_tensors_hooks

    from ddpm.network.arithmetic import inputs

    model = build(config)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its storage's address from being used again

    def keep(tensor: "Tensor") -> "Tensor":
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs(config))
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in weights)


def memory(config: Config, model: "UNet") -> dict[str, int]:
    """Bytes on one GPU that trains the config alone, by what they are for."""
    micro = config.train.micro_batch
    images = micro if isinstance(micro, int) else config.train.global_batch
    exact = {name: size * num_parameters(model) for name, size in BYTES_PER_PARAMETER.items()}
    return {**exact, f"activations of {counted(images, 'image')}": images * activation_bytes(config)}


# ---------------------------------------------------------------- schedule


def spark(values: list[float]) -> str:
    low, high = min(values), max(values)
    return "".join(BARS[round((v - low) / (high - low or 1) * (len(BARS) - 1))] for v in values)


def curves(schedule: "Schedule") -> dict[str, list[float]]:
    """alpha_bar and log10 of the SNR alpha_bar / (1 - alpha_bar), at every t."""
    alpha_bar = schedule.alpha_bar.clamp(max=1 - 2**-53).tolist()  # betas next to 0 make an alpha_bar of exactly 1
    return {"alpha_bar": alpha_bar, "log10 SNR": [math.log10(a / (1 - a)) for a in alpha_bar]}


def schedule_lines(schedule: "Schedule") -> list[str]:
    size = len(schedule.timesteps)
    num = min(PLOT_POINTS, size)
    places = [i * (size - 1) // (num - 1) for i in range(num)]
    return [
        f"{name:10} {spark([values[t] for t in places])}  {values[0]:.4g} (t = 0), "
        f"{values[size // 2]:.4g} (t = {size // 2}), {values[-1]:.4g} (t = {size - 1})"
        for name, values in curves(schedule).items()
    ]


def svg(schedule: "Schedule", title: str) -> str:
    """The curves of a schedule over t, one above the other."""
    width, height, left, gap = 640, 200, 70, 60
    parts = [f'<text x="{left}" y="24" font-size="15">{title}</text>']
    for row, (name, values) in enumerate(curves(schedule).items()):
        top, low, high = gap * (row + 1) + height * row, min(values), max(values)
        points = " ".join(
            f"{left + t * width / (len(values) - 1):.1f},{top + (high - v) / (high - low or 1) * height:.1f}"
            for t, v in enumerate(values)
        )
        parts += [
            f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
            f'<polyline points="{points}" fill="none" stroke="#0057b7" stroke-width="2"/>',
            f'<text x="{left}" y="{top - 8}">{name}</text>',
            f'<text x="{left - 8}" y="{top + 10}" text-anchor="end">{high:.3g}</text>',
            f'<text x="{left - 8}" y="{top + height}" text-anchor="end">{low:.3g}</text>',
            f'<text x="{left}" y="{top + height + 18}">t = 0</text>',
            f'<text x="{left + width}" y="{top + height + 18}" text-anchor="end">t = {len(values) - 1}</text>',
        ]
    across, down = left + width + 20, 2 * (height + gap) + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across}" height="{down}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


# ---------------------------------------------------------------- script


def print_layers(rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("part", "resolution", "channels", "blocks", "attention", "parameters"):
        table.add_column(name, justify="right" if name in ("channels", "blocks", "parameters") else "left")
    for row in rows:
        table.add_row(*row)
    streams.drawing(sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def main() -> int:
    args = parse()
    config = reading.load(Path(args.config), args.overrides, shelf=PROJECT / "configs")

    from ddpm.diffusion import schedule as schedules

    model, noise, d = build(config), schedules.build(config.diffusion), config.diffusion
    print(f"{config.name}: {config.data.name} {config.data.image_size}x{config.data.image_size}, ", end="")
    print(f"batch {config.train.global_batch}, {recipes.length(config)}\n")
    print_layers(layers(config, model))
    from ddpm.network.arithmetic import forward_flops

    flops, parts = forward_flops(config), memory(config, model)
    print(f"\nparameters       {num_parameters(model):,}")
    print(f"forward          {flops / 1e9:.2f} GFLOP an image (a multiply-add is 2; convolutions and matrix products)")
    print(f"training         {3 * flops / 1e9:.2f} GFLOP an image (forward, and twice that for backward)")
    print(f"memory           {sum(parts.values()) / 2**30:.2f} GiB on one GPU, in fp32 without compiling:")
    for name, size in parts.items():
        print(f"{size / 2**20:12,.1f} MiB {name}")
    print(
        "  Activations are what autograd keeps of one image, times the images; the rest is exact. Bf16 and compiling\n"
        "  need less; CUDA itself and the workspaces of its kernels come on top."
    )
    title = f"{d.schedule} schedule, {d.timesteps} timesteps"
    print(f"\n{title}", *schedule_lines(noise), sep="\n")
    for warning in config.warnings():
        print(f"\nwarning: {warning}")
    if args.plot is not None:
        write_bytes(args.plot, svg(noise, title).encode(), replace=True)
        print(f"drawn: {args.plot}")
    return 0


if __name__ == "__main__":
    console.run_script(main)
