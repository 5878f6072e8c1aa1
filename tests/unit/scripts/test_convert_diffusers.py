"""tools/convert_diffusers.py: the network with converted weights is diffusers' network, and what cannot be is refused.

Relative error at most 1e-5 in float32: the largest difference over the largest value. The weights are random: the
published ones are not needed to see that every tensor is in its place.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ddpm
from ddpm.errors import RequestError
from ddpm.run import generations
from ddpm.run.paths import RunDir
from tests.conftest import PROJECT
from tools import convert_diffusers

diffusers = pytest.importorskip("diffusers")

LIMIT = 1e-5
HO: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
"""google/ddpm-cifar10-32."""
SMALL: dict[str, Any] = {
    **HO,
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SCHEDULER = {"beta_schedule": "linear", "num_train_timesteps": 1000, "variance_type": "fixed_small"}


def publish(folder: Path, options: dict[str, Any], *, seed: int = 0) -> Any:
    """A UNet2DModel with random weights, none zero, saved as such models are published; returns it."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(**options).eval()
    with torch.no_grad():
        for parameter in unet.parameters():  # norms begin at one, biases at zero: those would hide a wrong place
            parameter.add_(0.05 * torch.randn_like(parameter))
    unet.save_pretrained(folder)
    return unet


def convert(*args: str | Path) -> str:
    """Run it in this process; returns what it printed. Raises what it refuses with."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["tools/convert_diffusers.py", *map(str, args)])
        assert convert_diffusers.main() == 0
    return printed.getvalue()


def refused(*args: str | Path) -> str:
    """Run it and expect a refusal; returns its message."""
    with pytest.raises(RequestError) as refusal:
        convert(*args)
    return str(refusal.value)


def loaded(printed: str) -> ddpm.Model:
    """What the line of Python gives that it printed, on the CPU."""
    line = next(line for line in printed.splitlines() if "ddpm.load(" in line)
    return eval(line.strip().replace(", config=", ", device='cpu', config="), {"ddpm": ddpm})


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape and expected.isfinite().all()
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_same_network(model: ddpm.Model, unet: Any, size: int) -> None:
    x_t = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    for t in (torch.tensor([0, 999]), torch.tensor([417, 3])):
        with torch.no_grad():
            expected = unet(x_t, t).sample
        assert expected.std() > 0.01
        assert relative(model.eps(x_t, t), expected) <= LIMIT


def test_the_published_cifar10_network_is_ours_to_rounding(tmp_path):
    unet = publish(tmp_path / "published", HO)
    printed = convert(tmp_path / "published", tmp_path / "ho.safetensors")
    assert "35,746,307 parameters" in printed
    assert "cifar10.yaml with name=ho model.downsample=conv_asymmetric\n" in printed
    model = loaded(printed)
    assert model.step == 800_000
    assert_same_network(model, unet, 32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"downsample_padding": 1},
        {"block_out_channels": (32, 32, 96), "layers_per_block": 2, "norm_num_groups": 16}
        | {"down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D")}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D")},
        {"attention_head_dim": 16},
        {"up_block_types": ("UpBlock2D", "UpBlock2D"), "add_attention": False},
        {"down_block_types": ("DownBlock2D", "DownBlock2D")},
        {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")},
    ],
)
def test_other_structures_are_ours_to_rounding(tmp_path, options):
    unet = publish(tmp_path / "published", {**SMALL, **options})
    assert_same_network(loaded(convert(tmp_path / "published", tmp_path / "out.safetensors")), unet, 16)


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that the attention of the first published models has."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    return state


def test_pickled_weights_and_old_names_give_the_same_file(tmp_path):
    publish(tmp_path / "new", SMALL)
    convert(tmp_path / "new", tmp_path / "new.safetensors")
    file = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
    state = old_names(load_file(file))
    assert any(".query." in name for name in state)
    file.unlink()
    torch.save(state, file.with_suffix(".bin"))
    convert(tmp_path / "new", tmp_path / "old.safetensors", "name=new")
    assert (tmp_path / "old.safetensors").read_bytes() == (tmp_path / "new.safetensors").read_bytes()


def test_the_scheduler_beside_it_says_betas_and_variance(tmp_path):
    publish(tmp_path / "published", SMALL)
    scheduler = {**SCHEDULER, "num_train_timesteps": 500, "beta_start": 3e-4, "beta_end": 0.01}
    (tmp_path / "published" / "scheduler_config.json").write_text(json.dumps(scheduler))
    model = loaded(convert(tmp_path / "published", tmp_path / "out.safetensors"))
    theirs = diffusers.DDPMScheduler(**scheduler)
    assert relative(model.schedule.beta, theirs.betas) <= LIMIT
    assert model.config.diffusion.variance == "fixed_small"


def test_a_run_of_them_is_sampled_and_scored_by_the_scripts(tmp_path):
    unet = publish(tmp_path / "published", SMALL)
    run = RunDir(tmp_path / "runs" / "theirs")
    changes = [
        "sample.num_samples=4",
        "sample.shards=1",
        "sample.steps=2",
        "data.name=digits",
        "evaluate.extractor=pixels",
    ]
    convert(tmp_path / "published", tmp_path / "out.safetensors", *changes, "--run", run.path)
    assert list(run.path.parent.glob(".tmp-*")) == []
    assert generations.verify(run, 800_000).step == 800_000
    assert_same_network(ddpm.load(run.path, device="cpu"), unet, 16)
    assert run.ema_weights(800_000).read_bytes() == (tmp_path / "out.safetensors").read_bytes()

    for script in ("sample", "evaluate"):
        argv = [sys.executable, str(PROJECT / "launch" / f"{script}.py"), str(run.path), "--set", "four"]
        done = subprocess.run([*argv, "--cluster", "local"], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run.eval / "four.json").read_text())["frechet_distance"] > 0
    with np.load(run.sample_set("four").shard(0, 1)) as shard:
        assert np.array_equal(shard["images"], ddpm.load(run.path).sample(4))  # where the script computes, too
    again = refused(tmp_path / "published", tmp_path / "again.safetensors", "--run", run.path)
    assert "theirs exists: choose another name" in again


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small published model. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("small") / "published"
    publish(folder, SMALL)
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "only UNet2DModel can be converted"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05: only 1e-06 can be converted"),
        ({"norm_eps": ...}, "norm_eps = 1e-05, which is what leaving it out means: only 1e-06"),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos = True: only False"),
        ({"num_class_embeds": 10}, "num_class_embeds = 10: only None"),
        ({"block_out_channels": [32, 40]}, "block_out_channels = [32, 40]: must be multiples of the first"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "must attend where down_block_types do"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "must be a list of DownBlock2D and AttnDownBlock2D"),
        ({"down_block_types": ["DownBlock2D"]}, "needs 2 entries"),
        ({"downsample_padding": 2}, "downsample_padding = 2: must be 0 or 1"),
        ({"sample_size": None}, "sample_size = None: must be the height and width"),
        ({"layers_per_block": 2}, "not the weights of the config's network"),
        ({"norm_num_groups": 5}, "model.norm_groups = 5: does not divide"),
    ],
)
def test_a_network_that_ours_cannot_be_is_refused(copy, change, message):
    record = json.loads((copy / "config.json").read_text())
    record = {key: value for key, value in {**record, **change}.items() if value is not ...}
    (copy / "config.json").write_text(json.dumps(record))
    out = copy / "out.safetensors"
    assert message in refused(copy, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "scaled_linear"}, "only 'linear'"),
        ({"variance_type": "learned"}, "diffusion.variance"),
        ({"beta_end": None}, "beta_end = None: must be a number"),
    ],
)
def test_a_process_that_ours_cannot_be_is_refused(copy, change, message):
    (copy / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **change}))
    assert message in refused(copy, copy / "out.safetensors")


def test_files_that_are_missing_or_damaged_are_named(copy, tmp_path):
    weights, out = copy / "diffusion_pytorch_model.safetensors", tmp_path / "out.safetensors"
    assert "config.json does not exist: give the folder" in refused(tmp_path / "nowhere", out)
    weights.write_bytes(weights.read_bytes()[:-9])
    assert f"{weights}: not a readable file of weights" in refused(copy, out)
    weights.unlink()
    assert f"{copy}: holds none of diffusion_pytorch_model.safetensors, " in refused(copy, out)
    torch.save([torch.zeros(1)], weights.with_suffix(".bin"))
    assert "diffusion_pytorch_model.bin: holds a list, not tensors by name" in refused(copy, out)
    weights.with_suffix(".bin").write_bytes(b"no pickle")
    assert "diffusion_pytorch_model.bin: not a readable file of weights" in refused(copy, out)
    (copy / "config.json").write_text("{")
    assert "config.json: not JSON" in refused(copy, out)
    assert not out.exists()


def test_a_tensor_too_many_is_noticed(copy):
    weights = copy / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), "down_blocks.7.conv.bias": torch.zeros(1)}, weights)
    assert "such as encoder.7.conv.bias" in refused(copy, copy / "out.safetensors")


def test_nothing_is_overwritten_and_the_name_must_say_what_it_is(published, tmp_path):
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    script = [sys.executable, str(PROJECT / "tools" / "convert_diffusers.py"), str(published), str(there)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr == f"error: {there} exists: choose another name, or move it away\n" and done.stdout == ""
    assert there.read_bytes() == b"mine"
    assert "name it OUT.safetensors" in refused(published, tmp_path / "out.pt")
