"""The package as a library: README's code as it stands there, loading and its refusals, and the bytes of samples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm.config import reading
from ddpm.config import section as sections
from ddpm.config.schema import Config
from ddpm.diffusion import schedule
from ddpm.errors import RequestError
from ddpm.network import device
from ddpm.network.build import build_model
from ddpm.network.weights import load_network
from ddpm.run import generations, saving
from ddpm.run.fence import Fence
from ddpm.run.paths import RunDir
from ddpm.sampling.denoiser import Denoiser
from ddpm.sampling.generate import generate_shard
from ddpm.sampling.request import CheckpointRef, from_config, publish_request
from ddpm.sampling.shards import verify_shard
from launch.export import export
from tests.conftest import PROJECT

CPU = torch.device("cpu")
# more channels than groups: GroupNorm would take t and the class away again
TINY: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 8, "flip": False},
    "model": {
        "base_channels": 8,
        "channel_mults": [1],
        "norm_groups": 2,
        "blocks_per_level": 1,
        "attention_resolutions": [],
    },
    "diffusion": {"timesteps": 100, "beta_end": 5.0e-4},  # not much noise: few pixels of a random network are 0 or 255
    "sample": {"steps": 4, "num_samples": 10, "shards": 2, "batch": 4},
}
WITH_CLASSES = {"model__num_classes": 3, "train__label_dropout": 0.1}


def make_config(**changes: Any) -> Config:
    """The tiny config with changes as SECTION__KEY=value."""
    tree = {section: dict(fields) for section, fields in TINY.items()}
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        tree.setdefault(section, {})[leaf] = value
    return sections.build(Config, tree, "test")


def make_weights(made: Config, seed: int) -> dict[str, torch.Tensor]:
    """As if trained: no weight is zero any more."""
    random = torch.Generator().manual_seed(seed)
    state = build_model(made, CPU, "fp32").state_dict()
    return {name: value + 0.1 * torch.randn(value.shape, generator=random) for name, value in state.items()}


def make_run(path: Path, made: Config, steps: tuple[int, ...] = (10, 20), *, amp: str = "off") -> RunDir:
    """A run whose checkpoints, the last one a milestone, hold weights of their own."""
    run = RunDir(path)
    path.mkdir(parents=True)
    run.config.write_text(made.to_yaml())
    run.run_json.write_text(json.dumps({"resolved": {"amp": amp}}))
    fence = Fence(run, {}, wait_s=0)
    saver = saving.Checkpointer(
        run,
        fence,
        keep_last=9,
        is_milestone=lambda step: False,
        world_size=1,
        log=print,
        on_saved=lambda step, sha256: None,
    )
    for step in steps:
        state = {"step": step, "images": 0, "config_digest": made.digest(), "extra": {}}
        weights = {"ema": make_weights(made, step), "model": make_weights(made, step + 1)}
        saver.save({**state, **weights}, wait=True, final=step == steps[-1])
    fence.release()
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs" / "tiny", make_config())


def load(path: str | Path, **options: Any) -> ddpm.Model:
    """On the CPU, where what it is compared with is computed."""
    return ddpm.load(path, device="cpu", **options)


def same_weights(network: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------- whose weights


# ---------------------------------------------------------------- names


def test_weights_that_fit_and_were_trained_with_other_mathematics_are_refused(run: RunDir) -> None:
    other = make_run(run.path.parent / "other", make_config(diffusion__beta_end=4.0e-4))
    for path in other.checkpoints.glob("step-*"):
        shutil.copy(path, run.checkpoints)
    with pytest.raises(RequestError, match=r"step-000000020\.pt belongs to other mathematics"):
        load(run.path)


def test_importing_the_package_loads_no_torch_and_its_names_do():
    code = (
        "import sys, ddpm\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "ddpm.load\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=120)


def test_every_name_that_the_package_lists_is_there():
    assert {"load", "Model", "EMA", "Diffusion"} <= set(dir(ddpm))
    for name in dir(ddpm):
        assert name.startswith("_") or getattr(ddpm, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = ddpm.lode


# ---------------------------------------------------------------- README


def readme_code() -> list[str]:
    """The Python blocks of README's section on the library."""
    text = (PROJECT / "README.md").read_text()
    section = re.search(r"^## As a library\n(.*?)(?=^## )", text + "\n## ", re.DOTALL | re.MULTILINE)
    assert section, "README.md has no section `## As a library`"
    return re.findall(r"^```python\n(.*?)^```", section.group(1), re.DOTALL | re.MULTILINE)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has the project's configs, and no runs."""
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readmes_sampling_runs_as_it_stands(elsewhere):
    made = make_run(elsewhere / "runs" / "cifar10", make_config())
    names: dict[str, Any] = {}
    exec(readme_code()[0], names)
    assert names["images"].shape == (64, 8, 8, 3) and names["images"].dtype == np.uint8
    assert same_weights(names["model"].network, generations.load(made, 20)["ema"])
    shutil.rmtree(made.path)
    made = make_run(made.path, make_config(**WITH_CLASSES), steps=(10,))
    exec(readme_code()[0].replace("steps=100, ", ""), names)
    assert np.array_equal(names["images"], load(made.path).sample(64, labels="0"))
    assert Image.open("grid.png").width == Image.open("grid.png").height


