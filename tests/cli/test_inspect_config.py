"""`tools/inspect_config.py`: what it counts agrees with what was published and with what autograd really keeps."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import torch

from ddpm.config.reading import load
from ddpm.config.schema import Config
from ddpm.network.arithmetic import forward_flops
from ddpm.network.build import build_model
from ddpm.network.unet import UNet
from tests.cli.harness import PROJECT, Shell
from tests.cli.test_dry_run import imports
from tools import inspect_config

TOOL = "../tools/inspect_config"  # seen from the scripts of launch/
HO = PROJECT / "configs" / "cifar10.yaml"


@pytest.fixture(scope="module")
def ho() -> tuple[Config, UNet]:
    config = load(HO)
    return config, inspect_config.build(config)


def test_the_networks_numbers_are_the_published_ones(ho: tuple[Config, UNet]) -> None:
    """Ho et al. 2020, appendix B: 35.7 million parameters; 12.44 GFLOP forward (6.22 G multiply-adds)."""
    assert inspect_config.num_parameters(ho[1]) == 35_746_307
    assert forward_flops(ho[0]) == pytest.approx(12.44e9, rel=0.01)


@pytest.mark.parametrize("name", ["cifar10", "cifar10-conditional", "cifar10-64-standard", "celeba-64"])
def test_the_rows_hold_every_parameter_once(name: str) -> None:
    config = load(PROJECT / "configs" / f"{name}.yaml")
    model = inspect_config.build(config)
    told = sum(int(row[-1].replace(",", "")) for row in inspect_config.layers(config, model))
    assert told == inspect_config.num_parameters(model)


def test_a_level_shows_its_resolution_channels_blocks_and_attention(ho: tuple[Config, UNet]) -> None:
    rows = {row[0]: row[1:-1] for row in inspect_config.layers(*ho)}
    assert rows["encoder 0"] == ("32x32", "128", "2", "")
    assert rows["encoder 1"] == ("16x16", "256", "2", "2 x 1 head")
    assert rows["bottleneck"] == ("4x4", "256", "2", "1 x 1 head")
    assert rows["decoder 1"] == ("16x16", "256", "3", "3 x 1 head")
    assert list(rows)[-2:] == ["decoder 0", "output"]


def test_attention_of_the_decoder_alone_is_shown_there_alone() -> None:
    config = load(PROJECT / "configs" / "cifar10-accumulate.yaml")
    rows = {row[0]: row[4] for row in inspect_config.layers(config, inspect_config.build(config))}
    assert {part for part, attention in rows.items() if attention} == {"decoder 1"}
    assert rows["decoder 1"] == "2 x 8 heads"


def test_activations_are_what_autograd_keeps_of_a_real_batch() -> None:
    """The same network with real numbers and two images; tensors told apart by where their data lies."""
    config = load(HO, ["model.base_channels=32", "model.dropout=0.1"])
    model = build_model(config, torch.device("cpu"), "bf16")  # bf16: not laid out anew; it runs in fp32
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(2, 3, 32, 32), torch.tensor([0, 999]))
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert 2 * inspect_config.activation_bytes(config) == pytest.approx(real, rel=0.01)


def test_memory_is_twenty_bytes_a_parameter_and_the_activations_of_a_micro_batch(ho: tuple[Config, UNet]) -> None:
    config, model = ho
    whole = inspect_config.memory(config, model)
    part = inspect_config.memory(load(HO, ["train.micro_batch=32"]), model)
    assert whole.pop("activations of 128 images") == 4 * part.pop("activations of 32 images") > 2**30
    assert sum(whole.values()) == sum(part.values()) == 20 * 35_746_307


def test_the_script_prints_it_and_draws_the_schedule(shell: Shell) -> None:
    done = shell(TOOL, "tiny.yaml", "diffusion.schedule=cosine", "train.total_epochs=3", "--plot", "a.svg")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: digits 8x8, batch 8, 3 epochs\n")
    assert re.search(r"^parameters +\d", done.stdout, re.M) and re.search(r"^memory +\d+\.\d+ GiB", done.stdout, re.M)
    assert "a multiply-add is 2" in done.stdout and "cosine schedule, 50 timesteps" in done.stdout
    assert re.search(r"^alpha_bar +█[▁-█]+▁  \d", done.stdout, re.M)
    drawing = ET.parse(shell.cwd / "a.svg").getroot()
    lines = drawing.findall("{http://www.w3.org/2000/svg}polyline")
    heights = [[float(p.split(",")[1]) for p in line.attrib["points"].split()] for line in lines]
    assert [len(h) for h in heights] == [50, 50]
    assert all(h == sorted(h) and h[0] < h[-1] for h in heights)  # both fall over t, and y grows downwards
    assert not shell.root.exists()


@pytest.mark.parametrize("betas", [["1.0e-20", "0.02"], ["0.01", "0.14"]])
def test_schedules_that_reach_pure_image_or_nearly_pure_noise_are_shown_too(betas: list[str]) -> None:
    config = load(HO, [f"diffusion.beta_start={betas[0]}", f"diffusion.beta_end={betas[1]}"])
    from ddpm.diffusion import schedule

    noise = schedule.build(config.diffusion)
    assert len(inspect_config.schedule_lines(noise)) == 2
    assert "nan" not in inspect_config.svg(noise, "x")


def test_what_is_wrong_is_one_message(shell: Shell) -> None:
    assert "did you mean" in shell.refused(TOOL, str(HO.with_name("cifar01.yaml")))
    assert "model.base_channels = 7" in shell.refused(TOOL, "tiny.yaml", "model.base_channels=7")
    assert "model.attention_resolutions" in shell.refused(TOOL, "tiny.yaml", "model.attention_resolutions=[3]")
    assert "--plot a.png" in shell.refused(TOOL, "tiny.yaml", "--plot", "a.png")
    assert not (shell.cwd / "a.png").exists()
    assert "--plot nodir/a.svg: there is no folder nodir" in shell.refused(TOOL, "tiny.yaml", "--plot", "nodir/a.svg")


def test_what_is_hardly_meant_is_warned_of(shell: Shell) -> None:
    done = shell(TOOL, "tiny.yaml", "model.norm_groups=8", "train.warmup_steps=400")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^warning: (.*?) = ", done.stdout, re.M) == ["model.norm_groups", "train.warmup_steps"]
    assert "warning" not in shell(TOOL, "tiny.yaml").stdout


def test_help_shows_examples_and_loads_no_torch(shell: Shell) -> None:
    text, loaded = imports(shell, TOOL, "--help")
    assert "python tools/inspect_config.py configs/cifar10.yaml" in text and "torch" not in loaded
