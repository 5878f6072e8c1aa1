"""tools/convert_diffusers.py: the network with converted weights is diffusers' network, and what cannot be is refused.

Relative error at most 1e-5 in float32: the largest difference over the largest value. The weights are random: the
published ones are not needed to see that every tensor is in its place.
"""

from __future__ import annotations

import contextlib
import copy as copy_module
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

import ddpm
from ddpm.config import reading
from ddpm.diffusion import samplers
from ddpm.errors import RequestError
from ddpm.run import generations
from ddpm.run.paths import RunDir
from ddpm.run.records import read_metrics, read_run
from launch import origin, submission
from launch.queue import borrowing
from launch.terminal import inspection, overview
from tests import forked
from tests.conftest import PROJECT
from tests.draws import drawn
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


def scripted(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """As it is typed in the project."""
    return forked.run([sys.executable, str(PROJECT / script), *map(str, words)], PROJECT, {**os.environ}, timeout=240)


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


@pytest.mark.long
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
    for word in (run.path, tmp_path / "out.safetensors"):  # both can be trained on
        start = origin.read(origin.Origin(str(word), None, None, None), reading.of_run(run))
        weights = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in load(start.data).items())

    for script in ("sample", "evaluate"):
        done = scripted(f"launch/{script}.py", run.path, "--set", "four", "--cluster", "local")
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run.eval / "four.json").read_text())["frechet_distance"] > 0
    with np.load(run.sample_set("four").shard(0, 1)) as shard:
        assert np.array_equal(shard["images"], ddpm.load(run.path).sample(4))  # where the script computes, too
    with pytest.raises(RequestError, match=r"trained elsewhere: .* --from /.*theirs, with another --name"):
        borrowing.check_trainable(run)
    with pytest.raises(RequestError, match=r"a folder in diffusers' layout; make a run of it \(python tools/convert_"):
        origin.read(origin.Origin(str(tmp_path / "published"), None, None, None), reading.of_run(run))
    longer = reading.of_run(run, ["train.total_steps=800010"])
    with pytest.raises(RequestError, match=r"trained elsewhere"):
        submission.check_dry(submission.Asked(run, longer, longer, []))
    again = refused(tmp_path / "published", tmp_path / "again.safetensors", "--run", run.path)
    assert "theirs exists: choose another name" in again


def test_nothing_is_amiss_with_a_run_of_them_though_no_training_is_told(tmp_path):
    publish(tmp_path / "published", SMALL)
    run = RunDir(tmp_path / "runs" / "theirs")
    convert(tmp_path / "published", tmp_path / "out.safetensors", "data.name=digits", "--run", run.path)
    assert overview.describe(run, {})["problem"] is None
    assert {line.verdict for line in inspection.look(run)} == {"holds"}

    run.ema_weights(800_000).write_bytes(b"")
    run.checkpoint(800_000).write_bytes(b"")
    assert "is not whole" in overview.describe(run, {})["problem"]
    assert "damaged" in {line.verdict for line in inspection.look(run)}