def test_readmes_training_loop_runs_as_it_stands_and_learns(elsewhere):
    code = readme_code()[1]
    assert len([line for line in code.splitlines() if line]) <= 15
    losses: list[float] = []
    torch.manual_seed(0)
    exec(
        code.replace("    loss.backward()\n", "    loss.backward()\n    losses.append(loss.item())\n"),
        {"losses": losses},
    )
    assert len(losses) == 100
    assert np.mean(losses[-10:]) < 0.4 < np.mean(losses[:10])


@pytest.mark.parametrize("overrides", ["", ', "model.num_classes=2"'])
def test_readmes_training_loop_takes_any_torch_dataset_also_for_a_model_of_classes(elsewhere, overrides):
    for i in range(64):
        path = elsewhere / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (4 * i, 0, 0)).save(path)
    _, loop, loader = readme_code()
    (first,) = (line for line in loop.splitlines() if "ddpm.batches" in line)
    names: dict[str, Any] = {}
    code = loop.replace(first + "\n", loader).replace(
        '["train.global_batch=32"', f'["train.global_batch=32"{overrides}'
    )
    exec(code.replace(".sample(16)", '.sample(2, sampler="ddim", steps=2)'), names)
    assert names["step"] == 2 and names["loss"].isfinite() and names["images"].shape == (2, 8, 8, 3)
    assert names["config"].model.num_classes == (2 if overrides else 0)


# ---------------------------------------------------------------- loading


def test_the_newest_ema_is_loaded_unless_another_is_asked_for(run):
    model = load(run.path)
    assert model.step == 20 and not model.network.training
    assert same_weights(model.network, generations.load(run, 20)["ema"])
    assert model.config == reading.load(run.config)
    assert torch.equal(model.schedule.alpha_bar, schedule.build(model.config.diffusion).alpha_bar)
    assert same_weights(load(str(run.path), step=10).network, generations.load(run, 10)["ema"])
    assert same_weights(load(run.path, weights="model").network, generations.load(run, 20)["model"])


def test_the_weights_that_the_config_samples_are_loaded_unless_others_are_asked_for(tmp_path):
    run = make_run(tmp_path / "run", make_config(sample__weights="model"))
    weights = generations.load(run, 20)
    assert load(run.path).weights == "model" and same_weights(load(run.path).network, weights["model"])
    assert same_weights(load(run.path, weights="ema").network, weights["ema"])
    assert same_weights(load(run.ema_weights(20), config=run.config).network, weights["ema"])  # it has no others


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(run, capsys):
    flip_a_bit(run.checkpoint(20))
    assert load(run.path).step == 10
    assert "checkpoint rejected: step=20" in capsys.readouterr().err


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run):
    flip_a_bit(run.checkpoint(20))
    with pytest.raises(RequestError, match=r"step 20 cannot be used: .*sha256.*; others: \[10\]"):
        load(run.path, step=20)


