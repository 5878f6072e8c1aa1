"""launch/cluster/memory.py: a batch that cannot fit is refused before it is queued, and none that might."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddpm.config.reading import load
from ddpm.config.unet_shape import Structure
from ddpm.errors import RequestError
from launch.cluster.memory import check_batch
from launch.cluster.site import Site
from tests.conftest import PROJECT
from tools import inspect_config

CIFAR = PROJECT / "configs" / "cifar10.yaml"


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_bound_is_below_what_training_keeps_also_in_16_bits(path: Path) -> None:
    config = load(path)
    least = Structure(image_size=config.data.image_size, **config.model.model_dump()).least_activation_bytes
    kept = inspect_config.activation_bytes(config)
    assert kept / 40 < least < kept / 2


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "no GPU": (
        ["train.global_batch=4194304"],
        {"gpus_per_node": 1},
        r"no GPU has 1,024\.0 GiB; use train.micro_batch=",
    ),
    "where GPUs are not known yet": (["train.global_batch=4194304"], {}, "no GPU has"),
    "the node's memory": (
        ["train.global_batch=8192"],
        {"gpus_per_node": 0, "mem": "8G"},
        r"global_batch = 8192: 8192 images .* share of --mem 8G is 8\.0 GiB; use train.micro_batch=\d+, .* no step",
    ),
    "in MB": (["train.global_batch=8192"], {"gpus_per_node": 0, "mem": "8000"}, r"--mem 8000 is 7\.8 GiB"),
    "a rank's share of it": (
        ["train.global_batch=8192", "train.micro_batch=2048"],
        {"gpus_per_node": 0, "mem": "16G", "tasks_per_node": 4},
        r"micro_batch = 2048: 2048 images at a time on each rank .* --mem 16G is 4\.0 GiB",
    ),
    "this machine": (["train.global_batch=16777216"], {"cluster": "local"}, "this machine is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_cannot_fit_is_refused_with_one_that_can(case: str) -> None:
    words, site, wanted = REFUSED[case]
    if case == "this machine" and Path("/dev/nvidiactl").exists():
        wanted = "no GPU has"
    with pytest.raises(RequestError, match=wanted):
        check_batch(load(CIFAR, words), Site(**site))


def test_what_might_fit_is_warned_of_at_most() -> None:
    large = load(CIFAR, ["train.global_batch=65536"])
    warning = check_batch(large, Site(gpus_per_node=1))
    assert warning is not None and "few GPUs have; train.micro_batch=32768 changes no step and needs less" in warning
    assert check_batch(load(CIFAR), Site(gpus_per_node=1)) is None
    assert check_batch(large, Site(gpus_per_node=4, nodes=2)) is None
    assert check_batch(load(CIFAR, ["train.global_batch=65536", "train.micro_batch=64"]), Site(gpus_per_node=1)) is None
    for whole_node in ({"mem": "0"}, {}):
        assert check_batch(large, Site(gpus_per_node=0, **whole_node)) is None
