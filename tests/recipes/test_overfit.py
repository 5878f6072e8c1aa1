"""Forward process, time embedding and skip connections: 64 images learnt by heart, and not learnt if one is broken."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm.config.schema import Config
from ddpm.data.decoding import to_square
from ddpm.data.packed import PackedImages, images_digest
from ddpm.diffusion.forward import Diffusion
from ddpm.network import build, unet
from tests.draws import drawn
from tests.images import picture
from tests.training import Life, make_config, make_run

Mutation = Callable[[pytest.MonkeyPatch], None]
NUM_IMAGES = 64
SIZE = 16
TIMESTEPS = 1000
MOST_LOSS = 0.02
"""Of eps on the noisy half of the timesteps, where nearly all of it can be known."""
LEAST_RISE = 1.8
"""Times by which that loss is larger when the network is told t - T/2 instead of t: 3.4 where it heeds t, …"""
MOST_RISE = 1.2
"""… and 0.98 where it never learnt to."""
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
    log__every_steps=100,
)


@pytest.fixture(scope="module")
def images() -> PackedImages:
    made = np.stack([to_square(Image.fromarray(picture(i)), SIZE) for i in range(NUM_IMAGES)])
    return PackedImages(made, np.zeros(NUM_IMAGES, np.int64), "pictures", "train", images_digest(made))


def noised(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Ho et al.'s x_t, from their betas: nothing of it is the code that trains."""
    beta = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    alpha_bar = (1 - beta).log().cumsum(0).exp()[t].reshape(-1, 1, 1, 1)
    return (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps).float()


class Losses(NamedTuple):
    """Mean squared error of eps on the images of the training, each at 16 timesteps from T/2 to T-1."""

    told_t: float
    told_another_t: float


def losses_after_training(images: PackedImages, path: Path, mutate: Mutation = lambda _: None) -> Losses:
    """Of a network that was trained under `mutate`; it is judged without."""
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with Life(CONFIG, make_run(path), images=images) as life:
            assert life.train().finished
            network = life.trainer.state.ema.model.eval()
    t = torch.linspace(TIMESTEPS // 2, TIMESTEPS - 1, 16).long().repeat(NUM_IMAGES)
    x_0 = torch.from_numpy(images.images.copy()).permute(0, 3, 1, 2).repeat_interleave(16, 0) / 127.5 - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    x_t = noised(x_0, t, eps)
    with torch.no_grad():
        losses = Losses(*(float((network(x_t, told) - eps).square().mean()) for told in (t, t - TIMESTEPS // 2)))
    print(losses)
    return losses


def test_a_small_network_learns_64_images_and_heeds_t(images: PackedImages, tmp_path: Path) -> None:
    losses = losses_after_training(images, tmp_path)
    assert losses.told_t < MOST_LOSS
    assert losses.told_another_t > LEAST_RISE * losses.told_t


def mixed_up_alpha_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise has the weight of timestep T-1-t, the image that of t."""

    def q_sample(self: Diffusion, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self._at("sqrt_alpha_bar", t) * x_0 + self._at("sqrt_rest", TIMESTEPS - 1 - t) * eps

    monkeypatch.setattr(Diffusion, "q_sample", q_sample)


def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every t looks like t = 0."""
    embed = unet.timestep_embedding
    monkeypatch.setattr(unet, "timestep_embedding", lambda t, width: embed(torch.zeros_like(t), width))


def no_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder gets zeros where the encoder's tensors belong."""
    plain = build.build_model

    def build_model(config: Config, *args: Any) -> unet.UNet:
        network = plain(config, *args)
        width = config.model.base_channels * config.model.channel_mults[-1]
        for level in network.decoder:
            for block in level.blocks:
                block.register_forward_pre_hook(partial(_zeros_after, width))
                width = block.conv_2.out_channels
        return network

    monkeypatch.setattr(build, "build_model", build_model)


def _zeros_after(width: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = inputs
    assert x.shape[1] > width
    return torch.cat([x[:, :width], torch.zeros_like(x[:, width:])], 1), *others


BROKEN = drawn("broken, learns", [mixed_up_alpha_bar, no_skips, no_time], 1)


@pytest.mark.parametrize("mutate", BROKEN, ids=lambda m: m.__name__)
def test_a_broken_one_does_not_learn_them_or_does_not_heed_t(
    mutate: Mutation, images: PackedImages, tmp_path: Path
) -> None:
    """The loss of one without the time is hardly worse (by 10 to 20 %): how much noise there is can be seen in the
    image."""
    losses = losses_after_training(images, tmp_path, mutate)
    if mutate is no_time:
        assert losses.told_another_t < MOST_RISE * losses.told_t
    else:
        assert losses.told_t > MOST_LOSS