def test_a_run_of_damaged_checkpoints_is_no_run_without_any(run):
    for step in (10, 20):
        flip_a_bit(run.checkpoint(step))
    with pytest.raises(generations.NoneHolds, match=r"every checkpoint in .* is damaged"):
        load(run.path)


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(RequestError, match=r"no checkpoint of step 15; it has \[10, 20\]"):
        load(run.path, step=15)
    with pytest.raises(RequestError, match=rf"\.pt is a checkpoint of a run: load that, '{run.path}' with step=20"):
        load(run.checkpoint(20))
    with pytest.raises(RequestError, match="nowhere: no run directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="empty has no checkpoint yet"):
        load(make_run(tmp_path / "empty", make_config(), steps=()).path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "both"}, "weights = 'both': use ema or model"),
        ({"precision": "fp16"}, "precision = 'fp16': use one of fp32, bf16"),
        ({"config": "configs/cifar10.yaml"}, "is a run and has its own"),
        *(({"device": name}, f"device = '{name}': ") for name in ("tpu", "nowhere", "cuda:99")),
    ],
)
def test_options_that_no_run_has_are_refused(run, options, message):
    with pytest.raises(RequestError, match=message):
        ddpm.load(run.path, **{"device": "cpu", **options})


def test_a_run_that_was_trained_in_bf16_is_sampled_in_it_as_the_scripts_do(tmp_path):
    run = make_run(tmp_path / "run", make_config(), amp="bf16")
    model = load(run.path)
    assert model.precision == "bf16" and load(run.path, precision="fp32").precision == "fp32"
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 90])
    difference = model.eps(x_t, t) - load(run.path, precision="fp32").eps(x_t, t)
    assert 0 < difference.abs().max() < 0.1


def test_ema_weights_in_a_file_are_the_runs_model(run):
    file = run.ema_weights(20)
    for given in (make_config(), run.config, str(run.config)):
        model = load(file, config=given)
        assert model.step == 20
        assert same_weights(model.network, generations.load(run, 20)["ema"])
    assert np.array_equal(model.sample(3), load(run.path).sample(3))


def test_a_file_that_is_no_weights_of_that_network_is_refused(run, tmp_path):
    file = run.ema_weights(20)
    with pytest.raises(RequestError, match="give config=, a Config or its YAML"):
        load(file)
    with pytest.raises(RequestError, match="step and weights go with a run"):
        load(file, config=make_config(), step=20)
    with pytest.raises(RequestError, match=r"not the weights of the config's network: .* such as bottleneck"):
        load(file, config=make_config(model__base_channels=16))
    with pytest.raises(RequestError, match=r"1 of its .* such as class_embedding.weight"):
        load(file, config=make_config(model__num_classes=3))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(RequestError, match=r"broken.safetensors: not a readable \.safetensors file"):
        load(broken, config=make_config())


# ---------------------------------------------------------------- saving


def test_a_saved_model_is_loaded_again_without_its_config(run, tmp_path):
    model = load(run.path, step=10, weights="model")
    model.save(tmp_path / "mine.safetensors")
    again = load(tmp_path / "mine.safetensors")
    assert again.config == model.config and again.step == 10
    assert same_weights(again.network, dict(model.network.state_dict()))
    assert np.array_equal(again.sample(3), model.sample(3))
    with pytest.raises(RequestError, match=r"mine\.safetensors exists: choose another name"):
        model.save(tmp_path / "mine.safetensors")
    with pytest.raises(RequestError, match=r"there is no folder .*nowhere; make it"):
        model.save(tmp_path / "nowhere" / "x.safetensors")
    for path, told in ((tmp_path / "a.yaml", "has no .yaml file"), (tmp_path / "b" / "a.yaml", "there is no folder")):
        with pytest.raises(RequestError, match=f"a.yaml does not exist; .*{told}"):
            ddpm.load_config(path)
    with pytest.raises(RequestError, match="3 is not key=value"):
        ddpm.load_config(run.config, [3])
    with pytest.raises(RequestError, match=r"mine\.pt: name it NAME\.safetensors"):
        ddpm.save(model.network, tmp_path / "mine.pt")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["mine.safetensors"]


def test_an_average_of_ones_own_is_saved_however_it_lies_in_memory(tmp_path):
    config = make_config()
    network = ddpm.build_model(config, "cpu").to(memory_format=torch.channels_last)
    average = ddpm.EMA(network, 0.9)
    assert any(not value.is_contiguous() for value in average.state_dict().values())
    ddpm.save(average, tmp_path / "average.safetensors", step=7)
    with pytest.raises(RequestError, match="give config=, a Config or its YAML"):
        load(tmp_path / "average.safetensors")
    model = load(tmp_path / "average.safetensors", config=config)
    assert model.step == 7 and same_weights(model.network, dict(network.state_dict()))


