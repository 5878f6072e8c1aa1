#!/usr/bin/env python
"""Convert published weights in diffusers' layout, such as google/ddpm-cifar10-32, to this project's."""

import sys
from os.path import dirname, realpath

sys.path[0] = dirname(dirname(realpath(__file__)))

import launch.first  # noqa: F401

# isort: split
import argparse
import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.files import TMP_PREFIX, write_bytes
from ddpm.run.paths import RunDir, check_name
from launch import prepare
from launch.cluster import environment
from launch.cluster.site import Site
from launch.queue import directory
from launch.terminal import console
from tools.diffusers_folder import Folder, find, read_object, read_weights

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """examples:
  python tools/convert_diffusers.py ddpm-cifar10-32 ho.safetensors          for ddpm.load("ho.safetensors", …)
  python tools/convert_diffusers.py ddpm-cifar10-32 ho.safetensors --run runs/ho
  python launch/sample.py runs/ho --sampler ancestral                       a run, to sample and score
  python launch/evaluate.py runs/ho

  python launch/submit.py configs/mine.yaml --from runs/ho --partition gpu  a new run that starts from there

FOLDER is a DDPMPipeline's or DDIMPipeline's (unet/, scheduler/), or has config.json and the weights of a UNet2DModel,
and perhaps scheduler_config.json. Weights may be .safetensors or .bin, whole or in shards, or .fp16. files alone. The
scheduler gives betas, variance and clipping; --sampler and --steps of launch/sample.py give the sampling steps.
"""
CONFIG = environment.PROJECT / "configs" / "cifar10.yaml"
NETWORK = {
    "in_channels": (3, 3),
    "out_channels": (3, 3),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "attn_norm_num_groups": (None, None),
    "norm_eps": (1e-5, 1e-6),
    "resnet_time_scale_shift": ("default", "default"),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
"""Key of a UNet2DModel -> its value where it is left out, and the one value that our network can have too."""
SHAPED = (
    *("sample_size", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "add_attention"),
    *("attention_head_dim", "downsample_padding", "norm_num_groups"),
)
"""Keys of it that our structure follows from."""
WITHOUT_EFFECT = ("dropout", "num_train_timesteps", "sample_max_value", "dynamic_thresholding_ratio")
"""Keys that mean nothing to a trained network, and nothing where others are as they must be."""
PROCESS = {
    "trained_betas": (None, None),
    "prediction_type": ("epsilon", "epsilon"),
    "thresholding": (False, False),
    "rescale_betas_zero_snr": (False, False),
    "set_alpha_to_one": (True, True),
}
"""The same of a scheduler."""
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
OF_PROCESS = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "variance_type", "clip_sample"),
    *("clip_sample_range", "timestep_spacing", "steps_offset"),
)
"""Keys of it that our config follows from, and those of the steps at which it samples."""
INSTEAD = "(sample it with diffusers, then; python launch/evaluate.py --images DIR scores such images too)"
DOWNSAMPLE = {0: "conv_asymmetric", 1: "conv"}
RENAMES = (
    (r"^time_embedding\.linear_1\.", "time_mlp.0."),
    (r"^time_embedding\.linear_2\.", "time_mlp.2."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^down_blocks\.", "encoder."),
    (r"^mid_block\.", "bottleneck."),
    (r"^up_blocks\.", "decoder."),
    (r"\.resnets\.", ".blocks."),
    (r"\.downsamplers\.0\.conv\.", ".resample."),
    (r"\.upsamplers\.0\.conv\.", ".resample.1."),
    (r"\.(norm|conv)([12])\.", r".\1_\2."),
    (r"\.time_emb_proj\.", ".embed."),
    (r"\.conv_shortcut\.", ".skip."),
    (r"\.group_norm\.", ".norm."),
    # attention has two generations of names
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj."),
)


def parse() -> argparse.Namespace:
    parser = console.Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("source", metavar="FOLDER", type=Path, help="the published model, on this machine")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the file to make")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--config", type=Path, default=CONFIG, help="for all but the network (default: cifar10.yaml)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="make a run directory of them, too")
    return parser.parse_intermixed_args()


# ---------------------------------------------------------------- what their network is


def check(found: dict[str, Any], shared: dict[str, tuple[Any, Any]], where: Path) -> None:
    """RequestError for the first key whose value ours have no counterpart of."""
    for key, (default, allowed) in shared.items():
        value = found.get(key, default)
        if value != allowed:
            stands = "" if key in found else ", which is what leaving it out means"
            raise RequestError(f"{where}: {key} = {value!r}{stands}: only {allowed!r} can be converted")


def tell_unknown(found: dict[str, Any], known: Sequence[str], where: Path) -> None:
    """Warn of keys of which nobody here knows what they mean: diffusers leaves such out too."""
    for key in found:
        if not key.startswith("_") and key not in known:
            print(f"warning: {where}: {key} = {found[key]!r}: not known here, and left out", file=sys.stderr)


def structure(unet: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config keys that describe a UNet2DModel. RequestError for one that ours cannot be."""

    def refuse(key: str, allowed: str) -> RequestError:
        return RequestError(f"{where}: {key} = {unet.get(key)!r}: {allowed}")

    if unet.get("_class_name") != "UNet2DModel":
        raise refuse("_class_name", "only UNet2DModel can be converted")
    tell_unknown(unet, [*NETWORK, *SHAPED, *WITHOUT_EFFECT], where)
    check(unet, NETWORK, where)
    size, widths = unet.get("sample_size"), unet.get("block_out_channels")
    if not isinstance(size, int):
        raise refuse("sample_size", "must be the height and width in pixels")
    if not (isinstance(widths, list) and widths and all(isinstance(w, int) and w > 0 for w in widths)):
        raise refuse("block_out_channels", "must be the channels of each level")
    if any(width % widths[0] for width in widths):
        raise refuse("block_out_channels", "must be multiples of the first")
    sizes = [size >> level for level in range(len(widths))]
    down = attended(unet, "down_block_types", ("DownBlock2D", "AttnDownBlock2D"), where)
    up = attended(unet, "up_block_types", ("UpBlock2D", "AttnUpBlock2D"), where)[::-1]
    if len(down) != len(widths) or len(up) != len(widths):
        raise refuse("down_block_types", f"needs {len(widths)} entries, as up_block_types and block_out_channels")
    if down != up and any(down) and any(up):
        raise refuse("up_block_types", "must attend where down_block_types do, or one of both nowhere")
    places = [a or b for a, b in zip(down, up, strict=True)]
    middle = unet.get("add_attention", True)
    head = unet.get("attention_head_dim", 8)
    heads = {w // head if head else 1 for w, a in zip(widths, places, strict=True) if a or (middle and w == widths[-1])}
    if len(heads) > 1:
        raise refuse("attention_head_dim", f"means {sorted(heads)} heads at different levels; must be as many at all")
    padding = unet.get("downsample_padding", 1)
    if padding not in DOWNSAMPLE:
        raise refuse("downsample_padding", "must be 0 or 1")
    groups = unet.get("norm_num_groups", 32)
    return {
        "data.image_size": size,
        "model.base_channels": widths[0],
        "model.channel_mults": [width // widths[0] for width in widths],
        "model.blocks_per_level": unet.get("layers_per_block", 2),
        "model.block": "residual",
        "model.attention_resolutions": [s for s, place in zip(sizes, places, strict=True) if place],
        "model.attention_heads": heads.pop() if heads else 1,
        "model.attention_in": "both" if down == up else "encoder" if any(down) else "decoder",
        "model.middle_attention": middle,
        "model.downsample": DOWNSAMPLE[padding],
        "model.upsample": "conv",
        "model.norm_groups": None if groups == 32 and not any(w % 32 or w == 32 for w in widths) else groups,
        "model.time_embed_channels": None,
        "model.num_classes": 0,
        "train.label_dropout": 0.0,
    }


def attended(unet: dict[str, Any], key: str, kinds: tuple[str, str], where: Path) -> list[bool]:
    """Whether each level has attention; `kinds` without and with."""
    types = unet.get(key)
    if not isinstance(types, list) or not set(types) <= set(kinds):
        raise RequestError(f"{where}: {key} = {types!r}: must be a list of {' and '.join(kinds)}")
    return [kind == kinds[1] for kind in types]


def process(scheduler: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config keys for a scheduler's betas, variance and clipping. RequestError for what ours cannot be."""

    def one_of(key: str, default: str, ours: dict[str, str]) -> str:
        value = scheduler.get(key, default)
        if value not in ours:
            raise RequestError(f"{where}: {key} = {value!r}: only {', '.join(ours)} can be converted")
        return ours[value]

    kind = one_of("_class_name", SCHEDULERS[0], dict(zip(SCHEDULERS, SCHEDULERS, strict=True)))
    tell_unknown(scheduler, [*PROCESS, *OF_PROCESS, *WITHOUT_EFFECT], where)
    check(scheduler, PROCESS, where)
    numbers = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample_range": 1.0}
    numbers = {key: scheduler.get(key, default) for key, default in numbers.items()}
    for key, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise RequestError(f"{where}: {key} = {value!r}: must be a number")
    timesteps, clip = numbers["num_train_timesteps"], bool(scheduler.get("clip_sample", True))
    if clip and numbers["clip_sample_range"] != 1:
        raise RequestError(f"{where}: clip_sample_range = {numbers['clip_sample_range']!r}: only 1.0 can be converted")
    schedule = one_of("beta_schedule", "linear", SCHEDULES)
    found = {"diffusion.timesteps": timesteps, "diffusion.schedule": schedule, "sample.clip_x_0": clip}
    if schedule == "linear":  # ours are given for 1000 timesteps
        found |= {f"diffusion.{key}": numbers[key] * timesteps / 1000 for key in ("beta_start", "beta_end")}
    if kind == SCHEDULERS[0]:  # the other's is --eta's to say
        found["diffusion.variance"] = one_of("variance_type", "fixed_small", VARIANCES)
    return found


def fit(source: Folder, config: Path, changes: Sequence[str]) -> tuple[Config, list[str]]:
    """`config` with `changes` and with what the network in `source` needs, unless they say otherwise; all of these."""
    where = source.network / "config.json"
    unet = read_object(where)
    scheduler = read_object(source.scheduler) if source.scheduler is not None else None
    try:
        wanted = structure(unet, where) | (process(scheduler, source.scheduler) if scheduler is not None else {})
    except RequestError as e:
        raise RequestError(f"{e}\n  {INSTEAD}") from None
    there = reading.load(config, shelf=CONFIG.parent).model_dump(mode="json")
    if wanted.get("diffusion.timesteps", there["sample"]["steps"]) < there["sample"]["steps"]:
        wanted["sample.steps"] = wanted["diffusion.timesteps"]
    changed, changes = {change.partition("=")[0] for change in changes}, list(changes)
    for key, value in wanted.items():
        section, _, leaf = key.partition(".")
        if there[section][leaf] != value and key not in changed:
            changes.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return reading.load(config, changes, shelf=CONFIG.parent), changes


# ---------------------------------------------------------------- weights


def unwrapped(theirs: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Without what goes before all names: of a network that was saved compiled, or in DDP."""
    from ddpm.network.weights import WRAPPERS

    prefix = next((p for p in WRAPPERS if theirs and all(name.startswith(p) for name in theirs)), None)
    if prefix is None:
        return theirs
    return unwrapped({name.removeprefix(prefix): value for name, value in theirs.items()})


def rename(theirs: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Their tensors under our names, float32; query, key and value joined, attention's linear layers as 1x1 kernels."""
    import torch

    parts = {}
    for name, value in theirs.items():
        for pattern, ours in RENAMES:
            name = re.sub(pattern, ours, name)
        value = value.float()
        parts[name] = value[:, :, None, None] if re.search(r"\.(?:q|k|v|proj)\.weight$", name) else value
    joined = {}
    for name, value in parts.items():
        match = re.fullmatch(r"(.*)\.q\.(weight|bias)", name)
        if match:
            place, kind = match.groups()
            three = [parts[n] for n in (f"{place}.{x}.{kind}" for x in "qkv") if n in parts]
            joined[f"{place}.qkv.{kind}"] = torch.cat(three)
        elif not re.search(r"\.[kv]\.(?:weight|bias)$", name):
            joined[name] = value
    return joined


# ---------------------------------------------------------------- a run


def make_run(path: Path, config: Config, weights: "dict[str, Tensor]") -> None:
    """A run directory, whole or not at all, whose one checkpoint of the last step has `weights` as model and as EMA.

    There is no optimizer's state in it, and no digest of training data: submitting it again is refused.
    """
    from ddpm.run.fence import Fence
    from ddpm.run.saving import Checkpointer

    site = Site()
    cache = prepare.cache_of(site, path.parent)
    data = {"cache": str(cache / "data"), "key": None, "digest": None, "num_images": None, "scratch": None}
    tmp = RunDir(path.with_name(f"{TMP_PREFIX}{path.name}.converted.{os.getpid()}"))
    try:
        directory.create_run(tmp, config, directory.describe(config, site, RunDir(path), {"data": data}))
        fence = Fence(tmp, {}, wait_s=0)
        saver = Checkpointer(
            tmp,
            fence,
            keep_last=1,
            is_milestone=lambda step: False,
            world_size=1,
            log=print,
            on_saved=lambda step, sha256: None,
        )
        step = config.train.total_steps
        state = {"step": step, "images": step * config.train.global_batch, "config_digest": config.digest()}
        saver.save({**state, "extra": {}, "model": weights, "ema": weights}, wait=True, final=True)
        fence.release()
        tmp.path.rename(path)
    finally:
        shutil.rmtree(tmp.path, ignore_errors=True)


def main() -> int:
    args = parse()
    out, run = args.out.expanduser(), args.run.expanduser().absolute() if args.run else None
    if out.suffix != ".safetensors":
        raise RequestError(f"{out}: name it OUT.safetensors")
    for path in (out, run):
        if path is not None and path.exists():
            raise RequestError(f"{path} exists: choose another name, or move it away")
        if path is not None:
            console.check_outside_runs(path, "OUT" if path is out else "--run")
    if run is not None:
        check_name(run.name)
    name = run.name if run is not None else out.stem
    folder = find(args.source.expanduser())
    config, changes = fit(folder, args.config, [f"name={name}", *args.changes])
    if run is not None and config.train.total_steps is None:
        raise RequestError(
            f"{args.config}: the run needs train.total_steps, the steps that the weights were trained for"
        )

    from safetensors.torch import save

    from ddpm.api import build_model
    from ddpm.network.weights import set_weights

    source, theirs = read_weights(folder.network)
    network = build_model(config, "cpu")
    set_weights(network, rename(unwrapped(theirs)), str(source))
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, save(weights, metadata={"step": str(config.train.total_steps or 0)}))
    print(f"{out}: {sum(p.numel() for p in network.parameters()):,} parameters of {source}")
    print(f"they fit {args.config} with {shlex.join(changes)}")
    print(f'  ddpm.load("{out}", config=ddpm.load_config("{args.config}", {json.dumps(changes)}))')
    if run is not None:
        run.parent.mkdir(parents=True, exist_ok=True)
        make_run(run, config, weights)
        print(f"{run}: sample it with\n  python launch/sample.py {shlex.quote(str(run))} --sampler ancestral")
    return 0


if __name__ == "__main__":
    console.run_script(main)