@pytest.mark.long
@pytest.mark.parametrize("source", drawn("trains on from", ["the run", "the file"], 1))
def test_a_new_run_trains_on_from_them(tmp_path, source):
    """With an optimizer, data and a length of its own; so slowly that what it has learned is less than rounding."""
    publish(tmp_path / "published", SMALL)
    out, runs = tmp_path / "out.safetensors", tmp_path / "runs"
    convert(tmp_path / "published", out, "data.name=digits", "--run", runs / "theirs")
    words = [runs / "theirs" / "config.yaml", "--from", runs / "theirs" if source == "the run" else out, "--name", "on"]
    words += [
        "train.total_steps=3",
        "train.global_batch=4",
        "train.lr=1e-9",
        "train.warmup_steps=0",
        "log.every_steps=1",
    ]
    words += ["log.grid_images=1", "--cluster", "local", "--wait", "--root", runs]
    done = scripted("launch/submit.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(runs / "on")
    began = read_run(run)["from"]
    assert began["source"] == str(words[2]) and began["step"] == 800_000
    state, weights = generations.load(run, 3), load_file(out)
    assert state["step"] == 3 and len(state["optimizer"]["state"]) == len(weights)
    for name, value in weights.items():
        assert torch.allclose(state["model"][name], value, atol=1e-6)
    losses = [line["loss"] for line in read_metrics(run)]
    assert len(losses) == 3 and all(map(math.isfinite, losses))


# ---------------------------------------------------------------- whole pipelines, as they are saved


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A DDPMPipeline with random weights, with nothing as ours have it by default. Tests leave it as it is."""
    torch.manual_seed(3)
    unet = diffusers.UNet2DModel(**SMALL).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", clip_sample=False
    )
    return diffusers.DDPMPipeline(unet, scheduler)


SAVED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "pickled": {"safe_serialization": False},
    "in shards": {"max_shard_size": "500KB"},
    "pickled in shards": {"max_shard_size": "500KB", "safe_serialization": False},
}


@pytest.mark.parametrize("how", SAVED)
def test_a_whole_pipeline_is_ours_however_it_was_saved(tmp_path, pipeline, how):
    pipeline.save_pretrained(tmp_path / "pipeline", **SAVED[how])
    model = loaded(convert(tmp_path / "pipeline", tmp_path / "out.safetensors"))
    assert_same_network_up_to(model, pipeline.unet, 39)


@pytest.mark.parametrize("how", ["as it is", "in shards", "pickled in shards"])
def test_half_precision_weights_are_those_that_were_rounded(tmp_path, pipeline, how):
    half = copy_of(pipeline.unet).half().float()
    pipeline.save_pretrained(tmp_path / "pipeline", variant="fp16", **SAVED[how])
    for path in (tmp_path / "pipeline" / "unet").glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    for path in (tmp_path / "pipeline" / "unet").glob("*.bin"):
        torch.save({name: value.half() for name, value in torch.load(path).items()}, path)
    assert_same_network_up_to(loaded(convert(tmp_path / "pipeline", tmp_path / "out.safetensors")), half, 39)


def copy_of(unet: Any) -> Any:
    return copy_module.deepcopy(unet)


def assert_same_network_up_to(model: ddpm.Model, unet: Any, last: int) -> None:
    x_t, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, last])
    with torch.no_grad():
        assert relative(model.eps(x_t, t), unet(x_t, t).sample) <= LIMIT


@pytest.mark.parametrize(
    "process",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.3, "clip_sample": True},
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_small", "clip_sample": True},
    ],
)
def test_its_scheduler_steps_as_ours(tmp_path, pipeline, process):
    theirs = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, **process)
    diffusers.DDPMPipeline(pipeline.unet, theirs).save_pretrained(tmp_path / "pipeline")
    model = loaded(convert(tmp_path / "pipeline", tmp_path / "out.safetensors"))
    config, shape = model.config, (2, 3, 16, 16)

    def draws() -> Any:
        generator = torch.Generator().manual_seed(9)
        return lambda _: torch.randn(shape, generator=generator)

    x_t = x_T = draws()(0)
    theirs.alphas_cumprod = torch.cumprod(1.0 - theirs.betas.double(), 0)  # tests/unit/diffusion says why
    theirs.set_timesteps(40)
    noise, generator = draws(), torch.Generator().manual_seed(9)
    for t in theirs.timesteps:
        with torch.no_grad():
            x_t = theirs.step(pipeline.unet(x_t, t).sample, int(t), x_t, generator=generator).prev_sample
    ours = samplers.sample(
        lambda x_t, t: model.eps(x_t, t),
        samplers.ancestral(model.schedule, 40, variance=config.diffusion.variance),
        x_T,
        noise=noise,
        clip_x_0=config.sample.clip_x_0,
    ).x_0
    assert relative(ours, x_t) <= 2 * LIMIT  # seen: 7e-6; with the other variance 1.3e-4 and more


def test_a_ddim_pipeline_says_all_but_the_variance(tmp_path, pipeline):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    diffusers.DDIMPipeline(pipeline.unet, scheduler).save_pretrained(tmp_path / "pipeline")
    config = loaded(convert(tmp_path / "pipeline", tmp_path / "out.safetensors")).config
    assert (config.diffusion.schedule, config.diffusion.timesteps, config.sample.clip_x_0) == ("cosine", 40, True)
    assert config.diffusion.variance == "fixed_large"


def test_what_a_pipeline_lacks_or_is_is_named(tmp_path, pipeline, capsys):
    folder, out = tmp_path / "pipeline", tmp_path / "out.safetensors"
    pipeline.save_pretrained(folder, max_shard_size="500KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shard = sorted((folder / "unet").glob("*00002*"))[0]
    whole = shard.read_bytes()
    shard.unlink()
    assert f"{index}: names {shard.name}, which is not there; download it into {folder / 'unet'}" in refused(
        folder, out
    )
    save_file({"other": torch.zeros(1)}, shard)
    assert f"{index}: {shard.name} does not hold " in refused(folder, out)
    shard.write_bytes(whole)
    record = json.loads(index.read_text())
    index.write_text(json.dumps({**record, "weight_map": {"a": "../a.safetensors"}}))
    assert "says no weight_map, from tensors to files beside it" in refused(folder, out)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_schedule": "sigmoid"}))
    assert f"{scheduler}: beta_schedule = 'sigmoid': only linear, " in refused(folder, out)
    model = folder / "model_index.json"
    model.write_text(json.dumps({**json.loads(model.read_text()), "_class_name": "LDMPipeline"}))
    assert f"{model}: _class_name = 'LDMPipeline': only DDPMPipeline and DDIMPipeline can" in refused(folder, out)
    assert not out.exists()


def test_wrapped_weights_and_unknown_keys_do_no_harm(tmp_path, pipeline, capsys):
    folder, out = tmp_path / "pipeline", tmp_path / "out.safetensors"
    pipeline.save_pretrained(folder)
    convert(folder, out, "name=same")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    wrapped = {f"module._orig_mod.{name}": value for name, value in load_file(weights).items()}
    save_file(wrapped, weights, metadata={"step": "best"})
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "tensor_format": "pt"}))
    convert(folder, tmp_path / "again.safetensors", "name=same")
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert f"warning: {scheduler}: tensor_format = 'pt': not known here, and left out" in capsys.readouterr().err


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
        ({"beta_schedule": "scaled_linear"}, "beta_schedule = 'scaled_linear': only linear, squaredcos_cap_v2 can"),
        ({"variance_type": "learned"}, "variance_type = 'learned': only fixed_small, fixed_small_log, fixed_large can"),
        ({"variance_type": "fixed_large_log"}, "variance_type = 'fixed_large_log': only "),
        ({"beta_end": None}, "beta_end = None: must be a number"),
        ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction': only 'epsilon' can be converted"),
        ({"thresholding": True}, "thresholding = True: only False"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True: only False"),
        ({"clip_sample_range": 2.0}, "clip_sample_range = 2.0: only 1.0"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas = [0.1, 0.2]: only None"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one = False: only True"),
        ({"_class_name": "PNDMScheduler"}, "_class_name = 'PNDMScheduler': only DDPMScheduler, DDIMScheduler can"),
    ],
)
def test_a_process_that_ours_cannot_be_is_refused(copy, change, message):
    (copy / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **change}))
    assert message in refused(copy, copy / "out.safetensors")


def test_files_that_are_missing_or_damaged_are_named(copy, tmp_path):
    weights, out = copy / "diffusion_pytorch_model.safetensors", tmp_path / "out.safetensors"
    assert "config.json does not exist: give the folder" in refused(tmp_path / "nowhere", out)
    weights.write_bytes(weights.read_bytes()[:-9])
    assert f"{weights}: not a readable .safetensors file" in refused(copy, out)
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
    done = scripted("tools/convert_diffusers.py", published, there)
    assert done.returncode == 2
    assert done.stderr == f"error: {there} exists: choose another name, or move it away\n" and done.stdout == ""
    assert there.read_bytes() == b"mine"
    assert "name it OUT.safetensors" in refused(published, tmp_path / "out.pt")