def test_a_model_says_what_it_is(tmp_path, run):
    assert repr(load(run.path)) == "<Model run: ema of step 20, 10,883 parameters, 8x8, fp32 on cpu>"
    labelled = load(make_run(tmp_path / "labelled", make_config(**WITH_CLASSES)).path)
    assert "8x8, 3 classes, fp32 on cpu>" in repr(labelled) and labelled.classes == ["0", "1", "2"]


def test_a_class_goes_by_its_name_or_its_number(tmp_path):
    run = make_run(tmp_path / "run", make_config(**WITH_CLASSES), steps=(10,))
    record = json.loads(run.run_json.read_text())
    run.run_json.write_text(json.dumps({**record, "labels": {"digest": "", "classes": {"cat": 4, "dog": 2, "eel": 1}}}))
    model = load(run.path)
    assert model.classes == ["cat", "dog", "eel"]
    dogs = model.sample(4, labels=[1] * 4)
    for labels in ("dog", 1, np.int64(1), ["dog", 1, "dog", 1]):
        assert np.array_equal(model.sample(4, labels=labels), dogs)
    assert not np.array_equal(model.sample(4, labels="cat"), dogs)
    with pytest.raises(RequestError, match="labels: no class 'cow'; there are cat, dog, eel"):
        model.sample(4, labels="cow")
    model.save(tmp_path / "mine.safetensors")
    assert load(tmp_path / "mine.safetensors").classes == ["cat", "dog", "eel"]
    export(run, tmp_path / "exported", None)
    assert load(tmp_path / "exported").classes == ["cat", "dog", "eel"]
    (tmp_path / "exported" / "classes.json").unlink()
    assert load(tmp_path / "exported").classes == ["0", "1", "2"]
    (tmp_path / "exported" / "classes.json").write_text("[")
    with pytest.raises(RequestError, match=r"classes\.json: no list of class names"):
        load(tmp_path / "exported")


# ---------------------------------------------------------------- samples


def test_eps_is_the_networks_output_without_gradients(run):
    model = load(run.path)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 90])
    eps = model.eps(x_t, t)
    assert not eps.requires_grad and torch.equal(eps, model.network(x_t, t).detach())


@pytest.mark.parametrize(
    ("t", "labels", "message"),
    [
        ([3, 100], [0, 1], r"t of shape \(2,\): must be 2 whole numbers from 0 to 99"),
        ([-1, 3], [0, 1], "t of shape"),
        ([3], [0, 1], r"t of shape \(1,\): must be 2"),
        ([3.0, 4.0], [0, 1], "t of shape"),
        ([3, 4], [0, 4], r"labels of shape \(2,\): must be 2 whole numbers from 0 to 3"),
        ([3, 4], [-1, 0], "labels of shape"),
        ([3, 4], None, "labels are missing"),
    ],
)
def test_eps_refuses_what_the_network_was_not_trained_on(tmp_path, t, labels, message):
    model = load(make_run(tmp_path / "run", make_config(**WITH_CLASSES)).path)
    x_t = torch.randn(2, 3, 8, 8)
    assert model.eps(x_t, torch.tensor([0, 99]), torch.tensor([2, 3])).isfinite().all()  # 3: no label
    with pytest.raises(ValueError, match=message):
        model.eps(x_t, torch.tensor(t), None if labels is None else torch.tensor(labels))


