"""configs/: each file is a network, a schedule and a length that exist, and its header says what is true of them."""

import re
from pathlib import Path

import pytest
import torch

from ddpm.config.reading import load
from ddpm.config.schema import Config
from ddpm.diffusion import schedule
from ddpm.network.build import build_model
from ddpm.network.unet import UNet
from tests.conftest import PROJECT
from tools import inspect_config

RECIPES = sorted((PROJECT / "configs").glob("*.yaml"))
NUM_IMAGES = {"cifar10": 50_000, "celeba": 162_770, "digits": 1_797}
"""Training images of each data set."""
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)


def header(path: Path) -> str:
    """The comment that opens the file, as one line."""
    lines = path.read_text().split("\nname:")[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines)


def number(pattern: str, path: Path) -> int:
    found = re.search(pattern, header(path))
    assert found, f"{path.name}: the header lacks {pattern}"
    return int(found[1].replace(",", ""))


def network(config: Config) -> UNet:
    """As build_model makes it, without memory for its weights."""
    with torch.device("meta"):
        return build_model(config, torch.device("meta"), "off")


def test_there_is_a_file_for_every_recipe() -> None:
    cifar10 = {
        "cifar10",
        *(f"cifar10-{r}" for r in ("64-standard", "64-attention", "cosine", "accumulate", "conditional")),
    }
    assert {p.stem for p in RECIPES} == {"quickstart", *cifar10, "celeba-32", "celeba-64", "celeba-128"}


@each_recipe
def test_the_header_counts_the_parameters(path: Path) -> None:
    counted = sum(p.numel() for p in network(load(path)).parameters())
    assert counted == number(r"Network: ([\d,]+) parameters", path)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "quickstart"], ids=lambda p: p.stem)
def test_the_header_says_what_memory_it_needs(path: Path) -> None:
    config = load(path)
    gib = sum(inspect_config.memory(config, network(config)).values()) / 2**30
    found = re.search(r"Memory: ([\d.]+) GiB in fp32", header(path))
    assert found and found[1] == f"{gib:.1f}"


@each_recipe
def test_the_header_says_how_to_train_it(path: Path) -> None:
    if path.stem != "quickstart":  # a script trains that one
        file = "" if path.stem == "cifar10" else f"configs/{path.name} "
        assert f"python launch/submit.py {file}--partition gpu --then sample,evaluate" in header(path)


@each_recipe
def test_its_name_is_the_files(path: Path) -> None:
    assert load(path).name == path.stem


@pytest.mark.parametrize("path", [p for p in RECIPES if load(p).train.total_epochs], ids=lambda p: p.stem)
def test_the_header_says_how_long_it_trains(path: Path) -> None:
    config = load(path)
    assert config.train.total_epochs == number(r"Length: ([\d,]+) epochs", path)
    assert NUM_IMAGES[config.data.name] == number(r"epochs of ([\d,]+) images", path)
    resolved = config.resolve_length(NUM_IMAGES[config.data.name])
    assert resolved.train.total_steps == number(r"images, ([\d,]+) steps", path)


@pytest.mark.parametrize(("name", "num_epochs"), [("cifar10-64-standard", 10), ("cifar10-64-attention", 30)])
def test_the_step_of_the_milestone_in_the_header_is_that_of_its_epoch(name: str, num_epochs: int) -> None:
    path = PROJECT / "configs" / f"{name}.yaml"
    config = load(path)
    assert config.checkpoint.milestone_every_epochs == num_epochs == number(r"--set epoch(\d+)", path)
    assert number(r"--step (\d+)", path) == -(-num_epochs * 50_000 // config.train.global_batch)


@each_recipe
def test_a_narrow_version_of_it_predicts_and_learns(path: Path) -> None:
    """The same structure and options on fewer channels, at the recipe's own image size."""
    config = load(path, ["model.base_channels=32"])
    model = build_model(config, torch.device("cpu"), "off")
    size = config.data.image_size
    labels = torch.tensor([config.model.num_classes - 1]) if config.model.num_classes else None
    eps = model(torch.randn(1, 3, size, size), torch.tensor([999]), labels)
    assert eps.shape == (1, 3, size, size)
    (eps - 1).square().mean().backward()
    assert model.conv_out.weight.grad.abs().max() > 0


@each_recipe
def test_its_schedule_can_be_built(path: Path) -> None:
    diffusion = load(path).diffusion
    assert len(schedule.build(diffusion).beta) == diffusion.timesteps


def test_the_accumulating_recipe_has_its_sources_size() -> None:
    config = load(PROJECT / "configs" / "cifar10-accumulate.yaml")
    counted = sum(p.numel() for p in network(config).parameters())
    assert abs(counted - 32.6e6) < 0.3e6
    assert config.train.global_batch == 4 * (config.train.micro_batch or 0) == 128
    assert (config.checkpoint.every_steps, config.log.grid_every_steps) == (782, 1954)  # 2 and 5 epochs
