"""ddpm/network/made.py: what is told of the U-Net before a run begins is not told of another network."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator

import pytest

from ddpm.config.reading import load
from ddpm.network import made
from launch.cluster.memory import check_batch
from launch.cluster.site import Site
from launch.terminal import plan
from tests.conftest import PROJECT

BEGINS = "def build_model(config, device, precision):\n    torch.Generator()\n    "
OTHERS = {
    "return UNet(config)": "",
    "if config:\n        raise Wrong(config)\n    return UNet(config)": "",
    "return DiT(config) if config.model.tokens else UNet(config)": "DiT",
    "return nets.DiT(config)": "DiT",
    "return timm.create_model(config)": "another network",
    "return (": "",
}


@pytest.fixture
def _anew() -> Iterator[None]:
    made.other_than_the_unet.cache_clear()
    yield
    made.other_than_the_unet.cache_clear()


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize("code", OTHERS)
def test_networks_are_told_by_the_text_of_what_builds_them(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    assert made.other_than_the_unet() == ""  # as it is
    made.other_than_the_unet.cache_clear()
    monkeypatch.setattr(pkgutil, "get_data", lambda package, name: (BEGINS + code).encode())
    assert made.other_than_the_unet() == OTHERS[code]


@pytest.mark.usefixtures("_anew")
def test_of_another_network_no_parameters_memory_or_hours_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(PROJECT / "configs" / "cifar10.yaml", ["train.global_batch=4194304"])
    monkeypatch.setattr(pkgutil, "get_data", lambda package, name: b"DiT(config)")
    site = Site(gpus_per_node=1)
    assert check_batch(config, site) is None
    model, _, _, gpus, *_ = plan.lines(config, site, 50_000, plan.Left(True, []))
    assert model.startswith("model: DiT without classes, by ddpm/network/build.py") and "M parameters" not in model
    assert "GPU hours unknown here" in gpus
