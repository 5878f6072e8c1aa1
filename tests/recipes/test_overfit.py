"""Forward process, time embedding and skip connections: 64 images learnt by heart, and not learnt if one is broken."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm import runtime, unet
from ddpm.config import Config, Data
from ddpm.data import PackedImages, images_digest, pack
from ddpm.diffusion import Diffusion
from tests.images import given_or_made
from tests.training import Life, make_config, make_run

NUM_IMAGES = 64
SIZE = 16
TIMESTEPS = 1000
BOUND = 0.115
"""Between what the network as it is reaches and what the best of the mutants does."""
CONFIG = make_config(
    data__image_size=SIZE,
    data__flip=False,
    model__base_channels=16,
    model__attention_resolutions=[],
    model__middle_attention=False,
    diffusion__timesteps=TIMESTEPS,
    diffusion__beta_end=0.02,
    train__total_steps=300,
    train__global_batch=16,
    train__lr=4e-3,
    train__warmup_steps=20,
    train__lr_schedule="cosine",
    train__ema_decay=0.9,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    where = tmp_path_factory.mktemp("images")
    path = str(given_or_made(where, num_images=NUM_IMAGES))
    _, packed = pack(Data(name="images", path=path, image_size=SIZE), "train", where / "cache")
    chosen = packed.images[np.linspace(0, len(packed) - 1, NUM_IMAGES).astype(int)]
    return PackedImages(chosen, np.zeros(NUM_IMAGES, np.int64), "chosen", "train", images_digest(chosen))


def noised(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Ho et al.'s x_t, from their betas: nothing of it is the code that trains."""
    beta = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    alpha_bar = (1 - beta).log().cumsum(0).exp()[t].reshape(-1, 1, 1, 1)
    return (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps).float()


def eps_loss_after_training(images: PackedImages, path: Path) -> float:
    """Mean squared error of eps on the images that it was trained on, each at 16 timesteps from 0 to T-1."""
    with Life(CONFIG, make_run(path), images=images) as life:
        assert life.train().finished
        network = life.trainer.ema.model.eval()
    t = torch.linspace(0, TIMESTEPS - 1, 16).long().repeat(NUM_IMAGES)
    x_0 = torch.from_numpy(images.images.copy()).permute(0, 3, 1, 2).repeat_interleave(16, 0) / 127.5 - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((network(noised(x_0, t, eps), t) - eps).square().mean())


def test_a_small_network_learns_64_images(images: PackedImages, tmp_path: Path) -> None:
    loss = eps_loss_after_training(images, tmp_path)
    print(f"eps-loss {loss:.4f}, bound {BOUND}")
    assert loss < BOUND


def mixed_up_alpha_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise has the weight of another timestep than the image."""

    def q_sample(self: Diffusion, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self._at("sqrt_alpha_bar", t) * x_0 + self._at("sqrt_rest", t.flip(0)) * eps

    monkeypatch.setattr(Diffusion, "q_sample", q_sample)


def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every t looks like t = 0."""
    embed = unet.timestep_embedding
    monkeypatch.setattr(unet, "timestep_embedding", lambda t, width: embed(torch.zeros_like(t), width))


def no_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder gets zeros where the encoder's tensors belong."""
    build = runtime.build_model

    def build_model(config: Config, *args: Any) -> unet.UNet:
        network = build(config, *args)
        width = config.model.base_channels * config.model.channel_mults[-1]
        for level in network.decoder:
            for block in level.blocks:
                block.register_forward_pre_hook(partial(_zeros_after, width))
                width = block.conv_2.out_channels
        return network

    monkeypatch.setattr(runtime, "build_model", build_model)


def _zeros_after(width: int, _: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, emb = inputs
    assert x.shape[1] > width
    return torch.cat([x[:, :width], torch.zeros_like(x[:, width:])], 1), emb


@pytest.mark.parametrize("mutate", [mixed_up_alpha_bar, no_time, no_skips], ids=lambda m: m.__name__)
def test_a_broken_one_does_not(
    mutate: Callable[[pytest.MonkeyPatch], None], images: PackedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    loss = eps_loss_after_training(images, tmp_path)
    print(f"eps-loss {loss:.4f}, bound {BOUND}")
    assert loss > BOUND