def published_set(run: RunDir, made: Config, *, class_plan: tuple[int, ...] | None = None) -> np.ndarray:
    """The images of the set that a sampling job makes of `made.sample`, by the parts that such a job calls."""
    generation = generations.verify(run, run.latest_step())
    reference = CheckpointRef(generation.step, generation.sha256)
    request = replace(from_config(made, reference, "fp32"), class_plan=class_plan)
    network = load_network(made, run, generation.step, request.weights, CPU, request.precision)
    where = run.sample_set("set")
    publish_request(where, request)
    images = []
    for shard in range(request.shards):
        generate_shard(where, request, shard, Denoiser.of(made, network, request.precision))
        images.append(verify_shard(where, request, shard).images)
    return np.concatenate(images)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sample__sampler": "ancestral", "sample__steps": 6, "sample__seed": 7},
        {"sample__eta": 0.5, "sample__batch": 64},
        {"sample__sampler": "dpmpp_2m", "sample__weights": "model"},
        {"model__num_classes": 3},
        {**WITH_CLASSES, "sample__guidance": 1.5},
    ],
)
def test_samples_are_the_bytes_of_a_sample_set(tmp_path, changes):
    made = make_config(**changes)
    run = make_run(tmp_path / "run", made)
    there = published_set(run, made)
    here = load(run.path).sample(10)
    assert here.shape == (10, 8, 8, 3) and here.dtype == np.uint8 and here.flags["C_CONTIGUOUS"]
    assert here.tobytes() == there.tobytes()
    assert len({image.tobytes() for image in here}) == 10


def test_arguments_mean_what_the_configs_keys_mean(tmp_path):
    asked = {"sampler": "ddim", "steps": 7, "eta": 0.3, "guidance": 0.5, "seed": 11, "batch": 3}
    run = make_run(tmp_path / "run", make_config(**WITH_CLASSES))
    there = published_set(run, make_config(**WITH_CLASSES, **{f"sample__{k}": v for k, v in asked.items()}))
    assert np.array_equal(load(run.path).sample(10, **asked), there)


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_labels_choose_the_class_of_each_image(tmp_path, guidance):
    changes = {**WITH_CLASSES, "sample__guidance": guidance}
    run = make_run(tmp_path / "run", make_config(**changes))
    there = published_set(run, make_config(**changes), class_plan=(5, 1, 4))
    model, plan = load(run.path), [0] * 5 + [1] + [2] * 4
    for labels in (plan, np.array(plan), torch.tensor(plan)):
        assert np.array_equal(model.sample(10, labels=labels), there)
    assert np.array_equal(model.sample(10, labels=[i % 3 for i in range(10)]), model.sample(10))
    assert not np.array_equal(model.sample(10), there)


def test_an_image_depends_on_seed_and_index_alone(run):
    model = load(run.path)
    torch.manual_seed(1)
    ten = model.sample(10, sampler="ancestral", batch=4)
    torch.manual_seed(2)
    assert np.array_equal(model.sample(6, sampler="ancestral", batch=4), ten[:6])
    assert not np.array_equal(model.sample(10, sampler="ancestral", batch=4, seed=1), ten)


def test_variance_is_the_ancestral_samplers(tmp_path):
    small, large = (
        make_config(diffusion__variance=v, sample__sampler="ancestral") for v in ("fixed_small", "fixed_large")
    )
    one, other = make_run(tmp_path / "small", small), make_run(tmp_path / "large", large)
    assert np.array_equal(load(other.path).sample(3, variance="fixed_small"), load(one.path).sample(3))
    assert not np.array_equal(load(other.path).sample(3), load(one.path).sample(3))
    with pytest.raises(RequestError, match="variance = fixed_small: only ancestral has one"):
        load(one.path).sample(3, sampler="ddim", variance="fixed_small")
    with pytest.raises(RequestError, match="variance = 'learned': use one of fixed_large, fixed_small"):
        load(one.path).sample(3, variance="learned")


def test_eta_stays_with_ddim(tmp_path):
    run = make_run(tmp_path / "run", make_config(sample__eta=0.5))
    plain = make_run(tmp_path / "plain", make_config())
    assert np.array_equal(load(run.path).sample(2, sampler="dpmpp_2m"), load(plain.path).sample(2, sampler="dpmpp_2m"))
    with pytest.raises(RequestError, match=r"sample\.eta = 0\.5: sampler=ancestral has none"):
        load(run.path).sample(2, sampler="ancestral", eta=0.5)


def test_every_network_call_has_as_many_rows_as_a_sample_sets(run):
    """Though the bytes of this network do not depend on it, those of another, or on another machine, may."""
    model, seen = load(run.path), []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for num, batch, rows in ((3, None, 3), (10, None, 4), (3, 64, 64)):
        seen.clear()
        model.sample(num, batch=batch)
        assert set(seen) == {rows}


def test_a_small_network_is_sampled_by_one_thread_whatever_the_caller_has_and_the_bytes_are_the_same(run, monkeypatch):
    """Two threads that wait for each other on busy cores take 20 times as long."""
    model, seen, before = load(run.path), [], torch.get_num_threads()
    model.network.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        by_one = model.sample(3)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        monkeypatch.setattr(device, "WORK_TO_SHARE", 0)
        assert np.array_equal(model.sample(3), by_one) and seen[-1] == 2
    finally:
        torch.set_num_threads(before)


def test_another_sampler_takes_its_own_usual_steps(run):
    model = load(run.path)
    assert np.array_equal(model.sample(2, sampler="ancestral"), model.sample(2, sampler="ancestral", steps=100))
    assert np.array_equal(model.sample(2, sampler="dpmpp_2m"), model.sample(2, sampler="dpmpp_2m", steps=20))
    assert np.array_equal(model.sample(2), model.sample(2, sampler="ddim", steps=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sample.sampler = 'euler'"),
        ({"steps": 101}, "sample.steps = 101: at most diffusion.timesteps = 100"),
        ({"eta": 2.0}, "sample.eta = 2.0"),
        ({"seed": -1}, "sample.seed = -1"),
        ({"batch": 0}, "sample.batch = 0"),
        ({"guidance": 1.0}, "sample.guidance = 1.0: needs a model of classes"),
        ({"labels": [0, 0]}, r"labels: the model has no classes \(model.num_classes = 0\)"),
    ],
)
def test_a_request_that_cannot_be_is_refused(run, options, message):
    with pytest.raises(RequestError, match=message):
        load(run.path).sample(2, **options)


@pytest.mark.parametrize("labels", [[0], [0, 3], [-1, 0], [0.0, 1.0], [[0, 1]], [[0], [0, 1]], [None, 0],
                                    [True, False], 1.0, float("nan"), True, 3, torch.tensor(1.0)])  # fmt: skip
def test_labels_that_are_not_one_class_for_each_image_are_refused(tmp_path, labels):
    run = make_run(tmp_path / "run", make_config(**WITH_CLASSES), steps=(10,))
    with pytest.raises(RequestError, match="must be 2 whole numbers, one per image, from 0 to 2"):
        load(run.path).sample(2, labels=labels)


@pytest.mark.parametrize("labels", [None, "2"])
def test_samples_come_as_arrays_tensors_or_pictures_of_the_same_bytes(tmp_path, labels):
    model = load(make_run(tmp_path / "run", make_config(**WITH_CLASSES), steps=(10,)).path).to("cpu")
    array, tensor, pictures = (model.sample(3, labels=labels, output=output) for output in ("numpy", "torch", "pil"))
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 3, 8, 8) and tensor.is_contiguous()
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert [p.mode for p in pictures] == ["RGB"] * 3 and np.array_equal(np.stack(pictures), array)
    grids = [ddpm.grid(images, columns=1) for images in (array, tensor, pictures)]
    assert grids[0].size[1] > 2 * grids[0].size[0] and len({grid.tobytes() for grid in grids}) == 1
    with pytest.raises(RequestError, match="output = 'jpeg': use one of numpy, torch, pil"):
        model.sample(3, output="jpeg")


@pytest.mark.parametrize(
    ("images", "columns", "message"),
    [
        (torch.zeros(2, 3, 8, 8), None, r"images of shape \(2, 8, 8, 3\) and type float32: must be uint8"),
        (torch.zeros(8, 8, dtype=torch.uint8), None, r"images of shape \(8, 8\)"),
        (np.zeros((2, 8, 8, 1), np.uint8), None, r"images of shape \(2, 8, 8, 1\)"),
        ([], None, r"images of shape \(0,\)"),
        ([Image.new("RGB", (8, 8)), Image.new("L", (8, 9))], None, "these are of several sizes"),
        *(
            (np.zeros((2, 8, 8, 3), np.uint8), columns, f"columns = {columns!r}: must be a whole number of at least 1")
            for columns in (0, 1.5, "2", True)
        ),
    ],
)
def test_what_is_no_row_of_images_makes_no_grid(images, columns, message):
    with pytest.raises(RequestError, match=message):
        ddpm.grid(images, columns=columns)


def test_num_must_be_positive(run):
    with pytest.raises(RequestError, match=r"sample\.num_samples = 0"):
        load(run.path).sample(0)
